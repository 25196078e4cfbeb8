"""How many rows would settle a comparison, and how small a difference the rows at hand could show.

Both are for a two-sided test that finds the difference in at least 4 of 5 repetitions (power 0.8), from how the rows
differ between the two models. benchmarks/error_bars.py runs the tests themselves at the sizes given here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from tunesmith.evaluation.metrics import FloatArray

LEVEL = 0.05
POWER = 0.88  # by these formulas, so that 0.8 is left where they promise too much: up to 7 points, with many classes
MOST_ROWS = 10_000_000  # a test set beyond it is no advice
_FAR = 35.0  # a noncentrality at which any test of enough rows finds the effect


@dataclass(frozen=True, slots=True)
class Spread:
    """How much rows differ between two models: the standard deviation of the per-row difference, and its kurtosis."""

    deviation: float
    kurtosis: float

    @staticmethod
    def of(change_N: FloatArray) -> Spread:
        """Of at least two rows; the kurtosis of a normal is 3, and is taken where all rows agree."""
        centred_N = change_N - change_N.mean()
        squares_N = centred_N**2
        variance = float(squares_N.mean())
        if variance <= 1e-24 * float(np.square(change_N).mean()):  # what rounding leaves of equal differences
            return Spread(0.0, 3.0)
        count = len(change_N)
        return Spread(math.sqrt(variance * count / (count - 1)), float((squares_N**2).mean()) / variance**2)


def least_rows(level: float) -> int:
    """Fewer rows cannot reach `level` even if all agree: of 2^n ways to swap them, two are as extreme."""
    return math.ceil(1 + math.log2(1 / level))


def mean_power(difference: float, spread: Spread, count: int, level: float = LEVEL) -> float:
    """Power of a paired test of means: that of Student's t, whose degrees of freedom fall with the rows' kurtosis.

    A variance estimated from n rows of kurtosis k varies as one with 2n / (k - 1) degrees of freedom (Satterthwaite);
    where few rows carry the difference, n - 1 would promise too much.
    """
    if count < least_rows(level):
        return 0.0
    if not spread.deviation:
        return float(difference != 0)
    return _noncentral(min(abs(difference) / spread.deviation * math.sqrt(count), _FAR), spread, count, level)


def rows_for_mean(difference: float, spread: Spread, level: float = LEVEL) -> int | None:
    """The least n with `POWER` for a mean difference; None if that is above ten million rows."""
    return _least(lambda count: mean_power(difference, spread, count, level), least_rows(level))


def detectable_mean(spread: Spread, count: int, level: float = LEVEL) -> float | None:
    """The smallest mean difference found with `POWER` in n rows; None where too few, or all alike, say none."""
    if count < least_rows(level) or not spread.deviation or _noncentral(_FAR, spread, count, level) < POWER:
        return None

    def gap(far: float) -> float:
        return _noncentral(far, spread, count, level) - POWER

    found = optimize.brentq(gap, 0.0, _FAR)
    return float(found) * spread.deviation / math.sqrt(count)  # type: ignore[arg-type]


def mcnemar_power(gained: float, lost: float, count: int, level: float = LEVEL) -> float:
    """Power of McNemar's exact test in n rows, of which the shares `gained` and `lost` change. Connett et al. 1987."""
    changing = gained + lost
    if not changing:
        return 0.0
    centre, reach = count * changing, 9 * math.sqrt(count * changing * (1 - changing)) + 30
    changed_M = np.arange(max(0, math.floor(centre - reach)), min(count, math.ceil(centre + reach)) + 1, dtype=np.int64)
    log_M = (
        special.gammaln(count + 1)
        - special.gammaln(changed_M + 1)
        - special.gammaln(count - changed_M + 1)
        + special.xlogy(changed_M, changing)
        + special.xlog1py(count - changed_M, -changing)
    )
    limit_M = _most_against(changed_M, level)
    share = gained / changing
    rejected_M = special.bdtr(limit_M, changed_M, share) + special.bdtr(limit_M, changed_M, 1 - share)
    return float(np.exp(log_M) @ np.where(limit_M >= 0, rejected_M, 0.0))


def rows_for_rate(gained: float, lost: float, level: float = LEVEL) -> int | None:
    """The least n with `POWER` for shares of changing rows; None if that is above ten million rows."""
    if gained == lost:
        return None
    return _least(lambda count: mcnemar_power(gained, lost, count, level), least_rows(level))


def detectable_rate(changing: float, count: int, level: float = LEVEL) -> float | None:
    """The smallest difference of rates found with `POWER` in n rows, of which the share `changing` changes.

    Where even changes all in one direction are too few, that of as many as are needed; None if all n are too few.
    """

    def gap(difference: float) -> float:
        share = max(changing, difference)
        return mcnemar_power((share + difference) / 2, (share - difference) / 2, count, level) - POWER

    return float(optimize.brentq(gap, 0.0, 1.0, xtol=1e-6)) if gap(1.0) >= 0 else None  # type: ignore[arg-type]


def _most_against(changed_M: NDArray[np.int64], level: float) -> FloatArray:
    """For each number of changed rows the most that may go the other way when McNemar's exact p is at most `level`."""
    limit_M = np.floor(special.bdtrik(level / 2, changed_M, 0.5))
    limit_M = np.where(np.isfinite(limit_M), limit_M, -1.0)
    # The inverse is good to a few digits: at a limit that is hit exactly it may be one off either way.
    limit_M = np.where(2 * special.bdtr(np.maximum(limit_M, 0), changed_M, 0.5) > level, limit_M - 1, limit_M)
    limit_M = np.maximum(limit_M, -1.0)
    further_M = np.minimum(limit_M + 1, changed_M)
    return np.where(2 * special.bdtr(further_M, changed_M, 0.5) <= level, further_M, limit_M)


def _noncentral(far: float, spread: Spread, count: int, level: float) -> float:
    freedom = max(1.0, min(count - 1.0, 2 * count / max(spread.kurtosis - 1, 1e-9)))
    critical = float(special.stdtrit(freedom, 1 - level / 2))
    above = 1 - float(special.nctdtr(freedom, far, critical))
    below = float(special.nctdtr(freedom, far, -critical))
    return above + (below if math.isfinite(below) else 0.0)  # scipy gives NaN for some that are all but 0


def _least(power: Callable[[int], float], start: int) -> int | None:
    """The least n from `start` whose power is at least `POWER`: doubled, then halved."""
    low, high = start - 1, start
    while power(high) < POWER:
        if high >= MOST_ROWS:
            return None
        low, high = high, min(2 * high, MOST_ROWS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high
