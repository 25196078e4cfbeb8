"""Rows of one split, taken by position from one or several row stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.checks import Keys
from tunesmith.data.rows import RowStore
from tunesmith.types import Row

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Row i is row `index_N[i]` of `stores[source_N[i]]`."""

    stores: tuple[RowStore, ...]
    source_N: NDArray[np.int32]
    index_N: Indices

    @classmethod
    def of(cls, stores: Sequence[RowStore]) -> Pool:
        """All rows of the stores, one store after the other."""
        counts = [len(store) for store in stores]
        source = np.repeat(np.arange(len(stores), dtype=np.int32), counts)
        return cls(tuple(stores), source, np.concatenate([np.arange(n, dtype=np.int64) for n in counts]))

    def __len__(self) -> int:
        return len(self.index_N)

    def take(self, at: Indices) -> Pool:
        return Pool(self.stores, self.source_N[at], self.index_N[at])

    def without(self, at: Indices) -> Pool:
        keep = np.ones(len(self), dtype=bool)
        keep[at] = False
        return self.take(np.flatnonzero(keep))

    def row(self, i: int) -> Row:
        return self.stores[self.source_N[i]].row(int(self.index_N[i]))

    def line(self, i: int) -> bytes:
        return self.stores[self.source_N[i]].file.line(int(self.index_N[i]))

    def rows(self) -> Iterator[Row]:
        return (self.row(i) for i in range(len(self)))

    @property
    def keys(self) -> Keys:
        """Keys of what a row shows the model."""
        return self._gathered([store.keys for store in self.stores])

    @property
    def whole(self) -> Keys:
        """Keys of rows with their answers."""
        return self._gathered([store.whole for store in self.stores])

    @property
    def labelled(self) -> bool:
        return self.stores[0].labelled

    @property
    def classes(self) -> Indices | None:
        """A number for each row's class, in the order of the classes' names; None unless each row has one class."""
        if not all(store.stratifies for store in self.stores):
            return None
        names = sorted({name for store in self.stores for name in store.labels})
        number = {name: i for i, name in enumerate(names)}
        found = np.empty(len(self), dtype=np.int64)
        for s, store in enumerate(self.stores):
            mine = self.source_N == s
            to_number = np.array([number[name] for name in store.labels], dtype=np.int64)
            found[mine] = to_number[store.codes[self.index_N[mine]]]
        return found

    def label_counts(self) -> dict[str, int]:
        """How many rows have each label, in the order of the labels' names; labels of no row are left out."""
        counts: dict[str, int] = {}
        for s, store in enumerate(self.stores):
            used = np.bincount(self.index_N[self.source_N == s], minlength=len(store))
            per_code = np.bincount(
                store.codes, weights=np.repeat(used, np.diff(store.starts)), minlength=len(store.labels)
            )
            for name, count in zip(store.labels, per_code, strict=True):
                if count:
                    counts[name] = counts.get(name, 0) + int(count)
        return dict(sorted(counts.items()))

    def _gathered(self, of: Sequence[Keys]) -> Keys:
        found = np.empty(len(self), dtype=of[0].dtype)
        for s, keys in enumerate(of):
            mine = self.source_N == s
            found[mine] = keys[self.index_N[mine]]
        return found
