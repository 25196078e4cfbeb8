"""One raw record under a column map: typed access that refuses what is missing, empty or NaN, with its place."""

from __future__ import annotations

import difflib
import math
import numbers
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, cast

from tunesmith.errors import InputError
from tunesmith.types import Row


class Fields:
    """A raw record, its place, and `columns`: canonical name -> the file's own name for it."""

    __slots__ = ("_columns", "_raw", "where")

    def __init__(self, raw: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
        self._raw, self._columns, self.where = raw, columns, where

    def wrong(self, name: str, what: str, remedy: str) -> InputError:
        """An error about the field `name`, called as the file calls it."""
        column = self._columns.get(name, name)
        return InputError(f"{self.where}: {column}: {what}", remedy)

    def get(self, name: str) -> Any:
        """The value, or None where it is absent, null or NaN (which is how tables write absent)."""
        value = self._raw.get(self._columns.get(name, name))
        return None if isinstance(value, float) and math.isnan(value) else value

    def need(self, name: str) -> Any:
        """The value; absent, null and NaN are refused."""
        column = self._columns.get(name, name)
        if column not in self._raw:
            raise absent_column(column, self._raw, self.where)
        value = self._raw[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            what = "null" if value is None else "NaN"
            raise self.wrong(name, f"the value is {what}", "fill it in, or leave the row out")
        return value

    def text(self, name: str) -> str:
        """A text that holds more than white space."""
        value = self.need(name)
        if not isinstance(value, str):
            raise self.wrong(name, f"must be text, this is {shown(value)}", "write it as a string")
        return self._filled(name, value)

    def optional_text(self, name: str) -> str | None:
        """The same, or None where it is absent, null or empty."""
        value = self.get(name)
        return None if value is None or value == "" else self.text(name)

    def label(self, name: str) -> str:
        """A class: text, in Unicode's NFC so that it is one however it is stored; or a whole number as text."""
        return self._label(name, self.need(name))

    def labels(self, name: str) -> list[str]:
        """Several classes of one row, none twice; none at all is an answer too."""
        found = [self._label(name, item) for item in self.items(name)]
        for label in found:
            if found.count(label) > 1:
                raise self.wrong(name, f"the label {label!r} is given twice", "name each label of a row once")
        return found

    def texts(self, name: str, least: int = 1) -> list[str]:
        """A text, or a list of so many or more, each of which holds more than white space."""
        value = self.need(name)
        found: list[Any] = [value] if isinstance(value, str) else self.items(name)
        for index, text in enumerate(found):
            if not isinstance(text, str) or not text or text.isspace():
                place = name if isinstance(value, str) else f"{name}[{index}]"
                raise self.wrong(place, f"must be a text, this is {shown(text)}", "write it, or leave the row out")
        return self._enough(name, found, least)

    def ids(self, name: str, least: int = 1) -> list[str]:
        """The id of a passage, or a list of so many or more: text, or whole numbers turned into their decimal text."""
        value = self.need(name)
        found = [self._label(name, one) for one in (self.items(name) if isinstance(value, list) else [value])]
        return self._enough(name, found, least)

    def words(self, name: str) -> list[str]:
        """The words of a text, one at least, none of them empty."""
        found = self.items(name)
        if not found:
            raise self.wrong(name, "there are no words", "give at least one, or leave the row out")
        for index, word in enumerate(found):
            if not isinstance(word, str) or not word or word.isspace():
                raise self.wrong(f"{name}[{index}]", f"must be a word, this is {shown(word)}", "write it as a string")
        return found

    def word_tags(self, name: str) -> list[str]:
        """Tags of words, in words themselves and without white space."""
        found = self.items(name)
        for index, tag in enumerate(found):
            if not isinstance(tag, str) or tag.split() != [tag]:
                raise self.wrong(
                    f"{name}[{index}]",
                    f"must be a tag without spaces, this is {shown(tag)}",
                    "write tags as B-ORG, I-ORG and O; numbers that stand for tags by their names",
                )
        return [unicodedata.normalize("NFC", tag) for tag in found]

    def number(self, name: str) -> float:
        """A finite number, also one written as text, as tables of text have it."""
        value = self.need(name)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise self.wrong(name, f"must be a number, this is {shown(value)}", "write it as 3 or 3.25")
        return found

    def items(self, name: str) -> list[Any]:
        value = self.need(name)
        if not isinstance(value, list):
            raise self.wrong(name, f"must be a list, this is {shown(value)}", "write it as a JSON array")
        return cast("list[Any]", value)

    def tag(self, name: str) -> str:
        """What a group of rows has in common: a text, number or truth value as text, "" where there is none."""
        if name not in self._raw:
            raise absent_column(name, self._raw, self.where, named="which evaluate or train asks for")
        value = self.get(name)
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: ""}[value]
        if not isinstance(value, str | numbers.Real):
            raise self.wrong(
                name, f"rows are grouped by text or numbers, this is {shown(value)}", "give one, or name another column"
            )
        return str(value)

    def _enough(self, name: str, found: list[str], least: int) -> list[str]:
        if len(found) < least:
            raise self.wrong(name, "the list is empty", "give at least one, or leave the row out")
        return found

    def _label(self, name: str, value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, numbers.Integral):
            return str(int(value))
        if not isinstance(value, str):
            bad = "null" if value is None else shown(value)
            raise self.wrong(name, f"a label must be text or a whole number, this is {bad}", "name the class in words")
        label = unicodedata.normalize("NFC", self._filled(name, value).strip())
        if label.casefold() == "nan":
            raise self.wrong(name, "the label is NaN", "name the class, or leave the row out")
        return label

    def _filled(self, name: str, value: str) -> str:
        if not value or value.isspace():
            raise self.wrong(name, "the text is empty", "fill it in, or leave the row out")
        return value


def absent_column(
    column: str, present: Iterable[str], where: str, mapped_as: str | None = None, named: str = ""
) -> InputError:
    """For a column that a record lacks: names those that it has, and the nearest. `named`: by what it is asked for."""
    have = [str(name) for name in present]
    near = difflib.get_close_matches(column, have, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    mapped = f", which data.columns gives as {mapped_as!r}" if mapped_as else ""
    mapped += f", {named}" * bool(named)
    return InputError(
        f"{where}: there is no column {column!r}{mapped}", f"{hint}the row has: {', '.join(have) or 'none'}"
    )


def shown(value: Any) -> str:
    """A value for an error message: its kind, and a little of it."""
    return f"{type(value).__name__} {value!r:.40}"


def number_of(row: Row, column: str, asked_by: str, above: float = -math.inf) -> float:
    """The number in a column that a row keeps beside its value; InputError for what is none, or not above `above`."""
    text = row.tags[column]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < math.inf:
        least = "a number" if above == -math.inf else f"a number above {above:g}"
        raise InputError(
            f"{row.where}: {column}: {asked_by} must be {least}, this is {text!r}", "mend the row, or leave it out"
        )
    return number
