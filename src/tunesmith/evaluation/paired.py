"""Two models on the same rows: how far apart they are, whether that is chance, and how many rows would tell.

Which test serves which metric, and its false alarms and power by simulation, stand in docs/statistics.md.
Shape letters: N rows (or clusters), K statistics, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from tunesmith.errors import InputError
from tunesmith.evaluation import power
from tunesmith.evaluation.intervals import (
    BLOCK,
    NONE,
    IntArray,
    Limits,
    clustered,
    degrees_of_freedom,
    influence,
    interval,
    is_share,
    paired_rate,
    percentile,
    slope,
    square_and_add,
    studentised,
    value_of,
)
from tunesmith.evaluation.metrics import Biased, FloatArray, Joint, Renamed, RowMetric, Weighed, lacking, statistics
from tunesmith.types import Prediction

LEVEL = 0.95
SWAPS = 10_000
ALIKE = "no interval: the answers to all rows are equally good, and nothing bounds how far those to others are apart"
RANKED_TOGETHER = (
    0.7  # of the degrees of freedom are left to two models' ranks: with 0.75 20 rows of a class hold 93.3%
)


@dataclass(frozen=True, slots=True)
class Effect:
    """After minus before on the same rows, with its 95% interval and a two-sided p-value.

    Where the rows cannot carry these, they are NaN and `reason` says why.
    """

    difference: float
    low: float
    high: float
    p: float
    reason: str | None = None

    @property
    def tested(self) -> bool:
        return not math.isnan(self.p)


class Pairing(Protocol):
    """Two models on the same rows by one metric. `units` are rows, or clusters of them."""

    @property
    def difference(self) -> float: ...
    @property
    def units(self) -> int: ...
    @property
    def reason(self) -> str | None:
        """Why there is no interval and no test; None where there are."""
        ...

    def limits(self, seed: int, resamples: int) -> Limits: ...
    def p(self, seed: int, swaps: int = SWAPS) -> float: ...
    def units_needed(self, level: float) -> int | None:
        """With how many the difference seen would be found at `level` in at least 4 of 5 repetitions; None if never."""
        ...

    def detectable(self, level: float) -> float | None:
        """The smallest difference that would be found so with as many as there are; None if there are too few."""
        ...


def compare(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    metric: RowMetric,
    seed: int,
    resamples: int = 2000,
    clusters_N: IntArray | None = None,
) -> Effect:
    """The effect of `after` in place of `before` over the same rows in the same order; InputError if they are not.

    The interval always holds the difference. One row says nothing of the spread; rows that all agree have none.
    """
    return effect(pair(before, after, metric, clusters_N), metric, seed, resamples)


def pair(
    before: Sequence[Prediction], after: Sequence[Prediction], metric: RowMetric, clusters_N: IntArray | None = None
) -> Pairing:
    """The two models' rows side by side, as the metric's kind needs them. Rows of one cluster stay together."""
    _same_rows(before, after)
    return side_by_side(metric, statistics(metric, before), statistics(metric, after), clusters_N)


def side_by_side(
    metric: RowMetric, before_NK: FloatArray, after_NK: FloatArray, clusters_N: IntArray | None = None
) -> Pairing:
    """`pair` of the rows' statistics."""
    tables = (before_NK, after_NK)
    reason = next(
        filter(None, (lacking(metric, table, compared=True, clusters_N=clusters_N) for table in tables)), None
    )
    if reason is not None:
        units = len(before_NK) if clusters_N is None else int(clusters_N.max()) + 1
        return _Silent(value_of(metric, after_NK) - value_of(metric, before_NK), units, reason)
    if clusters_N is not None:
        before_NK, after_NK = clustered(before_NK, clusters_N), clustered(after_NK, clusters_N)
    if not is_share(metric) and len(before_NK) > 1 and np.array_equal(before_NK, after_NK):
        return _Silent(0.0, len(before_NK), ALIKE)
    if metric.kind == "rate" and clusters_N is None:
        return _Rates.of(before_NK, after_NK)
    if metric.kind != "general" and np.array_equal(before_NK[:, 1], after_NK[:, 1]):
        return _Means.of(metric, before_NK, after_NK)
    return _Smooth.of(metric, before_NK, after_NK)


def effect(pairing: Pairing, metric: RowMetric, seed: int, resamples: int = 2000) -> Effect:
    """The difference with its interval and p-value, repeatable by its seed."""
    difference, span = pairing.difference, metric.bounds[1] - metric.bounds[0]
    if pairing.reason is not None:
        return Effect(difference, *NONE, math.nan, pairing.reason)
    if pairing.units == 1:
        return Effect(difference, -span, span, 1.0)
    low, high = pairing.limits(seed, resamples)
    low, high = max(min(low, difference), -span), min(max(high, difference), span)
    return Effect(difference, low, high, pairing.p(seed))


@dataclass(frozen=True, slots=True)
class _Silent:
    """Rows that show a difference and not how certain it is."""

    difference: float
    units: int
    reason: str | None

    def limits(self, seed: int, resamples: int) -> Limits:
        return NONE

    def p(self, seed: int, swaps: int = SWAPS) -> float:
        return math.nan

    def units_needed(self, level: float) -> int | None:
        return None

    def detectable(self, level: float) -> float | None:
        return None


@dataclass(frozen=True, slots=True)
class _Rates:
    """Rows that are right or wrong: only those that changed say anything."""

    gained: int
    lost: int
    units: int
    reason: str | None = None

    @staticmethod
    def of(before_N2: FloatArray, after_N2: FloatArray) -> _Rates:
        change_N = after_N2[:, 0] - before_N2[:, 0]
        return _Rates(int((change_N > 0).sum()), int((change_N < 0).sum()), len(change_N))

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.units

    def limits(self, seed: int, resamples: int) -> Limits:
        return paired_rate(self.gained, self.lost, self.units, LEVEL)

    def p(self, seed: int, swaps: int = SWAPS) -> float:
        return mcnemar(self.gained, self.lost)

    def units_needed(self, level: float) -> int | None:
        return power.rows_for_rate(self.gained / self.units, self.lost / self.units, level)

    def detectable(self, level: float) -> float | None:
        return power.detectable_rate((self.gained + self.lost) / self.units, self.units, level)


@dataclass(frozen=True, slots=True)
class _Means:
    """A mean, or a ratio whose denominator is the rows' own (tokens): its difference is one too.

    Tested by approximate randomisation (Noreen 1989): the models' answers to each row are swapped at random, so the
    sign of its change is, which is what McNemar's test enumerates. Perplexity is a function of such a ratio: it is
    tested as the loss is.
    """

    metric: RowMetric
    before_NK: FloatArray
    after_NK: FloatArray
    change_N: FloatArray
    difference: float
    reason: str | None = None

    @staticmethod
    def of(metric: RowMetric, before_NK: FloatArray, after_NK: FloatArray) -> _Means:
        # Scaled so that the changes' mean is the change of the ratio.
        change_N = (after_NK[:, 0] - before_NK[:, 0]) * len(before_NK) / float(before_NK[:, 1].sum())
        difference = value_of(metric, after_NK) - value_of(metric, before_NK)
        return _Means(metric, before_NK, after_NK, change_N, difference)

    @property
    def units(self) -> int:
        return len(self.change_N)

    def limits(self, seed: int, resamples: int) -> Limits:
        base_N = self.before_NK[:, 1]
        # Perplexity's difference is no ratio.
        linear = math.isclose(self.difference, float(self.change_N.mean()), rel_tol=1e-9)
        if self.metric.kind == "ratio" and np.ptp(base_N) > 0 and linear:
            change_N2 = np.column_stack([self.after_NK[:, 0] - self.before_NK[:, 0], base_N])
            limits = studentised(change_N2, seed, LEVEL, resamples)
            if limits is not None:
                return limits
        width = self.before_NK.shape[1]

        def difference(sums: FloatArray) -> FloatArray:
            return self.metric.aggregate(sums[..., width:]) - self.metric.aggregate(sums[..., :width])

        both_NK = np.hstack([self.before_NK, self.after_NK])
        limits = percentile(difference, both_NK, seed, LEVEL, resamples)
        return limits or _as_unchanged(self.metric, self.difference, self.units)

    def p(self, seed: int, swaps: int = SWAPS) -> float:
        return _randomisation(self.change_N, seed, swaps)

    def units_needed(self, level: float) -> int | None:
        return power.rows_for_mean(float(self.change_N.mean()), power.Spread.of(self.change_N), level)

    def detectable(self, level: float) -> float | None:
        found = power.detectable_mean(power.Spread.of(self.change_N), self.units, level)
        if found is None:
            return None
        total = self.before_NK[:, 1].sum()
        from_, to = self.before_NK[:, 0].sum(), self.before_NK[:, 0].sum() + found * total
        return abs(float(np.diff(self.metric.aggregate(np.array([[from_, total], [to, total]])))[0]))


@dataclass(frozen=True, slots=True)
class _Smooth:
    """Any other smooth function of sums, by how each row pulls each model's value (the jackknife).

    Student's t with degrees of freedom after the pulls' kurtosis. Of many classes with few rows the jackknife's
    variance is too large (it never is too small on average: Efron and Stein 1981), and the infinitesimal jackknife's
    as much too small, for the only row of a class has no slope: the mean of both is taken.
    Swapped answers would not do: they test whether the models are alike in everything, and for two of equal ECE, one
    timid and one bold, found a difference in a third of all samples. Ranks have limits of their own (`ends`): near 1
    a difference is lopsided, and a few rows of a class that both models rank right show no spread. Rows that the
    models answer alike are judged as those of a rate.

    `drift`: by how much a difference without its bias still lies too high; the limit on that side gives way.
    """

    difference: float
    corrected: float
    error: float
    change_N: FloatArray
    ends: Limits | None
    freedom: float
    drift: float = 0.0
    reason: str | None = None

    @staticmethod
    def of(metric: RowMetric, before_NK: FloatArray, after_NK: FloatArray) -> _Smooth:
        difference, units = value_of(metric, after_NK) - value_of(metric, before_NK), len(before_NK)
        if units == 1:
            return _Smooth(difference, difference, 0.0, np.zeros(1), None, 1.0)
        before_N, after_N = (influence(metric, table)[0] for table in (before_NK, after_NK))
        change_N = after_N - before_N
        if isinstance(metric, Biased):
            corrected, error, drift = metric.contrast(before_NK, after_NK)
            return _Smooth(difference, corrected, error, change_N, None, math.inf, drift)
        ends = None
        if isinstance(metric, Joint):
            spread = math.sqrt(float(before_N @ before_N) * float(after_N @ after_N))
            correlation = float(before_N @ after_N) / spread if spread else 0.0
            together = RANKED_TOGETHER * _together(before_N, after_N)
            before, after = (interval(metric, table, 0, freedom=together) for table in (before_NK, after_NK))
            ends = square_and_add(before, after, correlation)
        squares, slope_N = float(change_N @ change_N), slope(metric, after_NK) - slope(metric, before_NK)
        if squares:
            change_N = change_N * math.sqrt((squares + float(slope_N @ slope_N)) / (2 * squares))
        error = math.sqrt(float(change_N @ change_N) / (units * (units - 1)))
        error = error if error > 1e-12 else 0.0  # what rounding leaves of rows that all agree
        if not error and (not isinstance(metric, Joint) or np.array_equal(before_NK, after_NK)):
            worth = metric.worth(after_NK.sum(axis=0)) if isinstance(metric, Weighed) else units
            ends = _as_unchanged(metric, difference, min(units, worth)) if math.isfinite(worth) else (0.0, 0.0)
        return _Smooth(difference, difference, error, change_N, ends, degrees_of_freedom(change_N))

    @property
    def units(self) -> int:
        return len(self.change_N)

    def limits(self, seed: int, resamples: int) -> Limits:
        if self.ends is not None:
            return self.ends
        far = float(special.stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return self.corrected - max(self.drift, 0.0) - far, self.corrected - min(self.drift, 0.0) + far

    def p(self, seed: int, swaps: int = SWAPS) -> float:
        if not self.error:
            return 1.0 if abs(self.corrected) <= 1e-12 else _fewest(self.units)
        away = abs(self.corrected) - max(0.0, math.copysign(self.drift, self.corrected * self.drift))
        return 2 * float(special.stdtr(self.freedom, -max(0.0, away) / self.error))

    def units_needed(self, level: float) -> int | None:
        return power.rows_for_mean(self.corrected, power.Spread.of(self.change_N), level)

    def detectable(self, level: float) -> float | None:
        return power.detectable_mean(power.Spread.of(self.change_N), self.units, level)


def _as_unchanged(metric: RowMetric, difference: float, rows: float) -> Limits:
    """Of rows that change alike: as far from the difference as a rate of so many may lie, none of which changed."""
    if not is_share(metric):
        return difference, difference
    span = metric.bounds[1] - metric.bounds[0]
    low, high = paired_rate(0, 0, math.floor(rows), LEVEL)
    return difference + low * span, difference + high * span


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: of the rows that changed, as many each way but for chance. McNemar 1947."""
    changed = gained + lost
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests: where they are below 5%, so is the chance of any false alarm. Holm 1979.

    The smallest p-value is multiplied by the number of tests, the next by one less, and so on; none becomes smaller
    than one before it.
    """
    tests = len(p_values)
    adjusted, highest = [1.0] * tests, 0.0
    for rank, index in enumerate(sorted(range(tests), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (tests - rank)))
        adjusted[index] = highest
    return adjusted


def hypothesis(metric: RowMetric) -> str:
    """The name under which a metric is tested: perplexity is equal where the loss is, so both are one test."""
    return metric.tested_as if isinstance(metric, Renamed) else metric.name


def _same_rows(before: Sequence[Prediction], after: Sequence[Prediction]) -> None:
    remedy = "predict both models on the same test set, in the same order"
    if len(before) != len(after):
        raise InputError(f"the models are compared on {len(before)} and {len(after)} rows", remedy)
    for one, other in zip(before, after, strict=True):
        if (one.where, one.reference) != (other.where, other.reference):
            raise InputError(f"the models are compared on different rows: {one.where} and {other.where}", remedy)


def _randomisation(change_N: FloatArray, seed: int, swaps: int) -> float:
    """Share of random signs whose sum is at least as far from 0; the observed one counts as one."""
    # Signs that give the same sum in another order must count as equal.
    observed = abs(float(change_N.sum())) - 1e-9 * float(np.abs(change_N).sum())
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK // len(change_N))
    at_least = 0
    for start in range(0, swaps, size):
        rows = min(size, swaps - start)
        signs_RN = rng.integers(0, 2, size=(rows, len(change_N)), dtype=np.int8) * 2.0 - 1.0
        at_least += int((np.abs(signs_RN @ change_N) >= observed).sum())
    return (1 + at_least) / (1 + swaps)


def _together(before_N: FloatArray, after_N: FloatArray) -> float:
    """Degrees of freedom of the sum of both models' variances. Satterthwaite 1946."""
    first, second = float(before_N @ before_N), float(after_N @ after_N)
    if not first + second:
        return len(before_N) - 1.0
    share = first / (first + second)
    return 1 / (share**2 / degrees_of_freedom(before_N) + (1 - share) ** 2 / degrees_of_freedom(after_N))


def _fewest(units: int) -> float:
    """The smallest p-value of swapped answers: of 2^n ways, two are as extreme."""
    return min(1.0, 2.0 ** (1 - units))
