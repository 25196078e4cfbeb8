"""Base and tuned on the same rows: records with intervals, paired differences, and the table on screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table
from scipy import special

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import (
    BLOCK,
    IntArray,
    clustered,
    interval,
    paired_rate,
    percentile,
    studentised,
    value_of,
)
from tunesmith.evaluation.metrics import FloatArray, RowMetric, statistics
from tunesmith.types import Metric, Prediction, Row

# Stands for the probability of a label that training never saw, here as in the classifier's own predictions.
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Effect:
    """Tuned minus base on the same rows, with its 95% interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def metric_names(default: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The metrics to measure: those asked for, else the objective's; each known, each once.

    InputError on an unknown name, naming the nearest, and on an empty list.
    """
    names = list(dict.fromkeys(default if asked is None else asked))
    if not names:
        raise InputError("evaluate.metrics names no metric", f"leave the key out, or choose of: {', '.join(METRICS)}")
    for name in names:
        METRICS.get(name)
    return names


def measure(
    model_name: str,
    data_name: str,
    predictions: Sequence[Prediction],
    metrics: Sequence[RowMetric],
    seed: int,
    clusters_N: IntArray | None = None,
    group: str = "all",
) -> list[Metric]:
    """One record a metric, in the order given. InputError if predictions lack what a metric needs."""
    records: list[Metric] = []
    for metric in metrics:
        value, low, high = interval(metric, statistics(metric, predictions), seed, clusters_N=clusters_N)
        records.append(Metric(model_name, data_name, metric.name, value, low, high, len(predictions), group))
    return records


def compare(
    base_predictions: Sequence[Prediction],
    tuned_predictions: Sequence[Prediction],
    metric: RowMetric,
    seed: int,
    resamples: int = 2000,
    clusters_N: IntArray | None = None,
) -> Effect:
    """Tuned minus base over the same rows in the same order; InputError if they are not the same.

    Rates: Bonett and Price's interval and McNemar's exact test. All else: the bootstrap of `intervals`
    over rows with both models' statistics side by side, and approximate randomisation (Noreen 1989): the
    models' answers to each row are swapped at random, which is what McNemar's test enumerates.
    Rows of one cluster are drawn, and swapped, together.
    """
    _same_rows(base_predictions, tuned_predictions)
    base_NK, tuned_NK = statistics(metric, base_predictions), statistics(metric, tuned_predictions)
    if clusters_N is not None:
        base_NK, tuned_NK = clustered(base_NK, clusters_N), clustered(tuned_NK, clusters_N)
    count = len(base_NK)
    if metric.kind == "rate" and clusters_N is None:
        gained = int(((tuned_NK[:, 0] == 1) & (base_NK[:, 0] == 0)).sum())
        lost = int(((tuned_NK[:, 0] == 0) & (base_NK[:, 0] == 1)).sum())
        return Effect((gained - lost) / count, *paired_rate(gained, lost, count), mcnemar(gained, lost))
    difference = value_of(metric, tuned_NK) - value_of(metric, base_NK)
    limits = _paired_limits(metric, base_NK, tuned_NK, seed, resamples) if count > 1 else None
    if limits is None:
        # One row says nothing of the spread; rows that all agree have none.
        span = metric.bounds[1] - metric.bounds[0]
        limits = (-span, span) if count == 1 else (difference, difference)
    return Effect(difference, *limits, _randomisation(metric, base_NK, tuned_NK, seed, resamples))


def _paired_limits(
    metric: RowMetric, base_NK: FloatArray, tuned_NK: FloatArray, seed: int, resamples: int
) -> tuple[float, float] | None:
    """Bootstrap limits of the difference; None if all resamples agree."""
    width = base_NK.shape[1]

    def difference(sums: FloatArray) -> FloatArray:
        return metric.aggregate(sums[..., width:]) - metric.aggregate(sums[..., :width])

    side_by_side = np.hstack([base_NK, tuned_NK])
    # A rate or a mean of clusters is a ratio as well: they differ in rows.
    ratio = metric.kind == "ratio" or (metric.kind != "general" and np.ptp(base_NK[:, 1]) > 0)
    if ratio and np.array_equal(base_NK[:, 1], tuned_NK[:, 1]):
        # A loss over the same tokens: its difference is itself a ratio. Not so for perplexity.
        change_N2 = np.column_stack([tuned_NK[:, 0] - base_NK[:, 0], base_NK[:, 1]])
        total_2 = change_N2.sum(axis=0)
        if np.isclose(metric.aggregate(total_2), difference(side_by_side.sum(axis=0)), rtol=1e-9, atol=0):
            limits = studentised(change_N2, seed, 0.95, resamples)
            if limits is not None:
                return limits
    return percentile(difference, side_by_side, seed, 0.95, resamples)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: of the rows that changed, as many each way but for chance. McNemar 1947."""
    changed = gained + lost
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0


def majority(references_train: Mapping[str, int], rows: Sequence[Row]) -> list[Prediction]:
    """What a classifier that ignores the text would answer: the most frequent label of the training rows.

    Its probabilities are the training frequencies, so `loss` measures the entropy a model must beat.
    Ties go to the first label in alphabetical order. InputError without labels.
    """
    total = sum(references_train.values())
    if total <= 0:
        raise InputError("there is no majority label: the training rows hold no labels", "check data.train")
    probabilities = {label: references_train[label] / total for label in sorted(references_train)}
    output = max(probabilities, key=lambda label: probabilities[label])
    predictions: list[Prediction] = []
    for row in rows:
        reference = row.value.get("label")
        expected = reference if isinstance(reference, str) else None
        share = probabilities.get(expected, 0.0) if expected is not None else 0.0
        nll = -math.log(max(share, SMALLEST))
        scores = {} if expected is None else {"nll": nll, "tokens": 1.0}
        predictions.append(Prediction(output, expected, row.where, scores, probabilities))
    return predictions


def records_to_json(records: Sequence[Metric]) -> list[dict[str, Any]]:
    """The content of evaluation.json. A limit that is infinite (one row of a loss) is null, as JSON has none."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        for record in map(asdict, records)
    ]


def table(records: Sequence[Metric], effects: Mapping[tuple[str, str], Effect]) -> Table:
    """Before and after, a line for each data set, group and metric. `effects` by (data, metric), for group "all".

    A column for each model in the order of its first record: base or majority, then tuned. Rates are
    fractions; all numbers have three decimals, p two significant digits.
    """
    several = len({(r.data, r.group) for r in records}) > 1
    result = Table(caption="95% intervals; difference and p are paired over the same rows")
    for heading in (["data"] if several else []) + ["metric"]:
        result.add_column(heading)
    names = list(dict.fromkeys(r.model for r in records))
    for heading in (*names, "difference", "p", "n"):
        result.add_column(heading, justify="right", no_wrap=True)
    cells: dict[tuple[str, str, str], dict[str, Metric]] = {}
    for record in records:
        cells.setdefault((record.data, record.group, record.metric), {})[record.model] = record
    for (data, group, name), models in cells.items():
        effect = effects.get((data, name)) if group == "all" else None
        place = [data if group == "all" else f"{data} / {group}"] if several else []
        counts = sorted({record.n for record in models.values()})
        result.add_row(
            *place,
            name,
            *(_with_interval(models.get(model)) for model in names),
            "-" if effect is None else f"{effect.difference:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]",
            "-" if effect is None else _probability(effect.p),
            " / ".join(map(str, counts)),
        )
    return result


def _with_interval(record: Metric | None) -> str:
    return "-" if record is None else f"{record.value:.3f} [{record.low:.3f}, {record.high:.3f}]"


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def _same_rows(base: Sequence[Prediction], tuned: Sequence[Prediction]) -> None:
    remedy = "predict both models on the same test set, in the same order"
    if len(base) != len(tuned):
        raise InputError(f"the models are compared on {len(base)} and {len(tuned)} rows", remedy)
    for before, after in zip(base, tuned, strict=True):
        if (before.where, before.reference) != (after.where, after.reference):
            raise InputError(f"the models are compared on different rows: {before.where} and {after.where}", remedy)


def _randomisation(metric: RowMetric, base_NK: FloatArray, tuned_NK: FloatArray, seed: int, resamples: int) -> float:
    """Share of random swaps whose difference is at least as large; the observed one counts as a swap."""
    rng = np.random.default_rng(seed)
    middle_K = (base_NK + tuned_NK).sum(axis=0) / 2
    half_NK = (tuned_NK - base_NK) / 2

    def distance(shift: FloatArray) -> FloatArray:
        return np.abs(metric.aggregate(middle_K + shift) - metric.aggregate(middle_K - shift))

    # Swaps that give the same sums in another order must count as equal.
    observed = float(distance(half_NK.sum(axis=0))) * (1 - 1e-9)
    size = max(1, BLOCK // len(half_NK))
    at_least = 0
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        signs_RN = rng.integers(0, 2, size=(rows, len(half_NK)), dtype=np.int8) * 2.0 - 1.0
        at_least += int((distance(signs_RN @ half_NK) >= observed).sum())
    return (1 + at_least) / (1 + resamples)
