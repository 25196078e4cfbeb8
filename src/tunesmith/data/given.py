"""Rows that a Python program hands over: lists of mappings and tables of any library, as records and as files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunesmith import rundir
from tunesmith.data.formats import FORMATS, Raw, convert, detect, rows
from tunesmith.data.read import read, read_memory
from tunesmith.declared import ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.recipe_keys import SET_NAME
from tunesmith.types import Row

PathLike = str | os.PathLike[str]


class Table(Protocol):
    """A table that speaks Arrow, as those of pandas, polars, pyarrow and duckdb do."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


# What a row of the wrong kind is, by a key of it.
_SAID: Mapping[str, str] = {
    "messages": "a conversation",
    "tokens": "a list of words",
    "query": "a query",
    "text_a": "two texts",
    "choices": "a question with choices",
    "question": "a question about a text",
    "text": "a single text",
}
# What rows to be answered may leave out, or leave empty.
_ANSWERS = ("completion", "output", "label", "labels", "score", "tags", "positive", "positive_ids", "answers")
Rows = Iterable[Mapping[str, Any]] | Table  # a list of mappings, a `datasets.Dataset`, a table


def paths(data: Mapping[str, Rows], cache: Path) -> dict[str, Any]:
    """Rows by split -> the keys that stand under `data` of a recipe, each naming a file in the cache."""
    if not isinstance(data, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"data was given as {type(data).__name__}", 'give rows by split, as in {"train": rows}')
    found: dict[str, Any] = {}
    tests: dict[str, str] = {}
    for split, rows_of in data.items():
        path = str(_stored(rows_of, split, cache))
        if split in ("train", "validation", "corpus"):
            found[split] = path
        else:
            tests[split] = path
    return found | ({"test": tests} if tests else {})


def check_name(name: str) -> None:
    """Refuses the name of a set of rows that could lead out of the folder in which it becomes a file."""
    if not re.fullmatch(SET_NAME, name):
        raise InputError(
            f"rows cannot be called {name!r}", "use a name of letters, digits, dots, dashes and underscores"
        )


def records(given: Rows) -> Iterable[Mapping[str, Any]]:
    """The rows of a list, or of a table by the Arrow PyCapsule protocol, with None for each missing value.

    So none of the libraries that make tables is imported here.
    """
    if not hasattr(given, "__arrow_c_stream__"):
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            raise InputError(f"rows were given as {type(given).__name__}", "give a list of mappings, or a table")
        return given
    import pyarrow as pa

    try:
        table = pa.table(given)
    except (pa.ArrowException, TypeError) as error:
        raise InputError(
            f"a table of {type(given).__module__.partition('.')[0]} cannot be read: {' '.join(str(error).split())}",
            "give each column values of one type",
        ) from error
    return table.select([name for name in table.column_names if not name.startswith("__index_level_")]).to_pylist()


def _stored(given: Rows, split: str, cache: Path) -> Path:
    """The rows as a file in the cache, named by their content, so that a resume finds them."""
    check_name(split)
    lines: list[str] = []
    for index, row in enumerate(records(given)):
        if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{split}[{index}] is a {type(row).__name__}, not a mapping", "give a list of dicts")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise InputError(f"{split}[{index}]: {error}", "give rows of text, numbers, lists and mappings") from error
    content = "".join(lines).encode("utf-8", "surrogatepass")
    path = cache / "given" / hashlib.sha256(content).hexdigest()[:16] / f"{split}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_file(path, content)
    return path


def questions(
    given: PathLike | Rows,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> list[Row]:
    """Rows to be measured, of a file or in memory; a prompt may lack its answer."""
    return list(rows(_askable(_raw(given)), format, columns or {}, tags)[1])


def to_answer(given: PathLike | Rows, columns: Mapping[str, str], format: str | None = None) -> list[Row]:
    """Rows to be answered, of a file or in memory: their answers and labels may lack, of each row by itself.

    `columns` and `format` are those that the model was trained on; rows may have the usual names all the same, and
    another format where they lack a column of that one.
    """
    needed = None if format is None else set(FORMATS[format].required)
    found: list[Row] = []
    for raw, where in _askable(_without_blanks(_renamed(_raw(given), columns))):
        asked_as = format if needed is not None and needed <= raw.keys() else None
        found.append(Row(convert(raw, asked_as or detect([(raw, where)]), {}, where), where))
    return found


def check_kinds(given: Sequence[Row], needs: ObjectiveNeeds, *, asking: bool) -> None:
    """Refuses rows that a model for these needs cannot read, and with `asking` those that ask it nothing."""
    for row in given:
        plain = "text" in row.value and len(row.value) == 1
        if needs.writes and (asking or not plain) and "messages" not in row.value:
            raise InputError(
                f"{row.where}: a row of plain text asks nothing of a model that writes answers",
                'give {"prompt": ...}, which it goes on from, or {"messages": [...]}; how likely a text alone is, '
                "`tunesmith evaluate RUN --data FILE` measures",
            )
        if not needs.writes and not any(row.value.keys() >= set(keys) for keys in needs.asks):
            what = next((said for key, said in _SAID.items() if key in row.value), "such a row")
            asked = ", ".join(f'"{key}": ...' for key in needs.asks[0])
            raise InputError(f"{row.where}: {what} is no {' and '.join(needs.asks[0])} to be read", f"give {{{asked}}}")


def _raw(given: PathLike | Rows) -> Iterator[Raw]:
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return read(path.name, path.resolve().parent, "test")
    return read_memory(records(given), "rows")


def _renamed(found: Iterator[Raw], columns: Mapping[str, str]) -> Iterator[Raw]:
    for raw, where in found:
        here = {usual: own for usual, own in columns.items() if own in raw}
        kept = {name: value for name, value in raw.items() if name not in here.values()}
        yield {**kept, **{usual: raw[own] for usual, own in here.items()}}, where


def _without_blanks(found: Iterator[Raw]) -> Iterator[Raw]:
    for raw, where in found:
        yield {name: value for name, value in raw.items() if not (name in _ANSWERS and _blank(value))}, where


def _blank(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _askable(found: Iterator[Raw]) -> Iterator[Raw]:
    """A prompt without its completion is a conversation that waits for its answer."""
    for raw, where in found:
        if "prompt" in raw and "completion" not in raw and isinstance(raw["prompt"], str):
            yield {"messages": [{"role": "user", "content": raw["prompt"]}]}, where
        elif "instruction" in raw and "output" not in raw and isinstance(raw["instruction"], str):
            asked = "\n\n".join(str(raw[key]) for key in ("instruction", "input") if raw.get(key))
            yield {"messages": [{"role": "user", "content": asked}]}, where
        else:
            yield raw, where
