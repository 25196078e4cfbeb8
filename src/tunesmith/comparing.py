"""Runs on the rows that they share: which does better, whether that is chance, and how many rows would tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.comparable import (
    TUNED,
    Entrant,
    Finished,
    PathLike,
    SharedRow,
    common_sets,
    opened,
    shared_rows,
    taking_part,
)
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import MAJORITY
from tunesmith.evaluation.groups import sources
from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.likelihood_metrics import Loss
from tunesmith.evaluation.metrics import FloatArray, RowMetric, WithoutFloor, build, lacking, statistics
from tunesmith.evaluation.paired import LEVEL, Effect, Pairing, effect, holm, hypothesis, side_by_side
from tunesmith.evaluation.run import metric_names, records_to_json
from tunesmith.plugins import load_plugins
from tunesmith.types import Metric, Prediction

Standing = Literal["better", "worse", "undecided", "cannot tell"]
Of = Mapping[str, Sequence[Prediction]]


@dataclass(frozen=True, slots=True)
class Shared:
    """A test set: the rows that all runs have answered, and how many of each run's own are left out.

    Rows of one `cluster` come from one source. `tests` is how many Holm's correction is for.
    """

    data: str
    rows: int
    left_out: Mapping[str, int]
    cluster: str | None
    tests: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """`after` less `before` by one metric, with its 95% interval; `standing` is that of `after` by `p_holm`.

    `p_holm` is p after Holm's correction for all tests of the set. `rows_needed`: rows in all with which a difference
    like the one seen is found in at least 4 of 5 repetitions (None: never). `detectable`: the smallest difference
    that is found so with these rows (None: they are too few). Where the rows cannot carry a test, the interval and
    both p are NaN, `reason` says why, and the standing is "cannot tell".
    """

    data: str
    metric: str
    before: str
    after: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    standing: Standing
    rows_needed: int | None
    detectable: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models by name on the rows that they share. A notebook shows it as tables.

    `records` are those of evaluation.json, with these names and over these rows.
    """

    models: Mapping[str, Entrant]
    shared: Sequence[Shared]
    records: Sequence[Metric]
    tests: Sequence[Contrast]
    notes: Sequence[str]
    rows: Mapping[str, Sequence[SharedRow]] = field(repr=False)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Who is told against whom, as (before, after): runs first, then what they were measured beside."""
        found = [(before, after) for after, entrant in self.models.items() for before in entrant.against]
        return sorted(found, key=lambda pair: self.models[pair[0]].model != TUNED)

    def to_json(self) -> dict[str, Any]:
        """All but the rows; what has no finite value is null."""
        return {
            "models": {name: {"run": str(e.run), "model": e.model} for name, e in self.models.items()},
            "shared": [asdict(shared) for shared in self.shared],
            "records": records_to_json(self.records),
            "tests": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(test).items()}
                for test in self.tests
            ],
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        from tunesmith.report.notebook import comparison_html

        return comparison_html(self)


def compare(
    *runs: PathLike,
    data: str | Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    base: bool = False,
    out: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
) -> Comparison:
    """Compares runs, each with each, on the rows of every test set that all have answered; `out`: its page, as HTML.

    `data` names the sets, `metrics` what to compare by, in place of all that the runs were measured by. With `base`,
    and for one run alone, what each run was measured beside (its base, or the majority class) takes part too.
    InputError where runs cannot be compared: other labels, other references, no answers kept, not finished.
    """
    load_plugins(plugins)
    given = opened(runs)
    sets = common_sets(given, [data] if isinstance(data, str) else data)
    models, rows = taking_part(given, {name: shared_rows(given, name) for name in sets}, base or len(given) == 1)
    parts = [_Set.of(name, rows[name], given, models, metrics) for name in sets]
    result = Comparison(
        models,
        [part.shared for part in parts],
        [record for part in parts for record in part.records],
        [test for part in parts for test in part.tests],
        [note for part in parts for note in part.notes],
        rows,
    )
    if out is not None:
        from tunesmith.report.comparison_page import write_page

        write_page(Path(out), result)
    return result


@dataclass(frozen=True, slots=True)
class _Set:
    """What one test set says."""

    shared: Shared
    records: list[Metric]
    tests: list[Contrast]
    notes: list[str]

    @staticmethod
    def of(
        name: str,
        rows: Sequence[SharedRow],
        runs: Sequence[Finished],
        models: Mapping[str, Entrant],
        asked: Sequence[str] | None,
    ) -> _Set:
        of = {who: [row.answers[who] for row in rows] for who in models}
        metrics, notes = _metrics(name, runs, of, asked)
        cluster = _cluster(runs, rows, notes)
        clusters_N = sources([r.row.tags[cluster] for r in rows]) if cluster else None
        tables = {metric.name: {who: statistics(metric, found) for who, found in of.items()} for metric in metrics}
        seed = runs[0].seed
        records = [
            Metric(
                who,
                name,
                metric.name,
                *interval(metric, table, seed, clusters_N=clusters_N),
                len(rows),
                reason=lacking(metric, table, clusters_N=clusters_N),
            )
            for metric in metrics
            for who, table in tables[metric.name].items()
        ]
        pairs = list(_pairs(models, metrics, tables, clusters_N, seed))
        family = {pair.hypothesis: pair.effect.p for pair in pairs if pair.effect.tested}
        adjusted = dict(zip(family, holm(list(family.values())), strict=True))
        undecided = sum(p > 1 - LEVEL for p in adjusted.values())
        tests = [
            pair.judged(name, adjusted.get(pair.hypothesis, math.nan), len(family), undecided, len(rows))
            for pair in pairs
        ]
        left_out = {run.name: max(run.measured(name).values()) - len(rows) for run in runs}
        return _Set(Shared(name, len(rows), left_out, cluster, len(family)), records, tests, notes)


@dataclass(frozen=True, slots=True)
class _Pair:
    metric: RowMetric
    before: str
    after: str
    pairing: Pairing
    effect: Effect

    @property
    def hypothesis(self) -> tuple[str, str, str]:
        return hypothesis(self.metric), self.before, self.after

    def judged(self, data: str, p_holm: float, tests: int, undecided: int, rows: int) -> Contrast:
        """The test among the `tests` of its family; `rows` are those of all clusters.

        What it needs is told for the level at which it is decided whatever becomes of the others that are undecided.
        """
        standing: Standing = "undecided" if self.effect.tested else "cannot tell"
        level = (1 - LEVEL) / undecided if p_holm > 1 - LEVEL else (1 - LEVEL) / max(tests, 1)
        if p_holm <= 1 - LEVEL:
            standing = "better" if (self.effect.difference > 0) == self.metric.higher_is_better else "worse"
        several = self.pairing.units > 1
        units = self.pairing.units_needed(level) if several else None
        return Contrast(
            data,
            self.metric.name,
            self.before,
            self.after,
            **asdict(self.effect),
            p_holm=p_holm,
            standing=standing,
            rows_needed=None if units is None else math.ceil(units * rows / self.pairing.units),
            detectable=self.pairing.detectable(level) if several else None,
        )


def _pairs(
    models: Mapping[str, Entrant],
    metrics: Sequence[RowMetric],
    tables: Mapping[str, Mapping[str, FloatArray]],
    clusters_N: IntArray | None,
    seed: int,
) -> Iterator[_Pair]:
    """Every model after every one that it is told against, by every metric that is fair."""
    for after, entrant in models.items():
        for before, metric in itertools.product(entrant.against, metrics):
            if models[before].model == MAJORITY and isinstance(metric, WithoutFloor):
                continue
            pairing = side_by_side(metric, tables[metric.name][before], tables[metric.name][after], clusters_N)
            yield _Pair(metric, before, after, pairing, effect(pairing, metric, seed))


def _metrics(
    name: str, runs: Sequence[Finished], of: Of, asked: Sequence[str] | None
) -> tuple[list[RowMetric], list[str]]:
    """The metrics that are asked for, else all that every run was measured by; and what was left out, and why."""
    measured = [run.measured(name) for run in runs]
    recorded = list(dict.fromkeys(metric for own in measured for metric in own))
    notes: list[str] = []
    if asked is not None:
        names = metric_names((), asked)
    else:
        unknown = [metric for metric in recorded if metric not in METRICS]
        notes += [f"{metric} is left out: a plugin defines it (--plugin FILE)" for metric in unknown]
        partly = [m for m in recorded if m not in unknown and not all(m in own for own in measured)]
        notes += [f"{m} is left out: not all runs were measured by it (--metrics {m} compares by it)" for m in partly]
        names = [metric for metric in recorded if metric not in (*unknown, *partly)]
    found: list[RowMetric] = []
    for metric in build(names, next(iter(of.values())), runs[0].labels):
        if not isinstance(metric, Loss) or _same_tokens(of):
            found.append(metric)
            continue
        why = f"the models count other tokens on {name}, so a nat for each of one's is not one for each of the other's"
        if asked:
            raise InputError(f"{metric.name} cannot be compared: {why}", f"leave {metric.name} out of --metrics")
        notes.append(f"{metric.name} is left out: {why}")
    if not found:
        raise InputError(f"the runs have no metric of {name} in common", "name metrics with --metrics")
    return found, notes


def _cluster(runs: Sequence[Finished], rows: Sequence[SharedRow], notes: list[str]) -> str | None:
    """The column whose rows stay together: the first run's that names one which all rows have."""
    named = list(dict.fromkeys(run.cluster for run in runs if run.cluster))
    found = next((column for column in named if all(column in row.row.tags for row in rows)), None)
    instead = f"rows are kept together by {found}" if found else "not all rows have it, and each stands for itself"
    notes += [f"evaluate.cluster is {column} for some runs: {instead}" for column in named if column != found]
    return found


def _same_tokens(of: Of) -> bool:
    """Whether all models' answers are scored over the same tokens; other tokenizers, or cuts, count others."""
    counts = [[answer.scores.get("tokens") for answer in found] for found in of.values()]
    return all(count == counts[0] for count in counts[1:])
