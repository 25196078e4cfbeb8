"""What is told of a classifier beside its accuracy: each class, which classes it confuses, and how it ranks.

Shape letters: N rows, L labels, P rows of a class, M all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.calibration import have_probabilities, probabilities, reliability
from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.metrics import (
    LEAST_WORTH,
    About,
    Accuracy,
    Bounds,
    FloatArray,
    MetricKind,
    lacking,
    quotient,
    reference_of,
)
from tunesmith.types import AnswerKind, Metric, Prediction

Truths = NDArray[np.bool_]


@METRICS.register("micro_f1")
class MicroF1:
    """F1 = 2 TP / (predicted + actual) over all labels of all rows together; a row may have several, or none.

    scikit-learn's f1_score(average="micro") of label sets. A row that has no label and is given none does not count.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("label", "text")
    name: ClassVar[str] = "micro_f1"
    about: ClassVar[About] = About(
        "Sokolova and Lapalme 2009, Inf. Process. Manag. 45(4)",
        "own, as scikit-learn's f1_score(average='micro')",
        "several labels a row, each given label counting the same; frequent labels decide it",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return any(p.multi_label and (p.answered or p.expected) for p in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        said, actual = set(prediction.answered), set(prediction.expected)
        return (2.0 * len(said & actual), float(len(said) + len(actual)))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("roc_auc")
class RocAuc:
    """Area under the ROC curve, the mean over classes of each against the rest; ties count one half.

    A row's statistic is the area plus the row's influence on it, from its placement among the rows of the other
    side (DeLong, DeLong and Clarke-Pearson 1988), so that intervals and tests need one pass. Classes that all rows
    have, or none, are left out. There is no interval with fewer than ten rows outside the largest class.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("label",)
    name: ClassVar[str] = "roc_auc"
    about: ClassVar[About] = About(
        "Fawcett 2006, Pattern Recognit. Lett. 27(8)",
        "own, as scikit-learn's roc_auc_score",
        "how well scores order rows, whatever the threshold; with a rare class look at average_precision too",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return have_probabilities(predictions) and len({p.reference for p in predictions}) > 1

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        """One row alone has no rank."""
        return (float("nan"), 1.0, float("nan"))

    def joint_statistics(self, predictions: Sequence[Prediction]) -> FloatArray:
        """As `ranked` gives them. InputError where all rows are of one class, or one has no probabilities."""
        references, answer_N = np.unique([reference_of(p, self.name) for p in predictions], return_inverse=True)
        if len(references) < 2:
            raise InputError(
                f"{self.name} needs rows of two classes, and all of these have {predictions[0].reference!r}",
                f"measure on rows of several classes, or leave {self.name} out of evaluate.metrics",
            )
        shares_NL = [[probabilities(p, self.name).get(label, 0.0) for label in self.labels] for p in predictions]
        apart_N = answer_N != np.bincount(answer_N).argmax()
        return self.ranked(_having([p.expected for p in predictions], self.labels), np.array(shares_NL), apart_N)

    @staticmethod
    def ranked(actual_NL: Truths, scores_NL: FloatArray, apart_N: Truths) -> FloatArray:
        return areas(actual_NL, scores_NL, apart_N)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        rows = int(statistics_NK[:, 2].sum())
        if rows >= LEAST_WORTH:
            return None
        return f"{rows} row{'s' * (rows != 1)} outside the largest class; {LEAST_WORTH} are needed"

    def worth(self, sums_K: FloatArray) -> float:
        """Where all rows are ranked right, what is known of the smaller side is all that is known.

        What ranks no row before another has an area of one half on any rows.
        """
        return math.inf if quotient(sums_K) == 0.5 else float(sums_K[2])


@METRICS.register("average_precision")
class AveragePrecision(RocAuc):
    """Area under the curve of precision over recall, by its steps: the mean over classes of each against the rest.

    Precision at each row of the class, taken from the most probable down, equal probabilities together. A row's
    statistic is the area plus the row's influence on it (the infinitesimal jackknife). Classes that all rows have, or
    none, are left out. There is no interval where a class has fewer than ten rows.
    """

    name: ClassVar[str] = "average_precision"
    about: ClassVar[About] = About(
        "Davis and Goadrich 2006, The Relationship Between Precision-Recall and ROC Curves",
        "own, as scikit-learn's average_precision_score",
        "rare classes: how pure the top of the ranking is; guessing gets the class's share of rows",
    )

    @staticmethod
    def ranked(actual_NL: Truths, scores_NL: FloatArray, apart_N: Truths) -> FloatArray:
        return average_precisions(actual_NL, scores_NL)

    def worth(self, sums_K: FloatArray) -> float:
        return float(sums_K[2])

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        rows = int(statistics_NK[:, 2].sum())
        return None if rows >= LEAST_WORTH else f"a class with {rows} row{'s' * (rows != 1)}; {LEAST_WORTH} are needed"


def average_precisions(actual_NL: Truths, scores_NL: FloatArray) -> FloatArray:
    """[N, 3]: the mean area with the row's influence on it, 1, and whether the row is of the rarest class."""
    count, rows_L = len(actual_NL), actual_NL.sum(axis=0)
    labels_L = np.flatnonzero((rows_L > 0) & (rows_L < count))
    value, influence_N = 0.0, np.zeros(count)
    for label in labels_L:
        positive_N = actual_NL[:, label].astype(np.float64)
        _, place_N, rows_D = np.unique(-scores_NL[:, label], return_inverse=True, return_counts=True)
        hits_D = np.bincount(place_N, weights=positive_N)
        held_D, found_D = np.cumsum(rows_D), np.cumsum(hits_D)  # of all rows, and of the class, down to each score
        precision_D, own = found_D / held_D, rows_L[label]
        area = float((hits_D * precision_D).sum() / own)
        # What a row that joins at each score adds to the precision at its own and at all lower ones, and what it takes.
        adds_D, takes_D = (_onwards(hits_D * at_D) for at_D in (1 / held_D, precision_D / held_D))
        value += area / len(labels_L)
        pull_N = (positive_N * (precision_D - area + adds_D)[place_N] - takes_D[place_N]) / own
        influence_N += pull_N * np.sqrt(own / max(own - 1, 1)) / len(labels_L)
    rarest_N = actual_NL[:, labels_L[rows_L[labels_L].argmin()]]
    return np.column_stack([value + count * influence_N, np.ones(count), rarest_N.astype(np.float64)])


def _onwards(values_D: FloatArray) -> FloatArray:
    """Of each place the sum from there to the end."""
    return np.cumsum(values_D[::-1])[::-1]


def areas(actual_NL: Truths, scores_NL: FloatArray, apart_N: Truths) -> FloatArray:
    """[N, 3]: the mean area with the row's influence on it, 1, and whether the row is `apart` from the largest class.

    `actual_NL`: which rows have which labels.
    """
    count, rows_L = len(actual_NL), actual_NL.sum(axis=0)
    labels_L = np.flatnonzero((rows_L > 0) & (rows_L < count))
    counts_L = rows_L[labels_L]
    area_L, influence_N = np.zeros(len(labels_L)), np.zeros(count)
    for at, label in enumerate(labels_L):
        positive_N, scores_N = actual_NL[:, label], scores_NL[:, label]
        above_P = _placements(scores_N[positive_N], scores_N[~positive_N])
        area_L[at] = above_P.mean()
        influence_N[positive_N] += _deviations(above_P)
        influence_N[~positive_N] -= _deviations(_placements(scores_N[~positive_N], scores_N[positive_N]))
    alone_L = counts_L == 1
    if alone_L.sum() > 1:
        # One row does not show its class's spread; those of all such classes do (collapsed strata, Wolter 2007).
        rows = actual_NL[:, labels_L[alone_L]].argmax(axis=0)
        np.add.at(influence_N, rows, len(rows) * _deviations(area_L[alone_L]))
    value_N = area_L.mean() + influence_N * count / len(labels_L)
    return np.column_stack([value_N, np.ones(count), apart_N.astype(np.float64)])


def _deviations(placements_P: FloatArray) -> FloatArray:
    """Of each from their mean, over their number, scaled so that squares sum to the mean's unbiased variance."""
    count = len(placements_P)
    if count == 1:
        return np.zeros(1)
    return (placements_P - placements_P.mean()) / np.sqrt(count * (count - 1))


def by_class(
    model: str,
    data: str,
    predictions: Sequence[Prediction],
    labels: Sequence[str],
    clusters_N: IntArray | None = None,
) -> list[Metric]:
    """Precision and recall of each class, with Wilson's intervals; n is how many rows were given, or have, the label.

    A class that no answer names has no precision, one that no row has no recall: it has no such record.
    """
    said_NL = _having([p.answered for p in predictions], labels)
    actual_NL = _having([p.expected for p in predictions], labels)
    records: list[Metric] = []
    for at, label in enumerate(labels):
        for metric, chosen_NL in (("precision", said_NL), ("recall", actual_NL)):
            rows = np.flatnonzero(chosen_NL[:, at])
            if not len(rows):
                continue
            right_N2 = np.column_stack([(said_NL & actual_NL)[rows, at], np.ones(len(rows))]).astype(np.float64)
            own = None if clusters_N is None else np.unique(clusters_N[rows], return_inverse=True)[1]
            limits = interval(Accuracy(), right_N2, seed=0, clusters_N=own)
            why = lacking(Accuracy(), right_N2, clusters_N=own)
            records.append(Metric(model, data, metric, *limits, len(rows), f"label={label}", why))
    return records


def confusion(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """How often each label (rows) was answered with each (columns)."""
    place = {label: i for i, label in enumerate(labels)}
    counts_LL: NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for prediction in predictions:
        if prediction.reference in place and prediction.output in place:
            counts_LL[place[prediction.reference], place[prediction.output]] += 1
    return {"labels": list(labels), "counts": counts_LL.tolist()}


def details(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """What a picture of a classifier needs; of no probabilities, the confusion alone; of label sets, the labels.

    A label of several is missing or too many: none of them is taken for another.
    """
    if any(p.multi_label for p in predictions):
        return {"labels": list(labels)}
    found: dict[str, Any] = {"confusion": confusion(predictions, labels)}
    return {**found, "reliability": reliability(predictions)} if have_probabilities(predictions) else found


def _having(sets: Sequence[Sequence[str]], labels: Sequence[str]) -> Truths:
    """[N, L]: which rows have which of the labels."""
    place = {label: i for i, label in enumerate(labels)}
    found_NL: Truths = np.zeros((len(sets), len(labels)), dtype=bool)
    for row, own in enumerate(sets):
        found_NL[row, [place[label] for label in own if label in place]] = True
    return found_NL


def _placements(scores: FloatArray, others: FloatArray) -> FloatArray:
    """For each score the share of the others that lie below it, equal ones counting one half."""
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    return (below + up_to) / (2 * len(others))
