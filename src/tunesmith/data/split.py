"""Stratified splits and draws that depend on the rows' content and a seed, never on their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.checks import Keys

Indices = NDArray[np.int64]


def split(keys: Keys, fraction: float, seed: int, labels: NDArray[np.int64] | None = None) -> tuple[Indices, Indices]:
    """Indices of what is kept and of what is held out, both ascending.

    `keys` say what a row shows the model: rows of one key stay on one side. Of each class the
    distinct rows held out are `fraction` of them within one row, and never all: a class keeps at
    least one. At least one row is held out where some class has two.
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    classes = _classes(labels, len(keys))[first]
    counts = np.bincount(classes)
    quota = _apportion(counts * fraction, np.maximum(counts - 1, 0), max(1, round(len(first) * fraction)))
    held = _take(keys[first], classes, quota, seed)[group]
    return np.flatnonzero(~held), np.flatnonzero(held)


def folds(
    keys: Keys,
    count: int,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
) -> Indices:
    """Of each row the part it is in, from 0: parts alike in size, and in their shares of each class.

    Rows of one key are in one part, and so are those of one group. The largest sets of rows that belong together come
    first, each into the part with least of its classes, then with fewest rows; of equally large ones hashes decide.
    """
    unit_N = _together(keys, groups)
    class_N = _classes(labels, len(keys))
    sizes_U, frequency_C = np.bincount(unit_N), np.bincount(class_N)
    high, low = _halves(keys)
    hash_U = np.full(len(sizes_U), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(hash_U, unit_N, _mixed(high ^ _mixed(low + np.uint64(seed))))
    rows = np.argsort(unit_N, kind="stable")
    starts = np.concatenate(([0], np.cumsum(sizes_U)))
    held_PC, held_P = np.zeros((count, len(frequency_C))), np.zeros(count)
    part_U = np.empty(len(sizes_U), dtype=np.int64)
    for unit in np.lexsort((hash_U, -sizes_U)):
        classes, counts = np.unique(class_N[rows[starts[unit] : starts[unit + 1]]], return_counts=True)
        crowded_P = held_PC[:, classes] @ (counts / frequency_C[classes])
        part = np.lexsort((held_P, np.round(crowded_P, 9)))[0]
        held_PC[part, classes] += counts
        held_P[part] += sizes_U[unit]
        part_U[unit] = part
    return part_U[unit_N]


def _together(keys: Keys, groups: Sequence[str] | None) -> Indices:
    """A number for each set of rows that are linked by a key or a group."""
    key_N = np.unique(keys, return_inverse=True)[1]
    if groups is None:
        return key_N
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group_N = np.unique(np.asarray(groups), return_inverse=True)[1] + key_N.max(initial=-1) + 1
    size = int(group_N.max(initial=-1)) + 1
    links = coo_array((np.ones(len(keys)), (key_N, group_N)), shape=(size, size))
    return connected_components(links, directed=False)[1][key_N].astype(np.int64)


def draw(n: int, keys: Keys, seed: int, labels: NDArray[np.int64] | None = None) -> Indices:
    """`n` indices, ascending, in which each class has its share within one row; all where `n` is more.

    Rows of one key differ by their order, so that a repeated row can be drawn as often as it stands.
    """
    if n >= len(keys):
        return np.arange(len(keys))
    classes = _classes(labels, len(keys))
    counts = np.bincount(classes)
    quota = _apportion(counts * (n / len(keys)), counts, n)
    return np.flatnonzero(_take(keys, classes, quota, seed))


def _classes(labels: NDArray[np.int64] | None, n: int) -> Indices:
    if labels is None:
        return np.zeros(n, dtype=np.int64)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _apportion(share: NDArray[np.floating], most: Indices, total: int) -> Indices:
    """Whole numbers beside the shares, within one of them and at most `most`, that add up to `total` if they can.

    The largest remainders are rounded up (Hamilton's method); ties go to the first class.
    """
    quota = np.minimum(np.floor(share + 1e-9).astype(np.int64), most)
    remainder = np.where(quota < np.minimum(most, np.ceil(share - 1e-9)), share - quota, -1.0)
    order = np.argsort(-remainder, kind="stable")
    open_to = order[remainder[order] >= 0][: max(0, total - int(quota.sum()))]
    quota[open_to] += 1
    return quota


def _take(keys: Keys, classes: Indices, quota: Indices, seed: int) -> NDArray[np.bool_]:
    """Of each class, the `quota` rows whose seeded hashes are lowest."""
    high, low = _halves(keys)
    order = np.lexsort((np.arange(len(keys)), low, _mixed(high ^ _mixed(low + np.uint64(seed))), classes))
    starts = np.concatenate(([0], np.cumsum(np.bincount(classes, minlength=len(quota)))[:-1]))
    rank = np.arange(len(keys)) - starts[classes[order]]
    taken = np.zeros(len(keys), dtype=bool)
    taken[order] = rank < quota[classes[order]]
    return taken


def _halves(keys: Keys) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    pairs = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), which spreads every bit over all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
