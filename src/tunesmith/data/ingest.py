"""One data source of a recipe -> its canonical rows on disk, cached by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from pathlib import Path
from typing import Any

import orjson

from tunesmith.data import aside
from tunesmith.data.formats import FORMATS, check_names, rows
from tunesmith.data.read import File, Raw, find, fingerprint, read_file, read_memory
from tunesmith.data.rows import RowStore, write_rows
from tunesmith.errors import InputError
from tunesmith.recipe import Data, TrainingSet

Progress = Callable[[str, int, int | None], None]
Memory = Mapping[str, Sequence[Mapping[str, Any]]]

FOLD = "fold"  # the test set that data.fold takes from train
_TELL_EVERY = 4096


@dataclass(frozen=True, slots=True)
class Given:
    """A source as the recipe gives it: a path or hub id, or rows in memory; `split` is what it is for."""

    split: str
    path: str
    memory: Sequence[Mapping[str, Any]] | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    weight: float = 1.0
    limit: int | None = None
    tags: tuple[str, ...] = ()


def given(
    data: Data,
    memory: Memory | None,
    tags: Sequence[str] = (),
    choosing_tags: Sequence[str] = (),
    training_tags: Sequence[str] = (),
) -> tuple[list[Given], Given | None, dict[str, Given]]:
    """The recipe's training sets, validation file and test sets by name.

    Rows in memory stand for the path of their split: "train", "validation", and any other name is a
    test set's. `tags` are columns that rows to be measured keep: those of test sets, of folds, and validation rows
    where there is neither, which keep `choosing_tags` otherwise; training rows keep `training_tags` and those of the
    rows that are drawn of them.
    """
    held = dict(memory or {})
    drawn = isinstance(data.validation, float) and "validation" not in held
    judged = bool(data.test) or data.fold is not None or bool(held.keys() - {"train", "validation"})
    of_validation = choosing_tags if judged else tags
    of_train = (*(of_validation if drawn else ()), *(tags if data.fold is not None else ()), *training_tags)
    of_train = tuple(dict.fromkeys(of_train))
    kept = {"train": of_train, "validation": tuple(of_validation)}

    def one(split: str, path: str, rows: Sequence[Mapping[str, Any]] | None = None) -> Given:
        return Given(split, path, rows, data.format, data.columns, tags=kept.get(split, tuple(tags)))

    if "train" in held:
        train = [one("train", "train", held.pop("train"))]
    elif isinstance(data.train, str):
        train = [one("train", data.train)]
    else:
        train = [_of_set(item, data, of_train) for item in data.train]
    validation = None
    if "validation" in held:
        validation = one("validation", "validation", held.pop("validation"))
    elif isinstance(data.validation, str):
        validation = one("validation", data.validation)
    paths = {"test": data.test} if isinstance(data.test, str) else dict(data.test or {})
    for name in paths:
        if name in ("train", "validation"):
            raise InputError(f"data.test: a test set cannot be called {name!r}", "give it another name")
    if data.fold is not None and FOLD in {*paths, *held}:
        raise InputError(f"data.test has a set called {FOLD!r}, and so is what data.fold takes", "give it another name")
    tests = {name: one("test", path) for name, path in paths.items()}
    tests.update({name: one("test", name, rows) for name, rows in held.items()})
    return train, validation, tests


def ingest(source: Given, base: Path, cache: Path, tell: Progress) -> RowStore:
    """The canonical rows of `source`, read and checked once for each content, format and column map."""
    check_names(source.format, source.columns)
    files = [] if source.memory is not None else find(source.path, base, source.split)
    sources: list[dict[str, Any]] = [{"name": f.name, "sha256": fingerprint(f.path)} for f in files]
    if source.memory is not None:
        sources = [{"name": source.path, "sha256": _fingerprint_of_memory(source.memory, source.path)}]
    made_of = {"format": source.format, "columns": dict(source.columns), "tags": source.tags}
    key = digest({"code": code_version(), "sources": sources, **made_of})
    path = cache / "rows" / key

    def make(build: aside.Build) -> dict[str, Any]:
        name, found = rows(_counted(source, files, sources, tell), source.format, source.columns, source.tags)
        return {**write_rows(build, found), "format": name, "kind": FORMATS[name].kind, "sources": sources}

    aside.open_or_build(path, make)
    return RowStore(path)


def digest(value: Any) -> str:
    """sha256 of anything that fits in JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


@once
def source_version(folder: Path) -> str:
    """sha256 of the Python files below a folder: what they make is made anew when they change."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def code_version() -> str:
    """That of this package."""
    return source_version(Path(__file__).parent)


def _of_set(item: TrainingSet, data: Data, tags: tuple[str, ...]) -> Given:
    columns = item.columns or data.columns
    return Given("train", item.path, None, item.format or data.format, columns, item.weight, item.limit, tags)


def _counted(source: Given, files: Sequence[File], sources: list[dict[str, Any]], tell: Progress) -> Iterator[Raw]:
    """The raw records of all files; fills in how many rows each has."""
    if source.memory is not None:
        streams = [read_memory(source.memory, source.path)]
    else:
        streams = [read_file(file) for file in files]
    total = 0
    for entry, stream in zip(sources, streams, strict=True):
        entry["rows"] = 0
        for raw in stream:
            entry["rows"] += 1
            total += 1
            if total % _TELL_EVERY == 0:
                tell(f"reading {entry['name']}", total, None)
            yield raw
    tell(f"reading {source.path}", total, total)


def _fingerprint_of_memory(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    total = hashlib.sha256()
    for raw, where in read_memory(rows, name):
        try:
            total.update(orjson.dumps(raw, default=repr, option=options))
        except orjson.JSONEncodeError as error:
            raise InputError(
                f"{where}: the row cannot be written as JSON: {error}", "use text, numbers, lists and dicts only"
            ) from None
    return total.hexdigest()
