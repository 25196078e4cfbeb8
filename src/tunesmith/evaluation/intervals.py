"""Intervals of a metric's value over rows.

By `RowMetric.kind`, chosen by the coverage of nominal 95% intervals at n = 50, 200 and 1,000, which
benchmarks/error_bars.py measures and docs/statistics.md tells. Rates: Wilson's score. All else between 0 and 1, and
means between any two numbers: Wilson's too, for as many rows as would be as uncertain. Ratios: bootstrap-t. Where rows
cannot carry an interval (`lacking`) there is none.
Shape letters: N rows, C clusters, K statistics, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation.metrics import FloatArray, Joint, Limited, MetricKind, RowMetric, Weighed, lacking, quotient

# Cells of one block of resampling counts: 2,000,000 rows drawn need about 48 MB, whatever N and R.
BLOCK = 2_000_000
ROUNDING = 1e-24  # a variance that is none: what rounding leaves of rows that all agree
# Below it Student's t made intervals of 50 rows hold 98%, because Wilson's are wide there already.
LEAST_FREEDOM = 5.0
RANKED = 0.9  # of the degrees of freedom are left to ranks: with all of them 20 rows of a class hold 92.8%
NONE = (math.nan, math.nan)  # no interval
STEP = 1e-4  # of a row's weight, for its slope
PRIOR = 0.5  # Jeffreys'
_MIDDLES = (np.arange(400) + 0.5) / 400  # quantiles over which a beta is averaged

IntArray = NDArray[np.int64]
Aggregate = Callable[[FloatArray], FloatArray]
Limits = tuple[float, float]


def interval(
    metric: RowMetric,
    statistics_NK: FloatArray,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
    clusters_N: IntArray | None = None,
    freedom: float | None = None,
) -> tuple[float, float, float]:
    """(value, low, high) of the metric over the rows; the same for the same seed.

    Rows of one cluster (several of one source) are drawn, or left out, together; a rate counts as many rows as it is
    worth. Where rows have no spread (one row, or all alike) a metric between 0 and 1 gets Wilson's interval for
    as many rows as it is worth, any other its bounds when n is 1 and its value when rows agree. Limits are NaN where
    `lacking` says why there are none. `freedom`: degrees of freedom in place of these rows' own, for ranks.
    InputError without rows, RefusedError on NaN or infinity.
    """
    value = value_of(metric, statistics_NK)
    kind = metric.kind
    if lacking(metric, statistics_NK, clusters_N=clusters_N):
        return (value, *NONE)
    if clusters_N is not None:
        statistics_NK = clustered(statistics_NK, clusters_N)
        if kind == "rate":
            worth = effective_rows(statistics_NK)
            return (value, *wilson(value * worth, worth, level))
    count = len(statistics_NK)
    limits: Limits | None = None
    if kind == "rate" or count > 1:
        if freedom is None:
            limits = _LIMITS[kind](metric, statistics_NK, seed, level, resamples)
        else:
            limits = as_of_a_rate(metric, statistics_NK, level, freedom)
    if limits is None:
        if is_share(metric):
            worth = metric.worth(statistics_NK.sum(axis=0)) if isinstance(metric, Weighed) else count
            limits = (value, value) if math.isinf(worth) else _of_share(metric, value, min(count, worth), level)
        else:
            limits = metric.bounds if count == 1 else (value, value)
    return value, max(min(limits[0], value), metric.bounds[0]), min(max(limits[1], value), metric.bounds[1])


def _rate_limits(metric: RowMetric, statistics_N2: FloatArray, seed: int, level: float, resamples: int) -> Limits:
    return wilson(float(statistics_N2[:, 0].sum()), float(statistics_N2[:, 1].sum()), level)


def _mean_limits(
    metric: RowMetric, statistics_NK: FloatArray, seed: int, level: float, resamples: int
) -> Limits | None:
    if not is_share(metric):
        return _ratio_limits(metric, statistics_NK, seed, level, resamples)
    return as_of_a_rate(metric, statistics_NK, level)


def _ratio_limits(
    metric: RowMetric, statistics_N2: FloatArray, seed: int, level: float, resamples: int
) -> Limits | None:
    limits = studentised(statistics_N2, seed, level, resamples)
    if limits is None:
        return percentile(metric.aggregate, statistics_N2, seed, level, resamples)
    # Perplexity is a monotone function of a ratio, so its limits are that function of the limits.
    ends = metric.aggregate(np.array([[limit, 1.0] for limit in limits]))
    return float(ends.min()), float(ends.max())


def _general_limits(
    metric: RowMetric, statistics_NK: FloatArray, seed: int, level: float, resamples: int
) -> Limits | None:
    if isinstance(metric, Limited):
        return metric.limits(statistics_NK, seed, level)
    if metric.bounds == (0.0, 1.0):
        return as_of_a_rate(metric, statistics_NK, level)
    value, (pull_N, bias), count = value_of(metric, statistics_NK), influence(metric, statistics_NK), len(statistics_NK)
    far = float(special.stdtrit(degrees_of_freedom(pull_N), (1 + level) / 2))
    error = math.sqrt(float(pull_N @ pull_N) / (count * (count - 1)))
    return value - bias - far * error, value - bias + far * error


_LIMITS: Mapping[MetricKind, Callable[[RowMetric, FloatArray, int, float, int], Limits | None]] = {
    "rate": _rate_limits,
    "mean": _mean_limits,
    "ratio": _ratio_limits,
    "general": _general_limits,
}


def clustered(statistics_NK: FloatArray, clusters_N: IntArray) -> FloatArray:
    """The sums over each cluster's rows [C, K], clusters numbered from 0."""
    sums_CK = np.zeros((int(clusters_N.max()) + 1, statistics_NK.shape[1]))
    np.add.at(sums_CK, clusters_N, statistics_NK)
    return sums_CK


def effective_rows(statistics_C2: FloatArray) -> float:
    """How many independent rows would tell a rate as well as the rows of these clusters do.

    Korn and Graubard 1998 (Surv. Methodol. 24(2)): the binomial variance by the clusters' own, with Student's t of
    as many degrees of freedom as there are clusters but one. Clusters that all agree are worth a row each.
    """
    clusters, rows = len(statistics_C2), float(statistics_C2[:, 1].sum())
    if clusters == 1:
        return 1.0
    share, variance, _ = _linearised(statistics_C2)
    if share in (0, 1) or variance <= ROUNDING:
        return float(clusters)
    widening = special.stdtrit(max(rows - 1, 1), 0.975) / special.stdtrit(clusters - 1, 0.975)
    return float(min(rows, share * (1 - share) / variance) * widening**2)


def _linearised(statistics_N2: FloatArray) -> tuple[float, float, FloatArray]:
    """A ratio of sums, the variance of that estimate (Cochran 1977, 6.3), and the rows' residuals; two rows or more."""
    count, (hits, rows) = len(statistics_N2), statistics_N2.sum(axis=0)
    residual_N = statistics_N2[:, 0] - hits / rows * statistics_N2[:, 1]
    return float(hits / rows), count / (count - 1) * float(residual_N @ residual_N) / float(rows) ** 2, residual_N


def wilson(hits: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion. Wilson 1927; Brown, Cai and DasGupta 2001, equation 4."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    # At 0 and 1 the limit is the value itself; rounding must not put it on the other side.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def paired_rate(gained: int, lost: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two rates on the same rows.

    Of the shares of rows that changed for the better and for the worse the posterior after a Dirichlet prior of
    half a row each, and one of the others, equal tails: Agresti and Min 2005 (Biometrics 61(2)). The share that changed
    is a beta, and so is how much of it was for the better, independent of it. Where 3 of 50 rows change it holds 93.4%;
    Bonett and Price's, Tango's and Wald's intervals 99.6%, 98.7% and 88%.
    """
    changed_M = special.betaincinv(gained + lost + 2 * PRIOR, count - gained - lost + 1, _MIDDLES)

    def above(difference: float, share: float) -> float:
        share_M = np.clip((1 + difference / changed_M) / 2, 0, 1)
        return float(special.betainc(gained + PRIOR, lost + PRIOR, share_M).mean()) - share

    tail, observed = (1 - level) / 2, (gained - lost) / count
    low, high = (float(optimize.brentq(above, -1.0, 1.0, (share,), 1e-9)) for share in (tail, 1 - tail))  # type: ignore[arg-type]
    return min(low, observed), max(high, observed)


def square_and_add(before: tuple[float, float, float], after: tuple[float, float, float], correlation: float) -> Limits:
    """Limits of the difference of two values from (value, low, high) of each and the correlation of their errors.

    Zou and Donner 2008 (Stat. Med. 27(10), MOVER), after Newcombe 1998: unlike a normal interval it stays wide and
    lopsided where both values are near 1.
    """
    (first, first_low, first_high), (second, second_low, second_high) = before, after

    def far(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * correlation * down * up + up**2, 0.0))

    difference = second - first
    return (
        difference - far(second - second_low, first_high - first),
        difference + far(second_high - second, first - first_low),
    )


def percentile(
    aggregate: Aggregate, statistics_NK: FloatArray, seed: int, level: float, resamples: int
) -> tuple[float, float] | None:
    """Percentile bootstrap at expanded quantiles; None if all resamples agree.

    Hesterberg 2015 (arXiv 1411.5279, section 5.3) expands by Student's t with n - 1 degrees of freedom; here
    the degrees of freedom are those of the jackknife's influence values.
    """
    count = len(statistics_NK)
    values_R = np.concatenate([aggregate(sums) for sums in _resampled_sums(statistics_NK, seed, resamples)])
    # A resample may define no value (no token drawn), though the rows do.
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R) or np.ptp(values_R) == 0:
        return None
    left_N = _left_out(aggregate, statistics_NK)
    freedom = degrees_of_freedom(left_N[np.isfinite(left_N)])
    tail = float(special.ndtr(special.stdtrit(freedom, (1 - level) / 2) * math.sqrt(count / (count - 1))))
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def studentised(statistics_N2: FloatArray, seed: int, level: float, resamples: int) -> tuple[float, float] | None:
    """Bootstrap-t of a ratio with its linearised standard error; None if that gives no finite limits.

    Efron and Tibshirani 1993, equation 12.22. Sums of squares of the residuals travel along as further
    statistics, so each resample's own standard error costs no second pass.
    """
    ratio = float(quotient(statistics_N2.sum(axis=0)))
    base_N = statistics_N2[:, 1]
    residual_N = statistics_N2[:, 0] - ratio * base_N
    error = math.sqrt(float(residual_N @ residual_N)) / float(base_N.sum())
    if error == 0:
        return None
    products_N5 = np.column_stack([residual_N, base_N, residual_N**2, residual_N * base_N, base_N**2])
    pivots: list[FloatArray] = []
    for sums_R5 in _resampled_sums(products_N5, seed, resamples):
        residual, base, rr, rb, bb = sums_R5.T
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = residual / base
            # (residual / base) / (sqrt(sum of squared residuals about the resample's ratio) / base)
            pivots.append(residual / np.sqrt(np.maximum(rr - 2 * shift * rb + shift**2 * bb, 0)))
    freedom = degrees_of_freedom(residual_N)
    tail = float(special.ndtr(special.stdtrit(freedom, (1 - level) / 2)))
    pivot_R = np.concatenate(pivots)
    pivot_R = np.sort(pivot_R[~np.isnan(pivot_R)])
    if not len(pivot_R):
        return None
    # No interpolation: between a finite and an infinite pivot there is nothing.
    last = len(pivot_R) - 1
    limits = (
        ratio - error * float(pivot_R[math.ceil((1 - tail) * last)]),
        ratio - error * float(pivot_R[math.floor(tail * last)]),
    )
    return limits if all(map(math.isfinite, limits)) else None


def as_of_a_rate(
    metric: RowMetric, statistics_NK: FloatArray, level: float, freedom: float | None = None
) -> Limits | None:
    """Wilson's limits for as many rows of a rate as would be as uncertain; None if all rows agree.

    `freedom`: degrees of freedom in place of those of these rows. The variance is the jackknife's (Efron and
    Tibshirani 1993, chapter 11), and so is the bias that is taken off; for ROC-AUC this is Kottas, Kuss and Zapf 2014
    (BMC Med. Res. Methodol. 14:26) with the score in place of Wald's.
    """
    value, count, (least, most) = value_of(metric, statistics_NK), len(statistics_NK), metric.bounds
    pull_N, bias = influence(metric, statistics_NK)
    variance = float(pull_N @ pull_N) / (count * (count - 1))
    if variance <= ROUNDING or not least < value < most:
        return None
    if freedom is None:
        own = degrees_of_freedom(pull_N)
        freedom = RANKED * own if isinstance(metric, Joint) else max(min(LEAST_FREEDOM, count - 1.0), own)
    widening = special.ndtri((1 + level) / 2) / special.stdtrit(freedom, (1 + level) / 2)
    worth = float((value - least) * (most - value) / variance * widening**2)
    low, high = _of_share(metric, value, worth, level)
    return low - bias, high - bias


def is_share(metric: RowMetric) -> bool:
    """Whether the metric is between 0 and 1, or a mean between two other finite numbers."""
    return metric.bounds == (0.0, 1.0) or (metric.kind == "mean" and all(map(math.isfinite, metric.bounds)))


def _of_share(metric: RowMetric, value: float, worth: float, level: float) -> Limits:
    """Wilson's limits of a share as certain as `worth` rows of a rate, in the metric's own numbers."""
    least, most = metric.bounds
    low, high = wilson((value - least) / (most - least) * worth, worth, level)
    return least + low * (most - least), least + high * (most - least)


def influence(metric: RowMetric, statistics_NK: FloatArray) -> tuple[FloatArray, float]:
    """How much each row pulls the metric away from its value [N], and the metric's bias: both of the jackknife.

    The pulls sum to 0; for a mean they are what each row has above it. At least two rows.
    """
    count = len(statistics_NK)
    value = value_of(metric, statistics_NK)
    left_N = _left_out(metric.aggregate, statistics_NK)
    left_N = np.where(np.isfinite(left_N), left_N, value)  # a row without which there is no value tells nothing
    pull_N = (count - 1) * (value - left_N)
    return pull_N - pull_N.mean(), -float(pull_N.mean())


def slope(metric: RowMetric, statistics_NK: FloatArray) -> FloatArray:
    """How fast the metric changes with each row's weight [N]: its influence by the infinitesimal jackknife.

    Jaeckel 1972 (Bell Labs memorandum); Efron and Tibshirani 1993, chapter 21. The slopes sum to 0.
    """
    total_K, step = statistics_NK.sum(axis=0), STEP * statistics_NK
    slope_N = len(statistics_NK) * (metric.aggregate(total_K + step) - metric.aggregate(total_K - step)) / (2 * STEP)
    return slope_N - slope_N.mean()


def degrees_of_freedom(pull_N: FloatArray) -> float:
    """Satterthwaite's: a variance estimated from n rows of kurtosis k varies as one with 2n / (k - 1).

    A rare class, or few rows that carry most of a loss, leave far fewer than n - 1.
    """
    count = len(pull_N)
    squares_N = (pull_N - pull_N.mean()) ** 2
    variance = float(squares_N.mean()) if count else 0.0
    if variance == 0:
        return max(1.5, count - 1.0)
    kurtosis = float((squares_N**2).mean()) / variance**2
    # Below 1.5 the quantile would be further out than 2,000 resamples can say.
    return max(1.5, min(count - 1.0, 2 * count / max(kurtosis - 1, 1e-9)))


def _left_out(aggregate: Aggregate, statistics_NK: FloatArray) -> FloatArray:
    """The metric without each row in turn [N]; NaN where that leaves none."""
    total_K = statistics_NK.sum(axis=0)
    size = max(1, BLOCK // statistics_NK.shape[1])
    parts = [aggregate(total_K - statistics_NK[i : i + size]) for i in range(0, len(statistics_NK), size)]
    return np.concatenate(parts)


def _resampled_sums(statistics_NK: FloatArray, seed: int, resamples: int) -> Iterator[FloatArray]:
    """Blocks [R', K] of sums over rows drawn with replacement: multinomial counts times statistics."""
    count = len(statistics_NK)
    if resamples * count <= BLOCK:
        yield _counts_once(count, seed, resamples) @ statistics_NK
        return
    rng, size = np.random.default_rng(seed), max(1, BLOCK // count)
    for start in range(0, resamples, size):
        yield _counts(rng, count, min(size, resamples - start)) @ statistics_NK


@lru_cache(maxsize=1)
def _counts_once(count: int, seed: int, resamples: int) -> FloatArray:
    """The metrics of a set, and its models, are resampled alike: drawing takes longer than summing."""
    return _counts(np.random.default_rng(seed), count, resamples)


def _counts(rng: np.random.Generator, count: int, resamples: int) -> FloatArray:
    """[R, N]: how often each row is drawn."""
    drawn = rng.integers(0, count, size=(resamples, count))
    drawn += np.arange(resamples)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def value_of(metric: RowMetric, statistics_NK: FloatArray) -> float:
    """The metric over the rows. InputError without rows, RefusedError if a row or the value is not finite."""
    if statistics_NK.ndim != 2 or not len(statistics_NK):
        raise InputError(f"{metric.name} was asked for over no rows", "give a test set that has rows")
    bad = np.flatnonzero(~np.isfinite(statistics_NK).all(axis=1))
    if len(bad):
        raise RefusedError(
            f"{metric.name}: row {bad[0]} of {len(statistics_NK)} has a non-finite statistic ({len(bad)} such rows)",
            "the model's outputs are broken: evaluate an earlier checkpoint, or with precision=fp32",
        )
    value = float(metric.aggregate(statistics_NK.sum(axis=0)))
    if not math.isfinite(value):
        raise RefusedError(
            f"{metric.name} has no finite value over these {len(statistics_NK)} rows",
            "check that the test set has trained tokens, and that the model's loss is not hundreds of nats",
        )
    return value
