"""TokenStore: the tokenised examples of one split and their rows, memory-mapped, whole on disk or not there."""

from __future__ import annotations

import hashlib
import numbers
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import aside
from tunesmith.data.rows import RowFile, RowWriter, encode
from tunesmith.types import Example, Piece, Row

_EXAMPLE = struct.Struct("<qiiiqq")
_EXAMPLE_DTYPE = np.dtype(
    [("piece", "<i8"), ("pieces", "<i4"), ("cut", "<i4"), ("cut_trained", "<i4"), ("tokens", "<i8"), ("trained", "<i8")]
)
_PIECE = struct.Struct("<qqihhbi")
_PIECE_DTYPE = np.dtype(
    {
        "names": ["example", "offset", "length", "role", "stream", "trained", "typed_from"],
        "formats": ["<i8", "<i8", "<i4", "<i2", "<i2", "i1", "<i4"],
    }
)
_NOTHING, _WEIGHTS, _LABELS = range(3)  # what stands beside a piece's tokens, four bytes each


class Writer:
    """Appends examples with their rows; `finish` returns the meta data that `TokenStore` reads."""

    def __init__(self, build: aside.Build) -> None:
        self._build = build
        self._tokens, self._weights = build.file("tokens"), build.file("weights")
        self._pieces, self._examples = build.file("pieces"), build.file("examples")
        self._rows = RowWriter(build)
        self._columns: dict[str, array[Any]] = {}
        self._names: dict[str, int] = {}  # roles and streams share one table of names
        self._count = self._piece_count = self._offset = 0

    def append(self, example: Example, row: Row) -> None:
        """ValueError: weights or labels of another length than the tokens, or columns unlike the first example's."""
        self.append_line(example, encode(row))

    def append_line(self, example: Example, line: bytes) -> None:
        """The same, with the row as `rows.encode` wrote it."""
        tokens = trained = 0
        for piece in example.pieces:
            tokens += len(piece.input_ids_T)
            trained += self._piece(piece)
        first = self._piece_count - len(example.pieces)
        self._examples.write(
            _EXAMPLE.pack(first, len(example.pieces), example.cut, example.cut_trained, tokens, trained)
        )
        self._scalars(example)
        self._rows.append(line)
        self._count += 1

    def finish(self) -> dict[str, Any]:
        kinds: dict[str, str] = {}
        for number, (name, values) in enumerate(sorted(self._columns.items())):
            kinds[name] = "<i8" if values.typecode == "q" else "<f8"
            self._build.file(f"column-{number}").array(np.frombuffer(values, dtype=np.dtype(values.typecode)))
        return {"examples": self._count, "names": list(self._names), "columns": kinds}

    def _piece(self, piece: Piece) -> int:
        ids, weights, labels = np.asarray(piece.input_ids_T, dtype="<i4"), piece.weights_T, piece.labels_T
        if len(trained_of(piece)) != len(ids):
            what = "weights" if labels is None else "labels"
            raise ValueError(f"a piece has {len(ids)} tokens and {len(trained_of(piece))} {what}")
        self._tokens.write(ids.tobytes())
        held = np.asarray(trained_of(piece), dtype="<f4") if labels is None else np.asarray(labels, dtype="<i4")
        self._weights.write(held.tobytes())
        trained = _LABELS if labels is not None else _NOTHING if weights is None else _WEIGHTS
        role, stream = (self._names.setdefault(name, len(self._names)) for name in (piece.role, piece.stream))
        self._pieces.write(_PIECE.pack(self._count, self._offset, len(ids), role, stream, trained, piece.typed_from))
        self._offset += len(ids)
        self._piece_count += 1
        return int(np.count_nonzero(np.asarray(trained_of(piece)) > 0))

    def _scalars(self, example: Example) -> None:
        if self._count and example.columns.keys() != self._columns.keys():
            raise ValueError(f"an example has the columns {sorted(example.columns)}, others {sorted(self._columns)}")
        for name, value in example.columns.items():
            values = self._columns.setdefault(name, array("q"))
            if values.typecode == "q" and not isinstance(value, numbers.Integral):
                values = self._columns[name] = array("d", values)
            values.append(value)


def trained_of(piece: Piece) -> NDArray[np.float32]:
    """The weights of a piece's tokens; 1 for each that has a label."""
    if piece.labels_T is not None:
        return (piece.labels_T >= 0).astype(np.float32)
    return np.zeros(len(piece.input_ids_T), np.float32) if piece.weights_T is None else piece.weights_T


class TokenStore:
    """Examples by position. `select` gives a view of some of them, in any order, that shares the files.

    `lengths` and `trained` (int64, one entry an example) count tokens, and tokens with weight above 0.
    """

    def __init__(self, path: Path, index: NDArray[np.int64] | None = None) -> None:
        meta = aside.read_meta(path)
        self.path, self._index = path, index
        self._names: list[str] = meta["names"]
        self._table: NDArray[Any] = aside.mapped(path / "examples", _EXAMPLE_DTYPE)
        self._pieces: NDArray[Any] = aside.mapped(path / "pieces", _PIECE_DTYPE)
        self._tokens: NDArray[np.int32] = aside.mapped(path / "tokens", "<i4")
        self._weights: NDArray[np.float32] = aside.mapped(path / "weights", "<f4")
        self._columns: dict[str, NDArray[Any]] = {
            name: aside.mapped(path / f"column-{number}", kind)
            for number, (name, kind) in enumerate(sorted(meta["columns"].items()))
        }
        self._rows = RowFile(path)
        self._fingerprint = aside.fingerprint(meta)

    @classmethod
    def build(cls, path: Path, pairs: Iterable[tuple[Example, Row]]) -> TokenStore:
        """The store at `path`, written from `pairs` where it is absent or damaged."""

        def make(build: aside.Build) -> dict[str, Any]:
            writer = Writer(build)
            for example, row in pairs:
                writer.append(example, row)
            return writer.finish()

        aside.open_or_build(path, make)
        return cls(path)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, NDArray[np.int64] | None]]:
        return TokenStore, (self.path, self._index)

    def __len__(self) -> int:
        return len(self._table) if self._index is None else len(self._index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._field("tokens")

    @property
    def trained(self) -> NDArray[np.int64]:
        return self._field("trained")

    @property
    def pieces(self) -> NDArray[np.int64]:
        """How many pieces each example has."""
        return self._field("pieces")

    @property
    def cut(self) -> NDArray[np.int64]:
        """Tokens that truncation took from each example."""
        return self._field("cut")

    @property
    def cut_trained(self) -> NDArray[np.int64]:
        """Those of them that the model should have learned."""
        return self._field("cut_trained")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def column(self, name: str) -> NDArray[Any]:
        """One number an example: int64, or float64 where any is a float. KeyError: no such column."""
        if name not in self._columns:
            raise KeyError(f"{name!r}; there are: {', '.join(self._columns) or 'none'}")
        values = self._columns[name]
        return values.copy() if self._index is None else values[self._index]

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the store (or the view) holds."""
        if self._index is None:
            return self._fingerprint
        return hashlib.sha256(self._fingerprint.encode() + self._index.astype("<i8").tobytes()).hexdigest()

    def example(self, index: int) -> Example:
        """The example at `index`, its arrays copied out of the file."""
        at = self._at(index)
        entry = self._table[at]
        first = int(entry["piece"])
        pieces = tuple(self._piece(p) for p in self._pieces[first : first + int(entry["pieces"])])
        columns: dict[str, float | int] = {name: values[at].item() for name, values in self._columns.items()}
        return Example(pieces, columns, int(entry["cut"]), int(entry["cut_trained"]))

    def row(self, index: int) -> Row:
        """The canonical row that the example at `index` was made of."""
        return self._rows.row(self._at(index))

    def select(self, indices: NDArray[np.int64]) -> TokenStore:
        """A view of the examples at `indices`, which may repeat."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            raise IndexError(f"indices from 0 to {len(self) - 1}")
        view = TokenStore.__new__(TokenStore)
        view.__dict__.update(self.__dict__)
        view._index = wanted if self._index is None else self._index[wanted]
        return view

    def _at(self, i: int) -> int:
        if not 0 <= i < len(self):  # a negative index would silently take from the end
            raise IndexError(f"example {i} of {len(self)}")
        return i if self._index is None else int(self._index[i])

    def _field(self, name: str) -> NDArray[np.int64]:
        values = self._table[name]
        return (values if self._index is None else values[self._index]).astype(np.int64)

    def _piece(self, entry: Any) -> Piece:
        stretch = slice(int(entry["offset"]), int(entry["offset"]) + int(entry["length"]))
        weights = self._weights[stretch].copy() if entry["trained"] == _WEIGHTS else None
        labels = self._weights[stretch].copy().view("<i4") if entry["trained"] == _LABELS else None
        role, stream = self._names[entry["role"]], self._names[entry["stream"]]
        return Piece(self._tokens[stretch].copy(), weights, role, stream, labels, int(entry["typed_from"]))


def some_rows(store: TokenStore, limit: int | None, seed: int) -> list[Row]:
    """All rows, or as many as `limit`, drawn with the seed."""
    chosen = np.arange(len(store))
    if limit is not None and limit < len(store):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(store))[:limit])
    return [store.row(int(i)) for i in chosen]
