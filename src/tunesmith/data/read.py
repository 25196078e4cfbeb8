"""Strict readers: a path, a folder, a hub id or rows in memory -> raw records, each with its place."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.data.hub import hub_folder
from tunesmith.data.jsonl import LINE_LIMIT, bad_utf8, lines, parse_object, read_jsonl, too_deep
from tunesmith.errors import InputError

Raw = tuple[dict[str, Any], str]

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
JSON_LIMIT = 2**30
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class File:
    """A data file and the name that places in it are given by."""

    path: Path
    name: str


def read(source: str | Path, base: Path = Path(), split: str = "train") -> Iterator[Raw]:
    """The records of every file of `source` in order, each with "file:line" (a row number in parquet)."""
    for file in find(str(source), base, split):
        yield from read_file(file)


def read_file(file: File) -> Iterator[Raw]:
    """The records of one file, streamed; a file without any is refused."""
    empty = True
    try:
        for raw in READERS[file.path.suffix.lower()](file.path, file.name):
            empty = False
            yield raw
    except OSError as error:
        raise InputError(
            f"{file.name}: cannot be read: {error.strerror or error}", "check the file and its permissions"
        ) from None
    if empty:
        raise InputError(f"{file.name}: the file holds no rows", "give a file with at least one record")


def read_memory(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Raw]:
    """Rows given in memory; the place is "name[index]" from 0, as in Python."""
    empty = True
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"{name}[{index}]: a row must be a mapping, this is {type(row).__name__}", "give a list of dicts"
            )
        empty = False
        yield dict(row), f"{name}[{index}]"
    if empty:
        raise InputError(f"{name}: there are no rows in memory", "give at least one row")


def fingerprint(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal, streamed."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", "check the file and its permissions") from None


_SHEET = "save the sheet as CSV (UTF-8)"
SAVED_AS = dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), _SHEET) | {
    ".txt": 'write each text as a line of JSON, {"text": ...}, into a .jsonl file'
}  # how what is not read becomes what is

# ---------------------------------------------------------------- which files


def find(source: str, base: Path, split: str) -> list[File]:
    """The files that `source` names, relative to `base`: a file, a folder, or a data set on the hub.

    Of a folder: the files named after `split` (train.jsonl, train-00000-of-00002.parquet), or where
    no file is named after any split, all files of its one kind in the order of their names.
    """
    path = base / Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(
                f"{source}: files of kind {path.suffix or '(none)'!r} are not read",
                f"{SAVED_AS.get(path.suffix.lower(), 'convert it')}; known kinds: {', '.join(READERS)}",
            )
        return [File(path, source)]
    if path.is_dir():
        return _of_folder(path, source, split)
    if path.exists() or path.suffix.lower() in READERS or not _HUB_ID.fullmatch(source):
        raise _absent(source, path)
    return _of_folder(hub_folder(source, path, tuple(READERS)), source, split)


def _of_folder(folder: Path, name: str, split: str) -> list[File]:
    def shown(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READERS and shown(p) and p.is_file())
    if not files:
        raise InputError(f"{name}: the folder holds no data files", f"known kinds: {', '.join(READERS)}")
    by_split = {s: [p for p in files if _is_of(p.relative_to(folder), s)] for s in SPLIT_NAMES}
    if any(by_split.values()):
        files = by_split.get(split, [])
        if not files:
            present = ", ".join(s for s, of in by_split.items() if of)
            raise InputError(
                f"{name}: the folder has files for {present}, none for {split}",
                f"name a file {split}.jsonl, or give the file itself",
            )
    for what, values in {
        "kind": {p.suffix.lower() for p in files},
        "folder": {str(p.parent.relative_to(folder)) for p in files},
    }.items():
        if len(values) > 1:
            raise InputError(
                f"{name}: data files of more than one {what}: {', '.join(sorted(values))}",
                "give the file or the folder inside it that is meant",
            )
    return [File(p, f"{name.rstrip('/')}/{p.relative_to(folder)}") for p in files]


def _is_of(path: Path, split: str) -> bool:
    words = "|".join(SPLIT_NAMES[split])
    return re.match(rf"({words})([-_.].*)?$", path.name, re.IGNORECASE) is not None or path.parent.name == split


def _absent(source: str, path: Path) -> InputError:
    try:
        beside = [p.name for p in path.parent.iterdir()]
    except OSError:
        return InputError(f"{source}: there is no folder {path.parent}", "check the path; it is relative to the recipe")
    # Data files share their endings, so at the usual 0.6 any would be near any other.
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if str(path.absolute()) == source:  # which the cause has already
        return InputError(f"{source}: no such file or folder", hint.strip() or "check the path")
    return InputError(f"{source}: no such file or folder", f"{hint}it was looked for at {path.absolute()}")


# ---------------------------------------------------------------- one reader a kind


def _read_jsonl(path: Path, name: str) -> Iterator[Raw]:
    with path.open("rb") as stream:
        yield from read_jsonl(stream, name)


def _read_json(path: Path, name: str) -> Iterator[Raw]:
    """A list of objects, or {"data": [objects]}. The one kind that is read whole."""
    if path.stat().st_size > JSON_LIMIT:
        raise InputError(
            f"{name}: a .json file of more than {JSON_LIMIT // 2**20} MB",
            "write it as .jsonl, one object a line, which is streamed",
        )
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        start = raw.rfind(b"\n", 0, bad.start) + 1
        line = raw.count(b"\n", 0, bad.start) + 1
        raise bad_utf8(f"{name}:{line}", raw[start:], bad.start - start) from None
    del raw
    seen, line = 0, 1
    for start, stop in _Spans(text, name).items():
        line += text.count("\n", seen, start)
        seen = start
        where = f"{name}:{line}"
        yield parse_object(text[start:stop].encode(), where), where


class _Spans:
    """Where the objects of a JSON list stand in a text, so that each can be parsed by itself with its line."""

    _space = re.compile(r"[ \t\r\n]*")

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name, self._at = text, name, 0
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)

    def items(self) -> Iterator[tuple[int, int]]:
        if self._take("["):
            yield from self._list()
        elif self._take("{"):
            yield from self._data()
        elif self._text.strip():
            raise self._wrong("a .json file must hold a list of objects")
        self._skip()
        if self._at != len(self._text):
            raise self._wrong("more text after the end of the list", "one record a line belongs in a .jsonl file")

    def _data(self) -> Iterator[tuple[int, int]]:
        keys: set[str] = set()
        while not self._take("}"):
            if keys and not self._take(","):
                raise self._wrong("expected a comma")
            self._skip()
            start, stop = self._value()
            if self._text[start] != '"':
                raise self._wrong("expected a key")
            key = str(json.loads(self._text[start:stop]))
            if key in keys:
                raise self._wrong(f"the key {key!r} is given twice", "keep one of the two values")
            keys.add(key)
            if not self._take(":"):
                raise self._wrong("expected a colon")
            if key == "data" and self._take("["):
                yield from self._list()
            else:
                self._value()
        if "data" not in keys:
            self._skip()
            if self._at != len(self._text):
                raise self._wrong("more text after the end of an object", "one record a line belongs in a .jsonl file")
            raise self._wrong('an object without "data"', 'write a list of objects, or {"data": [...]}')

    def _list(self) -> Iterator[tuple[int, int]]:
        first = True
        while not self._take("]"):
            if not first and not self._take(","):
                raise self._wrong("expected a comma or the end of the list")
            first = False
            yield self._value()

    def _value(self) -> tuple[int, int]:
        self._skip()
        start = self._at
        try:
            _, self._at = self._decoder.raw_decode(self._text, start)
        except RecursionError:
            raise too_deep(self._place()) from None
        except json.JSONDecodeError as error:
            self._at = error.pos
            raise self._wrong(f"not JSON: {error.msg}") from None
        return start, self._at

    def _take(self, character: str) -> bool:
        self._skip()
        found = self._text.startswith(character, self._at)
        self._at += found
        return found

    def _skip(self) -> None:
        match = self._space.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _place(self) -> str:
        return f"{self._name}:{self._text.count(chr(10), 0, self._at) + 1}"

    def _wrong(self, what: str, remedy: str = 'write a list of objects, or {"data": [...]}') -> InputError:
        column = self._at - self._text.rfind("\n", 0, self._at)
        return InputError(f"{self._place()} column {column}: {what}", remedy)


def _read_csv(path: Path, name: str) -> Iterator[Raw]:
    with path.open("rb") as stream:
        yield from _delimited(stream, name, ",")


def _read_tsv(path: Path, name: str) -> Iterator[Raw]:
    with path.open("rb") as stream:
        yield from _delimited(stream, name, "\t")


def _delimited(stream: IO[bytes], name: str, delimiter: str) -> Iterator[Raw]:
    csv.field_size_limit(LINE_LIMIT)
    table = csv.reader(_decoded(stream, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in table:
            if row and not header:
                header = _header(row, f"{name}:{line}", delimiter)
            elif row:
                if len(row) != len(header):
                    raise InputError(
                        f"{name}:{line}: {len(row)} fields where the header has {len(header)}",
                        "put double quotes around a field that holds the delimiter or a line break",
                    )
                yield dict(zip(header, row, strict=True)), f"{name}:{line}"
            line = table.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}:{line}: not {_kind(delimiter)}: {error}", "check the quotes of this row") from None


def _kind(delimiter: str) -> str:
    return "CSV" if delimiter == "," else "TSV"


def _header(row: list[str], where: str, delimiter: str) -> list[str]:
    header = [cell.strip() for cell in row]
    twice = [cell for cell in header if header.count(cell) > 1]
    if twice:
        raise InputError(f"{where}: the header has the column {twice[0]!r} twice", "give every column its own name")
    for other in (";", "\t", ","):
        if len(header) == 1 and other != delimiter and other in header[0]:
            raise InputError(
                f"{where}: the header is one column {header[0]!r:.60}",
                "separate the columns by commas (.csv) or by tabs (.tsv)",
            )
    return header


def _decoded(stream: IO[bytes], name: str) -> Iterator[str]:
    for line, number in lines(stream, name):
        if b"\0" in line:
            raise InputError(
                f"{name}:{number} byte column {line.index(0) + 1}: a NUL byte, which no text has",
                "save the file again as UTF-8 text; UTF-16 and a damaged file have such bytes",
            )
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise bad_utf8(f"{name}:{number}", line, bad.start) from None


def _read_parquet(path: Path, name: str) -> Iterator[Raw]:
    import pyarrow as pa  # a second of import time that other kinds need not pay
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for record in cast("list[dict[str, Any]]", batch.to_pylist()):
                    number += 1
                    yield record, f"{name}:{number}"
    except (pa.ArrowException, UnicodeDecodeError) as error:  # Arrow itself takes any bytes for text
        message = str(error).splitlines()[0]
        raise InputError(f"{name}: not a whole parquet file: {message}", "write or download the file again") from None


Reader = Callable[[Path, str], Iterator[Raw]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
