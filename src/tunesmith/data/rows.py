"""Canonical rows on disk: read by position through a memory map, with their keys and labels as arrays."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tunesmith.data import aside
from tunesmith.data.checks import KEY_BYTES, Keys, row_keys
from tunesmith.errors import InputError
from tunesmith.types import Row

LARGEST = 1e100  # of a number in a row that is learned or measured: squares of them are summed


class RowWriter:
    """Writes rows.jsonl and the offsets of its lines."""

    def __init__(self, build: aside.Build) -> None:
        self._lines, self._offsets = build.file("rows.jsonl"), build.file("rows.offsets")
        self._offsets.write((0).to_bytes(8, "little"))

    def append(self, line: bytes) -> None:
        self._lines.write(line)
        self._offsets.write(self._lines.bytes.to_bytes(8, "little"))


class RowFile:
    """Reads what a RowWriter wrote."""

    def __init__(self, folder: Path) -> None:
        self._offsets: NDArray[np.int64] = aside.mapped(folder / "rows.offsets", "<i8")
        self._map = None
        if len(self):
            with (folder / "rows.jsonl").open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def line(self, i: int) -> bytes:
        if self._map is None or not 0 <= i < len(self):
            raise IndexError(i)
        return self._map[int(self._offsets[i]) : int(self._offsets[i + 1])]

    def row(self, i: int) -> Row:
        return decode(self.line(i))


def encode(row: Row) -> bytes:
    """A row as one line; what JSON cannot hold (lone surrogates, foreign objects) is refused."""
    try:
        return orjson.dumps([row.where, row.value, row.tags], option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        raise InputError(
            f"{row.where}: the row cannot be written as JSON: {error}", "use text, numbers, lists and dicts only"
        ) from None


def decode(line: bytes) -> Row:
    where, value, tags = orjson.loads(line)
    return Row(value, where, tags)


class RowStore:
    """All canonical rows of one source, in their order, however few of them are used.

    `keys` and `whole` are the rows' keys without and with the answer (`checks.row_keys`). `labels`
    are the names in order; row i has the classes `codes[starts[i]:starts[i + 1]]`.
    """

    def __init__(self, path: Path) -> None:
        meta = aside.read_meta(path)
        self.path, self.fingerprint = path, aside.fingerprint(meta)
        self.kind: str = meta["kind"]
        self.format: str = meta["format"]
        self.sources: list[dict[str, Any]] = meta["sources"]
        self.labels: list[str] = meta["labels"]
        self.file = RowFile(path)
        self.keys: Keys = aside.mapped(path / "keys", f"S{KEY_BYTES}")
        self.whole: Keys = aside.mapped(path / "whole", f"S{KEY_BYTES}")
        self.codes: NDArray[np.int32] = aside.mapped(path / "codes", "<i4")
        self.starts: NDArray[np.int64] = aside.mapped(path / "starts", "<i8")

    def __len__(self) -> int:
        return len(self.file)

    def __reduce__(self) -> tuple[type[RowStore], tuple[Path]]:
        return RowStore, (self.path,)

    @property
    def labelled(self) -> bool:
        return self.kind == "label" or bool(self.labels)

    @property
    def stratifies(self) -> bool:
        """Whether each row has exactly one class."""
        return self.format in ("text+label", "text_a+text_b+label")

    def row(self, i: int) -> Row:
        return self.file.row(i)


def write_rows(build: aside.Build, rows: Iterable[Row]) -> dict[str, Any]:
    """Writes a RowStore's files; returns the labels' names for its meta data."""
    lines, keys, whole = RowWriter(build), build.file("keys"), build.file("whole")
    codes, starts = array("i"), array("q", [0])
    names: dict[str, int] = {}
    for row in rows:
        lines.append(encode(row))
        shown, everything = row_keys(row.value)
        keys.write(shown)
        whole.write(everything)
        codes.extend(names.setdefault(label, len(names)) for label in labels_of(row.value))
        starts.append(len(codes))
    order = sorted(names)  # by name: codes must not tell in which order the rows came
    rank = np.empty(len(names), dtype="<i4")
    for place, name in enumerate(order):
        rank[names[name]] = place
    build.file("codes").array(rank[np.frombuffer(codes, dtype=np.intc)] if codes else np.empty(0, dtype="<i4"))
    build.file("starts").array(np.frombuffer(starts, dtype=np.int64).astype("<i8", copy=False))
    return {"labels": order}


def labels_of(value: Mapping[str, Any]) -> list[str]:
    """The classes of a canonical row."""
    return [value["label"]] if "label" in value else value.get("labels", [])
