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
from tunesmith.evaluation.intervals import degrees_of_freedom
from tunesmith.evaluation.metrics import Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import Prediction

BINS = 15
DRAWS = 1000


@METRICS.register("ece")
class Ece:
    """Expected calibration error: |confidence - accuracy| in 15 equal bins of confidence, weighted by their rows.

    Guo et al. 2017 (1706.04599). Few rows overstate it: noise adds up in every bin. The value is given as everybody
    gives it; the interval is that of the error without the noise, so its lower end may lie further from the value
    than its upper end. With fewer than about five wrong (or right) answers it is too narrow.
    """

    name: ClassVar[str] = "ece"
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return have_probabilities(predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        confidence = _confidence(prediction, self.name)
        row = [0.0] * (BINS + 1)
        row[_bin(confidence)] = confidence - float(prediction.output == reference_of(prediction, self.name))
        row[BINS] = 1.0
        return tuple(row)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(np.stack([np.abs(sums[..., :BINS]).sum(-1), sums[..., BINS]], axis=-1))

    def bias(self, statistics_NK: FloatArray) -> float:
        """What noise adds: the mean of each bin's folded normal (Leone et al. 1961) above its absolute mean."""
        gap_B, error_B = _gaps(statistics_NK)
        seen_B = error_B > 0
        gap_B, error_B = gap_B[seen_B], error_B[seen_B]
        far_B = gap_B / error_B
        folded_B = error_B * math.sqrt(2 / math.pi) * np.exp(-(far_B**2) / 2) + gap_B * special.erf(
            far_B / math.sqrt(2)
        )
        return float((folded_B - np.abs(gap_B)).sum())

    def limits(self, statistics_NK: FloatArray, seed: int, level: float) -> tuple[float, float] | None:
        """The interval of the error without its noise; None where rows have no spread.

        A normal interval about the value without its bias, except at the lower end: near 0 the bias is
        underestimated, and there the end is the least error whose noisy values reach the observed one in
        (1 - level) / 2 of draws, with gaps in proportion to those observed (test inversion).
        """
        gap_B, error_B = _gaps(statistics_NK)
        if not error_B.any():
            return None
        count, value = len(statistics_NK), float(np.abs(gap_B).sum())
        pull_N = statistics_NK[:, :BINS] @ np.sign(gap_B) - value * statistics_NK[:, BINS]
        error = math.sqrt(count / (count - 1) * float(pull_N @ pull_N)) / float(statistics_NK[:, BINS].sum())
        far = float(special.stdtrit(degrees_of_freedom(pull_N), (1 + level) / 2))
        high = value - self.bias(statistics_NK) + far * error
        # As many degrees of freedom for the draws: a normal that is wider.
        wider = far / float(special.ndtri((1 + level) / 2))
        noise_RB = np.random.default_rng(seed).normal(size=(DRAWS, BINS)) * error_B * wider
        return min(_least_reaching(value, gap_B, noise_RB, (1 + level) / 2), value), max(high, value)


def _gaps(statistics_NK: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Of each bin the confidence above the accuracy, weighted by its share of rows [B], and its standard error [B]."""
    count, rows_N = len(statistics_NK), statistics_NK[:, BINS]
    total = float(rows_N.sum())
    gap_B = statistics_NK[:, :BINS].sum(axis=0) / total
    residual_NB = statistics_NK[:, :BINS] - rows_N[:, None] * gap_B
    # A bin without a row has no gap and no noise.
    used_B = np.any(statistics_NK[:, :BINS] != 0, axis=0)
    error_B = np.sqrt(count / max(count - 1, 1) * (residual_NB**2).sum(axis=0)) / total
    return gap_B, np.where(used_B, error_B, 0.0)


def _least_reaching(value: float, gap_B: FloatArray, noise_RB: FloatArray, share: float) -> float:
    """The least error of which `share` of the noisy values stay at or below `value`; 0 if that of none do."""
    direction_B = gap_B / value

    def above(error: float) -> float:
        return float(np.quantile(np.abs(error * direction_B + noise_RB).sum(axis=1), share)) - value

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
    """The probability of what was answered."""
    return probabilities(prediction, metric).get(prediction.output, 0.0)


def _bin(confidence: float) -> int:
    """Bins are open below and closed above, as those of Guo et al.; 0 is in the first."""
    return min(BINS - 1, max(0, int(np.ceil(confidence * BINS)) - 1))
