"""Rows by the values of a column: which groups are judged, and how far the best is from the worst.

Shape letters: N rows, K statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.metrics import FloatArray, RowMetric, applicable, lacking, statistics
from tunesmith.types import Prediction

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Parted:
    """The rows of a column's values: those that have enough to be judged, and how many the others have."""

    column: str
    least: int
    judged: dict[str, IntArray]
    small: dict[str, int]


def parted(values: Sequence[str], column: str, least: int) -> Parted:
    """By value, in code-point order; a value of fewer than `least` rows is named and not judged."""
    names_N = np.array(values)
    found = {str(value): np.flatnonzero(names_N == value) for value in np.unique(names_N)}
    return Parted(
        column,
        least,
        {value: rows for value, rows in found.items() if len(rows) >= least},
        {value: len(rows) for value, rows in found.items() if len(rows) < least},
    )


@dataclass(frozen=True, slots=True)
class Gap:
    """How much better the best of so many groups is than the worst; without limits where `reason` says why."""

    metric: str
    best: str
    worst: str
    value: float
    low: float
    high: float
    groups: int
    reason: str | None = None


def gap(
    metric: RowMetric, tables: Mapping[str, FloatArray], seed: int, clusters: Mapping[str, IntArray] | None = None
) -> Gap | None:
    """Of the groups' statistics [N, K] each; None of fewer than two groups that have a value.

    The best and the worst are chosen by what is measured, and so lie further apart than they are. The interval allows
    for that: it is one of all pairs of groups that hold together (Bonferroni), each from the intervals of both groups
    (MOVER: Zou and Donner 2008, Stat. Med. 27(10)). Where it holds 0, chance alone can make such a gap.
    """
    values = {name: float(metric.aggregate(table.sum(axis=0))) for name, table in tables.items()}
    ordered = sorted((name for name in values if math.isfinite(values[name])), key=lambda name: (values[name], name))
    if len(ordered) < 2:
        return None
    low_end, high_end = ordered[0], ordered[-1]
    best, worst = (high_end, low_end) if metric.higher_is_better else (low_end, high_end)
    value = values[high_end] - values[low_end]
    own = {name: None if clusters is None else clusters[name] for name in ordered}
    reasons = (lacking(metric, tables[name], clusters_N=own[name]) for name in (best, worst))
    why = next(filter(None, reasons), None)
    if why is not None:
        return Gap(metric.name, best, worst, value, math.nan, math.nan, len(ordered), why)
    pairs = len(ordered) * (len(ordered) - 1) // 2
    (_, below, above), (_, under, over) = (
        interval(metric, tables[name], seed, level=1 - (1 - LEVEL) / pairs, clusters_N=own[name])
        for name in (high_end, low_end)
    )
    low = value - math.hypot(values[high_end] - below, over - values[low_end])
    high = value + math.hypot(above - values[high_end], values[low_end] - under)
    return Gap(metric.name, best, worst, value, low, high, len(ordered))


def gaps(
    of: Parted,
    predictions: Sequence[Prediction],
    metrics: Sequence[RowMetric],
    seed: int,
    clusters_N: IntArray | None = None,
) -> list[Gap]:
    """By each metric, of the groups that can have it."""
    groups = {name: [predictions[i] for i in rows_N] for name, rows_N in of.judged.items()}
    clusters = None if clusters_N is None else {name: numbered(clusters_N[rows]) for name, rows in of.judged.items()}
    found: list[Gap | None] = []
    for metric in metrics:
        having = {name: own for name, own in groups.items() if applicable([metric.name], own)}
        found.append(gap(metric, {name: statistics(metric, own) for name, own in having.items()}, seed, clusters))
    return [one for one in found if one is not None]


def told(data: str, of: Parted, gaps: Sequence[Gap]) -> dict[str, Any]:
    """The entry of groups.json; what is not finite is null."""
    return {
        "data": data,
        "column": of.column,
        "least": of.least,
        "judged": {value: len(rows) for value, rows in of.judged.items()},
        "small": of.small,
        "gaps": [
            {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(one).items()}
            for one in gaps
        ],
    }


def sources(values: Sequence[str]) -> IntArray:
    """The rows' values of a column as clusters; a row without one is a source of its own."""
    return numbered(np.array([value or f"\0{place}" for place, value in enumerate(values)]))


def numbered(clusters: NDArray[Any]) -> IntArray:
    """Clusters by numbers from 0."""
    return np.unique(clusters, return_inverse=True)[1]
