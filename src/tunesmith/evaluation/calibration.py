"""Calibration: what a classifier's probabilities are worth, as a number and as a diagram.

Shape letters: N rows, B bins, K statistics, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from scipy import optimize, special

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction

BINS = 15
DRAWS = 1000
AT_ZERO = 0.7  # by how much a tail is larger at an error of 0; 1, as theory has it, held 92.5% of 200 rows
# Fewer rows than these, and the bins' noise hides the error: of 50 an interval holds up to 99.5%, and a difference of
# 200 or 500 as little as 91%. Bins by rank are of equally few rows: an interval of 200 or 300
# holds 91.5%, of 400 93.4%.
LEAST_ROWS, LEAST_RANKED, LEAST_COMPARED = 200, 400, 1000


@METRICS.register("ece")
class Ece:
    """Expected calibration error: |confidence - accuracy| in 15 equal bins of confidence, weighted by their rows.

    Guo et al. 2017 (1706.04599). Few rows overstate it: noise adds up in every bin. The value is given as everybody
    gives it; the interval is that of the error without the noise, so its lower end may lie further from the value
    than its upper end. There is none with fewer than 200 rows, and no comparison with fewer than 1,000. A row with
    several labels has no one confidence.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("label", "choices")
    name: ClassVar[str] = "ece"
    about: ClassVar[About] = About(
        "Guo et al. 2017, arXiv 1706.04599",
        "own",
        "whether a probability of 0.8 is right in 8 of 10 rows: before thresholds are set on it",
    )
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)
    least: ClassVar[int] = LEAST_ROWS

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return have_probabilities(predictions) and not any(p.multi_label for p in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        confidence = _confidence(prediction, self.name)
        row = [0.0] * (BINS + 1)
        row[_bin(confidence)] = confidence - float(prediction.output == reference_of(prediction, self.name))
        row[BINS] = 1.0
        return tuple(row)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(np.stack([np.abs(sums[..., :BINS]).sum(-1), sums[..., BINS]], axis=-1))

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        needed = LEAST_COMPARED if compared else self.least
        if len(statistics_NK) >= needed:
            return None
        rows = f"{len(statistics_NK)} row{'s' * (len(statistics_NK) != 1)} in {BINS} bins of confidence"
        return f"{rows}; {needed:,} are needed{' to compare' * compared}"

    def limits(self, statistics_NK: FloatArray, seed: int, level: float) -> tuple[float, float] | None:
        """The interval of the error without its noise; None where rows have no spread.

        A normal interval about the value without its bias, except at the lower end: near 0 the bias is
        underestimated, and there the end is the least error whose noisy values reach the observed one in a share of
        draws, with gaps in proportion to those observed (test inversion). The share is (1 - level) / 2 far from 0, and
        more at 0, where only the lower limit can miss (as in Feldman and Cousins 1998, Phys. Rev. D 57).
        """
        gap_B, noise_RB = _noisy(statistics_NK, seed=seed)
        error_B = noise_RB.std(axis=0)
        if not error_B.any():
            return None
        value = float(np.abs(gap_B).sum())
        freed = float(_freed(gap_B, error_B))
        # Their own noise makes the observed gaps too large, and those that have the error without it are too small.
        middle_B = gap_B * (1 + max(0.0, freed) / value) / 2
        high = freed + float(special.ndtri((1 + level) / 2)) * float(_freed(middle_B + noise_RB, error_B).std())
        return min(_least_reaching(value, gap_B, noise_RB, (1 - level) / 2), value), max(high, value)

    def contrast(self, before_NK: FloatArray, after_NK: FloatArray) -> tuple[float, float, float]:
        """The difference of the errors without their noise, and how draws of both models' noise move it.

        The draws keep the correlation of the models' gaps on the same rows, and are about gaps without the size that
        noise gives them. They say how much it varies, and how far from the truth it is on average: near 0 an error
        keeps some of its noise, which two models share where both are there, and not where one is.
        """
        gap_B, noise_RB = _noisy(before_NK, after_NK)
        error_B = noise_RB.std(axis=0)
        freed, moved = np.zeros(2), np.zeros((2, len(noise_RB)))
        for model, own in enumerate((slice(BINS), slice(BINS, None))):
            true_B = _shrunk(gap_B[own], error_B[own])
            freed[model] = _freed(gap_B[own], error_B[own])
            moved[model] = _freed(true_B + noise_RB[:, own], error_B[own]) - np.abs(true_B).sum()
        moved_R = moved[1] - moved[0]
        return float(freed[1] - freed[0]), float(moved_R.std()), float(moved_R.mean())


@METRICS.register("adaptive_ece")
class AdaptiveEce(Ece):
    """The same error in 15 bins of equally many rows, so that no bin is of a few rows and none of nearly all.

    Nguyen and O'Connor 2015. Rows of one confidence are parted in their order. Value, interval and comparison are as
    for `ece`, but there is no interval with fewer than 400 rows; the limits of the bins are taken as given.
    """

    name: ClassVar[str] = "adaptive_ece"
    about: ClassVar[About] = About(
        "Nguyen and O'Connor 2015, arXiv 1508.05154",
        "own",
        "as ece, where nearly all answers are given with nearly the same confidence",
    )
    least: ClassVar[int] = LEAST_RANKED

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        """One row alone has no rank."""
        return (float("nan"),) * (BINS + 1)

    def joint_statistics(self, predictions: Sequence[Prediction]) -> FloatArray:
        confidence_N = np.array([_confidence(p, self.name) for p in predictions])
        right_N = np.array([p.output == reference_of(p, self.name) for p in predictions])
        count = len(predictions)
        bin_N = np.empty(count, dtype=np.int64)
        bin_N[confidence_N.argsort(kind="stable")] = np.arange(count) * BINS // count
        table_NK = np.zeros((count, BINS + 1))
        table_NK[np.arange(count), bin_N] = confidence_N - right_N
        table_NK[:, BINS] = 1.0
        return table_NK


@METRICS.register("brier")
class Brier:
    """Squared distance of the probabilities from the label's: sum_v (p_v - [v = label])^2, the mean over rows.

    Between 0 and 2, as Brier 1950 has it; of two classes it is twice scikit-learn's brier_score_loss. A label that
    training never saw has the probability 0.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("label", "choices")
    name: ClassVar[str] = "brier"
    about: ClassVar[About] = About(
        "Brier 1950, Mon. Weather Rev. 78(1)",
        "own",
        "accuracy and calibration in one number that no few rows overstate; what a proper score of probabilities is",
    )
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 2.0)

    applies = staticmethod(Ece.applies)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        _confidence(prediction, self.name)  # refuses what has no one label
        shares = probabilities(prediction, self.name)
        own = shares.get(reference_of(prediction, self.name), 0.0)
        return (sum(share * share for share in shares.values()) - 2 * own + 1, 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


def _noisy(*tables: FloatArray, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Gaps of the tables' bins, side by side, and draws [R, B] of their normal noise.

    A gap is the confidence above the accuracy, weighted by the bin's share of rows; a bin without a row has no noise.
    """
    gaps: list[FloatArray] = []
    residuals: list[FloatArray] = []
    for table_NK in tables:
        total = float(table_NK[:, BINS].sum())
        gap_B = table_NK[:, :BINS].sum(axis=0) / total
        used_B = np.any(table_NK[:, :BINS] != 0, axis=0)
        gaps.append(gap_B)
        residuals.append((table_NK[:, :BINS] - table_NK[:, BINS:] * gap_B) * used_B / total)
    residual_NB = np.hstack(residuals)
    count = len(residual_NB)
    covariance_BB = residual_NB.T @ residual_NB * count / max(count - 1, 1)
    variance_B, axes_BB = np.linalg.eigh(covariance_BB)
    standard_RB = np.random.default_rng(seed).normal(size=(DRAWS, len(variance_B)))
    return np.concatenate(gaps), standard_RB @ (axes_BB * np.sqrt(np.maximum(variance_B, 0))).T


def _freed(gap_B: FloatArray, error_B: FloatArray) -> FloatArray:
    """The error without what noise adds: the mean of each bin's folded normal (Leone et al. 1961) above its own."""
    error_B = np.where(error_B > 0, error_B, 1e-12)
    far_B = gap_B / error_B
    folded_B = error_B * math.sqrt(2 / math.pi) * np.exp(-(far_B**2) / 2) + gap_B * special.erf(far_B / math.sqrt(2))
    return (2 * np.abs(gap_B) - folded_B).sum(axis=-1)


def _shrunk(gap_B: FloatArray, error_B: FloatArray) -> FloatArray:
    """Gaps in proportion to these whose squares sum to what is left without the noise's, as James and Stein's do."""
    squares = float(gap_B @ gap_B)
    return gap_B * math.sqrt(max(0.0, 1 - float(error_B @ error_B) / squares)) if squares else gap_B


def _least_reaching(value: float, gap_B: FloatArray, noise_RB: FloatArray, tail: float) -> float:
    """The least error whose noisy values are above `value` in a share `tail` of draws, and in more near an error of 0.

    Near: as far as the error that noise alone gives.
    """
    direction_B, noise = gap_B / value, float(np.abs(noise_RB).sum(axis=1).mean())

    def above(error: float) -> float:
        share = tail * (1 + AT_ZERO * max(0.0, 1 - error / noise))
        return float(np.quantile(np.abs(error * direction_B + noise_RB).sum(axis=1), 1 - share)) - value

    if above(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(above, 0.0, value, xtol=1e-6)) if above(value) > 0 else value  # type: ignore[arg-type]


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


def have_probabilities(predictions: Sequence[Prediction]) -> bool:
    """Whether every row has a reference, and a probability for each label."""
    return all(p.probabilities is not None and p.reference is not None for p in predictions)


def probabilities(prediction: Prediction, metric: str) -> Mapping[str, float]:
    """Of each label; InputError naming the row if it has none."""
    if prediction.probabilities is None:
        raise InputError(
            f"{metric} needs the probability of each label, and the answer to {prediction.where} has none",
            f"leave {metric} out of evaluate.metrics: this objective's answers carry no probabilities",
        )
    return prediction.probabilities


def _confidence(prediction: Prediction, metric: str) -> float:
    """The probability of what was answered; InputError of a row that may have several labels."""
    if prediction.multi_label:
        raise InputError(
            f"{metric} needs one label a row, and {prediction.where} may have several",
            f"leave {metric} out of evaluate.metrics",
        )
    return probabilities(prediction, metric).get(prediction.output, 0.0)


def _bin(confidence: float) -> int:
    """Bins are open below and closed above, as those of Guo et al.; 0 is in the first."""
    return min(BINS - 1, max(0, int(np.ceil(confidence * BINS)) - 1))
