"""What is told of a classifier beside its accuracy: each class, how it ranks, and what its probabilities are worth.

Shape letters: N rows, L labels, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import wilson
from tunesmith.evaluation.metrics import Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import Metric, Prediction

BINS = 15


@METRICS.register("roc_auc")
class RocAuc:
    """Area under the ROC curve, the mean over classes of each against the rest; ties count one half.

    A row's statistic is the area plus the row's influence on it, from its placement among the rows of the other
    side (DeLong, DeLong and Clarke-Pearson 1988), so that intervals and tests need one pass. Classes that
    all rows have, or none, are left out.
    """

    name: ClassVar[str] = "roc_auc"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return _have_probabilities(predictions) and len({p.reference for p in predictions}) > 1

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        """One row alone has no rank."""
        return (float("nan"), 1.0)

    def joint_statistics(self, predictions: Sequence[Prediction]) -> FloatArray:
        references_N = np.array([reference_of(p, self.name) for p in predictions])
        influence_N, areas = np.zeros(len(predictions)), list[float]()
        for label in self.labels:
            positive_N = references_N == label
            positives = int(positive_N.sum())
            negatives = len(predictions) - positives
            if not positives or not negatives:
                continue
            scores_N = np.array([_probabilities(p, self.name).get(label, 0.0) for p in predictions])
            above_P = _placements(scores_N[positive_N], scores_N[~positive_N])
            below_M = 1 - _placements(scores_N[~positive_N], scores_N[positive_N])
            area = float(above_P.mean())
            areas.append(area)
            influence_N[positive_N] += (above_P - area) * len(predictions) / positives
            influence_N[~positive_N] += (below_M - area) * len(predictions) / negatives
        if not areas:
            raise InputError(
                f"{self.name} needs rows of two classes, and all of these have {predictions[0].reference!r}",
                f"measure on rows of several classes, or leave {self.name} out of evaluate.metrics",
            )
        value_N = float(np.mean(areas)) + influence_N / len(areas)
        return np.column_stack([value_N, np.ones(len(predictions))])

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("ece")
class Ece:
    """Expected calibration error: |confidence - accuracy| in 15 equal bins of confidence, weighted by their rows.

    Guo et al. 2017 (1706.04599). Few rows overstate it: noise adds up in every bin. The interval takes that off,
    so its lower end may lie further from the value than its upper end.
    """

    name: ClassVar[str] = "ece"
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return _have_probabilities(predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        confidence = _confidence(prediction, self.name)
        row = [0.0] * (BINS + 1)
        row[_bin(confidence)] = confidence - float(prediction.output == reference_of(prediction, self.name))
        row[BINS] = 1.0
        return tuple(row)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(np.stack([np.abs(sums[..., :BINS]).sum(-1), sums[..., BINS]], axis=-1))


def by_class(model: str, data: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[Metric]:
    """Precision and recall of each class, with Wilson's intervals; n is how many rows were given, or have, the label.

    A class that no answer names has no precision, one that no row has no recall: it has no such record.
    """
    records: list[Metric] = []
    for label in labels:
        right = sum(p.output == label == p.reference for p in predictions)
        named, actual = sum(p.output == label for p in predictions), sum(p.reference == label for p in predictions)
        for metric, count in (("precision", named), ("recall", actual)):
            if count:
                low, high = wilson(right, count)
                records.append(Metric(model, data, metric, right / count, low, high, count, f"label={label}"))
    return records


def confusion(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """How often each label (rows) was answered with each (columns)."""
    place = {label: i for i, label in enumerate(labels)}
    counts_LL: NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for prediction in predictions:
        if prediction.reference in place and prediction.output in place:
            counts_LL[place[prediction.reference], place[prediction.output]] += 1
    return {"labels": list(labels), "counts": counts_LL.tolist()}


def reliability(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean confidence and accuracy in each bin of confidence that has rows, and the error that follows."""
    rows: dict[int, list[tuple[float, bool]]] = {}
    for prediction in predictions:
        confidence = _confidence(prediction, "reliability")
        rows.setdefault(_bin(confidence), []).append((confidence, prediction.output == prediction.reference))
    bins = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "n": len(found),
            "confidence": sum(confidence for confidence, _ in found) / len(found),
            "accuracy": sum(right for _, right in found) / len(found),
        }
        for number, found in sorted(rows.items())
    ]
    apart = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins)
    return {"bins": bins, "ece": apart / len(predictions)}


def details(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """What a picture of a classifier needs; of no probabilities, the confusion alone."""
    found: dict[str, Any] = {"confusion": confusion(predictions, labels)}
    return {**found, "reliability": reliability(predictions)} if _have_probabilities(predictions) else found


def _placements(scores: FloatArray, others: FloatArray) -> FloatArray:
    """For each score the share of the others that lie below it, equal ones counting one half."""
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    return (below + up_to) / (2 * len(others))


def _have_probabilities(predictions: Sequence[Prediction]) -> bool:
    return all(p.probabilities is not None and p.reference is not None for p in predictions)


def _probabilities(prediction: Prediction, metric: str) -> Mapping[str, float]:
    if prediction.probabilities is None:
        raise InputError(
            f"{metric} needs the probability of each label, and the answer to {prediction.where} has none",
            f"leave {metric} out of evaluate.metrics: this objective's answers carry no probabilities",
        )
    return prediction.probabilities


def _confidence(prediction: Prediction, metric: str) -> float:
    """The probability of what was answered."""
    return _probabilities(prediction, metric).get(prediction.output, 0.0)


def _bin(confidence: float) -> int:
    """Bins are open below and closed above, as those of Guo et al.; 0 is in the first."""
    return min(BINS - 1, max(0, int(np.ceil(confidence * BINS)) - 1))
