"""What the counts of each class tell beside F1: recall, precision, and how labels and references correlate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.class_metrics import MicroF1, Truths
from tunesmith.evaluation.intervals import effective_rows, wilson
from tunesmith.evaluation.metrics import LEAST_WORTH, About, Bounds, ClassCounts, FloatArray
from tunesmith.types import Prediction

LEAST_SHARES_COMPARED = 40  # with 8 of 80 rows in one of two classes a difference holds 91%
SOKOLOVA = "Sokolova and Lapalme 2009, Inf. Process. Manag. 45(4)"


class _ClassShares(ClassCounts):
    """Mean over classes of the share of right ones among a class's rows, or among its answers (`counted`)."""

    least: ClassVar[tuple[int, int]] = (LEAST_WORTH, LEAST_SHARES_COMPARED)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        share_L, held_L = self._shares(sums)
        classes = held_L.sum(axis=-1).astype(np.float64)
        return np.divide(share_L.sum(axis=-1), classes, out=np.full(classes.shape, np.nan), where=classes > 0)

    def limits(self, statistics_NK: FloatArray, seed: int, level: float) -> tuple[float, float]:
        """Wilson's for as many rows of a rate as would be as uncertain, by each class's own rows.

        A class's variance is that after Laplace's prior, and the rate's that after Jeffreys': the jackknife sees no
        uncertainty in a class whose few rows are all right. Of sources, a class has as many rows as they are worth.
        """
        sums_K = statistics_NK.sum(axis=0)
        labels_H = np.flatnonzero(self._shares(sums_K)[1])
        right_H, worth_H = np.zeros(len(labels_H)), np.zeros(len(labels_H))
        for at, label in enumerate(labels_H):
            own_N2 = np.stack([self.counts(statistics_NK)[which][:, label] for which in (0, self.counted[0])], axis=1)
            hits, rows = own_N2.sum(axis=0)
            own_N2 = own_N2[own_N2[:, 1] > 0]
            worth_H[at] = effective_rows(own_N2) if rows > len(own_N2) else max(rows, 1.0)
            right_H[at] = hits / max(rows, 1.0) * worth_H[at]
        share_H, middle = (right_H + 1) / (worth_H + 2), float(((right_H + 0.5) / (worth_H + 1)).mean())
        variance = float((share_H * (1 - share_H) / worth_H).sum()) / len(labels_H) ** 2
        worth = middle * (1 - middle) / variance
        return wilson(float(self.aggregate(sums_K)) * worth, worth, level)

    def _shares(self, sums: FloatArray) -> tuple[FloatArray, Truths]:
        """Of each class, 0 where there is nothing to share; and whether the class counts."""
        counts = self.counts(sums)
        hits, of = counts[0], counts[self.counted[0]]
        return np.divide(hits, of, out=np.zeros_like(hits), where=of > 0), counts[1] + counts[2] > 0


@METRICS.register("macro_recall")
class MacroRecall(_ClassShares):
    """Mean over classes of the share of the class's rows that are found, each class counting the same.

    A class that is only predicted counts 0; classes that neither references nor predictions hold are left out.
    """

    name: ClassVar[str] = "macro_recall"
    about: ClassVar[About] = About(
        SOKOLOVA,
        "own, as scikit-learn's recall_score(average='macro')",
        "classes of unlike size, where those missed are what costs",
    )


@METRICS.register("balanced_accuracy")
class BalancedAccuracy(_ClassShares):
    """Mean recall of the classes that have rows: what accuracy would be, were all classes equally frequent."""

    name: ClassVar[str] = "balanced_accuracy"
    about: ClassVar[About] = About(
        "Brodersen et al. 2010, The Balanced Accuracy and Its Posterior Distribution",
        "own, as scikit-learn's balanced_accuracy_score",
        "one label a row and classes of unlike size; guessing gets one by the number of classes",
    )

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return have_one_label(predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return super().statistics(one_label(prediction, self.name))

    def _shares(self, sums: FloatArray) -> tuple[FloatArray, Truths]:
        return super()._shares(sums)[0], self.counts(sums)[2] > 0


@METRICS.register("macro_precision")
class MacroPrecision(_ClassShares):
    """Mean over classes of the share of a class's answers that are right, each class counting the same.

    A class that no row is given counts 0; classes that neither references nor predictions hold are left out.
    """

    name: ClassVar[str] = "macro_precision"
    about: ClassVar[About] = About(
        SOKOLOVA,
        "own, as scikit-learn's precision_score(average='macro')",
        "classes of unlike size, where false alarms are what costs",
    )
    majority_is_no_floor: ClassVar[bool] = True
    counted: ClassVar[tuple[int, str]] = (1, "an answer")


@METRICS.register("mcc")
class MatthewsCorrelation(ClassCounts):
    """Matthews' correlation of labels and references, of any number of classes; 0 where either does not vary.

    Answers that are no label are one more class. There is no interval with fewer than ten rows outside the largest
    class.
    """

    name: ClassVar[str] = "mcc"
    bounds: ClassVar[Bounds] = (-1.0, 1.0)
    about: ClassVar[About] = About(
        "Matthews 1975, Biochim. Biophys. Acta 405(2); Gorodkin 2004, Comput. Biol. Chem. 28(5-6)",
        "own, as scikit-learn's matthews_corrcoef",
        "one number for a whole confusion matrix, high only where every class is well answered; guesses get 0",
    )

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return have_one_label(predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return super().statistics(one_label(prediction, self.name))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        hits, predicted, actual = self.counts(sums)
        rows = actual.sum(-1)
        other = rows - predicted.sum(-1)  # answers that are no label
        covariance = hits.sum(-1) * rows - (predicted * actual).sum(-1)
        spread = (rows**2 - (predicted**2).sum(-1) - other**2) * (rows**2 - (actual**2).sum(-1))
        varies = spread > 1e-12 * rows**4
        found = np.divide(covariance, np.sqrt(np.where(varies, spread, 1.0)), out=np.zeros_like(rows), where=varies)
        return np.clip(found, -1.0, 1.0)

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        actual_L = self.counts(statistics_NK.sum(axis=0))[2]
        apart = int(actual_L.sum() - actual_L.max())
        if apart >= LEAST_WORTH:
            return None
        return f"{apart} row{'s' * (apart != 1)} outside the largest class; {LEAST_WORTH} are needed"


@METRICS.register("micro_precision")
class MicroPrecision(MicroF1):
    """The share of given labels that are right, over all rows together; of one label a row it is the accuracy.

    0 where no label is given.
    """

    name: ClassVar[str] = "micro_precision"
    about: ClassVar[About] = About(
        SOKOLOVA,
        "own, as scikit-learn's precision_score(average='micro')",
        "several labels a row, where labels given wrongly are what costs",
    )

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        both, _ = super().statistics(prediction)
        return (both / 2, float(len(set(prediction.answered))))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return np.nan_to_num(super().aggregate(sums))


@METRICS.register("micro_recall")
class MicroRecall(MicroF1):
    """The share of true labels that are given, over all rows together; of one label a row it is the accuracy."""

    name: ClassVar[str] = "micro_recall"
    about: ClassVar[About] = About(
        SOKOLOVA,
        "own, as scikit-learn's recall_score(average='micro')",
        "several labels a row, where labels that are missing are what costs",
    )

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        both, _ = super().statistics(prediction)
        return (both / 2, float(len(set(prediction.expected))))


def one_label(prediction: Prediction, metric: str) -> Prediction:
    """The same; InputError of a row that may have several labels."""
    if prediction.multi_label:
        raise InputError(
            f"{metric} is of one label a row, and {prediction.where} may have several",
            f"leave {metric} out of evaluate.metrics; micro_f1 and macro_f1 are of several",
        )
    return prediction


def have_one_label(predictions: Sequence[Prediction]) -> bool:
    return ClassCounts.applies(predictions) and not any(p.multi_label for p in predictions)
