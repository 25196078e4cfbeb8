"""Base and tuned model on the same held-out rows: records of evaluation.json, and the answers behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunesmith import rundir
from tunesmith.data.checks import as_keys, row_keys, shared
from tunesmith.data.store import some_rows
from tunesmith.errors import InputError
from tunesmith.evaluation import answers
from tunesmith.evaluation.baselines import BASELINES, label_counts, unread
from tunesmith.evaluation.calibrated import Calibration
from tunesmith.evaluation.class_metrics import by_class
from tunesmith.evaluation.class_metrics import details as class_details
from tunesmith.evaluation.code_metrics import judged
from tunesmith.evaluation.conformal import OF_SETS
from tunesmith.evaluation.groups import Parted, gaps, numbered, parted, sources, told
from tunesmith.evaluation.intervals import IntArray
from tunesmith.evaluation.metrics import RowMetric, WithoutFloor, applicable, build, scored
from tunesmith.evaluation.paired import compare, holm, hypothesis
from tunesmith.evaluation.run import measure, metric_names, records_to_json
from tunesmith.events import Listen
from tunesmith.models.policy import Policy
from tunesmith.planning import Assets, Plan
from tunesmith.protocols import Draws, Grounded, Method, Objective
from tunesmith.rundir import RunDir
from tunesmith.types import LabelCounts, Metric, Prediction, Row, SampleSpec

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.store import TokenStore
    from tunesmith.recipe import Recipe
    from tunesmith.recipe_evaluation import Code

BASE, TUNED, UNCALIBRATED = "base", "tuned", "uncalibrated"
ALL = "all"
# In the order in which they are written: with evaluation.json a run is finished.
FILES: Mapping[str, str] = {
    "effects": "comparison.json",
    "details": "details.json",
    "groups": "groups.json",
    "decoding": "decoding.json",
    "records": "evaluation.json",
}
SELDOM = ("groups", "decoding")  # asked for by few recipes: there is no file of them elsewhere


def measure_run(
    run: RunDir,
    recipe: Recipe,
    plan: Plan,
    assets: Assets,
    policy: Policy,
    listen: Listen,
    specs: tuple[SampleSpec, SampleSpec],
    calibration: Calibration | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures every test set, or the validation rows where there is none, and writes what was found.

    A run that folds judge has nothing measured without test rows: its numbers are those of the folds.
    `specs`: as in `measure_rows`; `decoding`: what chose them, to be written beside it.
    """
    stores: dict[str, TokenStore] = dict(assets.prepared.tests)
    if not stores and assets.prepared.validation is not None and not recipe.data.judged_by_folds:
        stores = {"validation": assets.prepared.validation}
    counts = label_counts(plan.audit["train"])
    results = _nothing() | {"decoding": decoding or {}}
    for name, store in stores.items():
        rows = some_rows(store, recipe.evaluate.limit, recipe.seed)
        found = measure_rows(
            name,
            rows,
            policy,
            assets.objective,
            assets.method,
            assets.renderer,
            specs,
            recipe.evaluate.base,
            counts,
            listen,
            recipe.evaluate.code,
            recipe.evaluate.metrics or (),
            calibration,
        )
        write_predictions(run, name, rows, found, recipe.evaluate.keep, recipe.evaluate.groups)
        merge(results, score(name, rows, found, assets.objective, recipe, counts=count_seen(run, rows)))
    write_results(run, results)
    return results


def measure_rows(
    name: str,
    rows: Sequence[Row],
    policy: Policy,
    objective: Objective,
    method: Method,
    renderer: Renderer,
    specs: tuple[SampleSpec, SampleSpec],
    with_base: bool,
    counts: LabelCounts | None,
    listen: Listen,
    code: Code | None = None,
    metrics: Sequence[str] = (),
    calibration: Calibration | None = None,
) -> dict[str, list[Prediction]]:
    """Answers of the tuned model and, if asked for, of what it is compared with, to the same rows.

    `specs`: how the tuned model draws answers, and how the base does. `code`, `metrics`: as in `answered`. Where
    probabilities are scaled, those of before are there as well.
    """
    listen("phase", {"name": "evaluating", "what": f"{TUNED} on {name}", "rows": len(rows)})
    spec, base_spec = specs
    found = {TUNED: answered(policy, rows, objective, renderer, spec, code, metrics)}
    if calibration is not None:
        before = {} if calibration.scaling is None else {UNCALIBRATED: found[TUNED]}
        found = {TUNED: calibration.apply(found[TUNED], rows), **before}
    if with_base and not objective.heads():
        listen("phase", {"name": "evaluating", "what": f"{BASE} on {name}", "rows": len(rows)})
        with method.reference(policy):
            found = {BASE: answered(policy, rows, objective, renderer, base_spec, code, metrics), **found}
    elif with_base and objective.needs.baseline is not None and isinstance(objective, Grounded):
        baseline = objective.needs.baseline
        listen("phase", {"name": "evaluating", "what": f"{baseline} on {name}", "rows": len(rows)})
        with method.reference(policy):
            found = {baseline: objective.untuned(policy, rows, renderer, base_spec), **found}
    elif with_base and objective.needs.baseline is not None:
        answers = unread(objective, rows, counts)
        found = found if answers is None else {objective.needs.baseline: scored(metrics, answers), **found}
    return found


def answered(
    policy: Policy,
    rows: Sequence[Row],
    objective: Objective,
    renderer: Renderer,
    spec: SampleSpec,
    code: Code | None,
    metrics: Sequence[str],
) -> list[Prediction]:
    """An answer to each row, with what those of `metrics` need that ask another model.

    With `code` each says how many programs were drawn for its row, and how many pass.
    """
    found = scored(metrics, objective.predict(policy, rows, renderer, spec))
    if code is None:
        return found
    drawn = [[prediction.output] for prediction in found]
    if code.samples > 1:
        assert isinstance(objective, Draws), "rows that ask for an answer are read by objectives that write one"
        several = SampleSpec(spec.max_new_tokens, code.temperature, seed=spec.seed)
        drawn = objective.draw(policy, rows, renderer, several, code.samples)
    return judged(found, drawn, rows, code)


def score(
    name: str,
    rows: Sequence[Row],
    found: Mapping[str, Sequence[Prediction]],
    objective: Objective,
    recipe: Recipe,
    metrics: Sequence[str] | None = None,
    counts: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Records with intervals for each model, over all rows, by class and by group; and the paired effects of tuning.

    `metrics` (else the recipe's) are measured or refused; those of the objective where the rows can have them. By
    a metric that the majority class is no floor for, the tuned model is not tested against it. Each record has
    the `counts` of the set's rows (of `count_seen` and `count_cut`), and among how many passages was searched
    (`candidates`), if any were.
    """
    asked = metrics or recipe.evaluate.metrics
    sets = OF_SETS if applicable(OF_SETS, found[TUNED]) else ()  # what was asked of sets is judged by them in any case
    names = metric_names((*objective.needs.metrics, *sets), [*asked, *sets] if asked else None)
    labels: list[str] | None = objective.describe().get("labels")
    cluster = recipe.evaluate.cluster
    clusters_N = None if cluster is None else sources([row.tags[cluster] for row in rows])
    records: list[Metric] = []
    effects: list[dict[str, Any]] = []
    columns = [
        parted([row.tags[column] for row in rows], column, recipe.evaluate.least_of_group)
        for column in recipe.evaluate.by
    ]
    apart: list[dict[str, Any]] = []
    for group, places_N in _groups(len(rows), columns):
        of_group = {model: [predictions[i] for i in places_N] for model, predictions in found.items()}
        tuned = of_group[TUNED]
        built = build(names if asked and group == ALL else applicable(names, tuned), tuned, labels)
        own = None if clusters_N is None else numbered(clusters_N[places_N])
        asked_for = [metric.name for metric in built if metric.name not in applicable([metric.name], tuned)]
        for model, predictions in of_group.items():
            records += measure(model, name, predictions, _had(built, predictions, asked_for), recipe.seed, own, group)
        if group == ALL:
            apart = [told(name, one, gaps(one, tuned, built, recipe.seed, clusters_N)) for one in columns]
        before = next((of_group[model] for model in (BASE, *BASELINES) if model in of_group), None)
        if before is not None and group == ALL:
            no_floor = WithoutFloor if answers.MAJORITY in found else ()
            tested = [m for m in _had(built, before, asked_for) if not isinstance(m, no_floor)]
            effects = paired_effects(name, before, tuned, tested, recipe.seed, own)
    details: dict[str, Any] = {}
    if labels is not None:
        known = sorted({*labels, *(label for p in found[TUNED] for label in p.expected)})
        for model, predictions in found.items():
            records += by_class(model, name, predictions, known, clusters_N) if model != UNCALIBRATED else []
        details[name] = {model: class_details(predictions, known) for model, predictions in found.items()}
    searched = found[TUNED][0].scores.get("candidates")
    unknown = 0 if labels is None else sum(not set(p.expected) <= set(labels) for p in found[TUNED])
    own = {
        **(counts or {}),
        **({} if searched is None else {"candidates": int(searched)}),
        **({"unknown_labels": unknown} if unknown else {}),
    }
    said = [record | own for record in records_to_json(records)]
    return {"records": said, "effects": effects, "details": details, "groups": apart}


def _had(metrics: Sequence[RowMetric], predictions: Sequence[Prediction], asked_for: Sequence[str]) -> list[RowMetric]:
    """Those of the metrics that the predictions can have, or that were asked for all the same."""
    fitting = {*asked_for, *applicable([metric.name for metric in metrics], predictions)}
    return [metric for metric in metrics if metric.name in fitting]


def count_seen(run: RunDir, rows: Sequence[Row]) -> dict[str, int | None]:
    """How many of the rows stand in the run's training and validation rows, by the keys of the audit.

    None where these are unknown: to an exported model, and to a run of before they were kept.
    """
    keys = as_keys(b"".join(row_keys(row.value)[0] for row in rows))
    found: dict[str, int | None] = {}
    for name, file in (("in_train", rundir.TRAIN_KEYS), ("in_validation", rundir.VALIDATION_KEYS)):
        path = run.path / file
        found[name] = len(shared(keys, as_keys(path.read_bytes()))) if path.is_file() else None
    return found


def count_cut(objective: Objective, renderer: Renderer, rows: Sequence[Row]) -> dict[str, int]:
    """How many of the rows are longer than the model reads; nothing where none is."""
    cut = sum(objective.example(row, renderer).cut > 0 for row in rows)
    return {"cut": cut} if cut else {}


def merge(results: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Adds what was found on a data set to results, in place of what an earlier pass over the same set found."""
    names = {entry["data"] for entry in new["records"]}
    for key in ("records", "effects", "groups"):
        results[key] = [entry for entry in results[key] if entry["data"] not in names] + list(new[key])
    results["details"] = {name: d for name, d in results["details"].items() if name not in names} | new["details"]


def read_results(run: RunDir) -> dict[str, Any]:
    """Records, effects and details as measured so far; none of any before the first."""
    found = _nothing()
    for key, name in FILES.items():
        if (run.path / name).is_file():
            found[key] = rundir.read_json(run.path / name)
    return found


def write_results(run: RunDir, results: Mapping[str, Any]) -> None:
    for key, name in FILES.items():
        if key not in SELDOM or results.get(key) or (run.path / name).is_file():
            rundir.write_json(run.path / name, results[key])


def check_same_set(run: RunDir, name: str, rows: Sequence[Row]) -> None:
    """Raises InputError where the set called `name` was measured on rows of which these are neither part nor whole."""
    if name not in answers.kept(run.path):
        return
    before = {row.key for row in answers.read(run.path, name)}
    now = {row_keys(row.value)[1].hex() for row in rows}
    if not (before <= now or now <= before):
        raise InputError(
            f"{run.path} was measured on other rows under the name {name!r}, and those results would be lost",
            "give these rows another name: --name NAME",
        )


def write_predictions(
    run: RunDir,
    name: str,
    rows: Sequence[Row],
    found: Mapping[str, Sequence[Prediction]],
    keep: int | None,
    groups: Sequence[str] | None = None,
) -> None:
    """The answers to the first `keep` rows (None: to all); those of an earlier pass over the set give way.

    `groups`: the columns whose tags are kept (None: all).
    """
    rows = rows[:keep]
    if groups is not None:
        rows = [replace(row, tags={column: row.tags[column] for column in groups}) for row in rows]
    if keep == 0:
        answers.remove(run.path, name)
    else:
        answers.write(run.path, name, rows, {model: own for model, own in found.items() if model != UNCALIBRATED})


def _groups(count: int, columns: Sequence[Parted]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """All rows, then those of each group that is judged: names for evaluation.json, and positions."""
    yield ALL, np.arange(count)
    for of in columns:
        for value, places_N in of.judged.items():
            yield f"{of.column}={value}", places_N


def paired_effects(
    name: str,
    before: Sequence[Prediction],
    tuned: Sequence[Prediction],
    metrics: Sequence[RowMetric],
    seed: int,
    clusters_N: IntArray | None,
) -> list[dict[str, Any]]:
    """The effect by each metric; `p_holm` is adjusted for all metrics of the set that are tested.

    A limit that is infinite (one row of a loss), or that there is none of, is null.
    """
    effects = [compare(before, tuned, metric, seed, clusters_N=clusters_N) for metric in metrics]
    family = {hypothesis(metric): effect.p for metric, effect in zip(metrics, effects, strict=True) if effect.tested}
    adjusted = dict(zip(family, holm(list(family.values())), strict=True))
    return [
        {"data": name, "metric": metric.name}
        | {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(effect).items()}
        | {"p_holm": adjusted.get(hypothesis(metric))}
        for metric, effect in zip(metrics, effects, strict=True)
    ]


def _nothing() -> dict[str, Any]:
    return {"records": [], "effects": [], "details": {}, "groups": [], "decoding": {}}
