"""Metrics of numbers: how far they are off, and whether they rise and fall with the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy.stats import rankdata

from tunesmith.data.rows import LARGEST
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient
from tunesmith.types import AnswerKind, Prediction

LEAST = 20  # rows of a correlation: of 5 intervals hold 66% to 88%, of 10 91% to 99%, of 20 92% to 97%


def numbers(prediction: Prediction, name: str) -> tuple[float, float]:
    """What was predicted and what was expected. InputError naming the row where one of them is no number."""
    missing = [key for key in ("predicted", "expected") if key not in prediction.scores]
    if missing:
        raise InputError(
            f"{name} needs numbers, and {prediction.where} has none {missing[0]}",
            f"leave {name} out of evaluate.metrics, or give each row a score and choose the objective regress",
        )
    if abs(prediction.scores["expected"]) > LARGEST:
        raise InputError(
            f"{name} cannot be computed with numbers beyond {LARGEST:g}, and that of {prediction.where} is "
            f"{prediction.scores['expected']:g}",
            "give scores in another unit, or leave the row out",
        )
    return prediction.scores["predicted"], prediction.scores["expected"]


def has_numbers(predictions: Sequence[Prediction]) -> bool:
    return all("predicted" in p.scores and "expected" in p.scores for p in predictions)


@METRICS.register("mae")
class MeanAbsoluteError:
    """Mean of |predicted - expected|, in the unit of the scores."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("number",)
    name: ClassVar[str] = "mae"
    about: ClassVar[About] = About(
        "the mean of absolute errors",
        "own, as scikit-learn's mean_absolute_error",
        "numbers, in their own unit; each point of error costs the same",
    )
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "ratio"
    bounds: ClassVar[Bounds] = (0.0, float("inf"))

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        predicted, expected = numbers(prediction, self.name)
        return (abs(predicted - expected), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("rmse")
class RootMeanSquaredError(MeanAbsoluteError):
    """Root of the mean of (predicted - expected)^2, in the unit of the scores: large errors count more."""

    name: ClassVar[str] = "rmse"
    about: ClassVar[About] = About(
        "the root of the mean of squared errors",
        "own, as scikit-learn's root_mean_squared_error",
        "numbers, in their own unit; where one large error is worse than several small ones",
    )

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        predicted, expected = numbers(prediction, self.name)
        return ((predicted - expected) ** 2, 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return np.sqrt(np.maximum(quotient(sums), 0.0))  # limits of a resampled ratio may lie below 0


@METRICS.register("pearson")
class Pearson:
    """Pearson's correlation of predicted and expected numbers; 0 where either does not vary."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("number",)
    name: ClassVar[str] = "pearson"
    about: ClassVar[About] = About(
        "Pearson 1895, Proc. R. Soc. 58",
        "own, as scipy's pearsonr",
        "numbers whose scale is arbitrary: whether they rise and fall together in a line",
    )
    applies = staticmethod(has_numbers)
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (-1.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        x, y = numbers(prediction, self.name)
        return (1.0, x, y, x * x, y * y, x * y)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spread = np.maximum(xx - x * x / count, 0.0) * np.maximum(yy - y * y / count, 0.0)
        # What rounding leaves of numbers that are all alike is no spread.
        varies = spread > 1e-24 * np.maximum(xx * yy, 1e-300)
        found = np.divide(xy - x * y / count, np.sqrt(spread), out=np.zeros_like(spread), where=varies)
        return np.clip(found, -1.0, 1.0)

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        return _too_few(statistics_NK)


@METRICS.register("spearman")
class Spearman:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing theirs; 0 where either does not vary.

    A row's statistic is the correlation plus the row's influence on it, through its own ranks and those of the rows
    it stands before (Borkowf 2002, Comput. Stat. Data Anal. 39(3)).
    """

    name: ClassVar[str] = "spearman"
    about: ClassVar[About] = About(
        "Spearman 1904, Am. J. Psychol. 15(1)",
        "scipy's rankdata; spearmanr",
        "similarity and other scores of which only the order matters",
    )
    applies = staticmethod(has_numbers)
    of: ClassVar[tuple[AnswerKind, ...]] = ("number",)
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (-1.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        """One row alone has no rank."""
        numbers(prediction, self.name)
        return (float("nan"), 1.0)

    def joint_statistics(self, predictions: Sequence[Prediction]) -> FloatArray:
        """[N, 2]"""
        given_N2 = np.array([numbers(p, self.name) for p in predictions])
        u_N, v_N = (rankdata(column_N) / len(column_N) for column_N in given_N2.T)
        u_N, v_N = u_N - u_N.mean(), v_N - v_N.mean()
        spread = float(u_N.std() * v_N.std())
        if not spread:
            return np.column_stack([np.zeros_like(u_N), np.ones_like(u_N)])
        value = float((u_N * v_N).mean()) / spread
        pull_N = (u_N * v_N + _behind(u_N, v_N) + _behind(v_N, u_N)) / spread
        return np.column_stack([value + pull_N - pull_N.mean(), np.ones_like(u_N)])

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        return _too_few(statistics_NK)


def _too_few(statistics_NK: FloatArray) -> str | None:
    """Any two rows lie on a line: of few, a correlation looks certain."""
    rows = len(statistics_NK)
    return (
        None if rows >= LEAST else f"of {rows} row{'s' * (rows != 1)} a correlation tells little, and it takes {LEAST}"
    )


def _behind(rank_N: FloatArray, other_N: FloatArray) -> FloatArray:
    """For each row the mean over all rows of the other rank where theirs is above its own; ties count one half."""
    ranks_M, place_N = np.unique(rank_N, return_inverse=True)
    sums_M = np.bincount(place_N, weights=other_N, minlength=len(ranks_M))
    above_M = sums_M.sum() - np.cumsum(sums_M)
    return (above_M + sums_M / 2)[place_N] / len(rank_N)
