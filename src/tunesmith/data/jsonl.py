"""Strict JSON at orjson's speed: what orjson lets pass (duplicate keys, endless lines) is refused here too."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any, cast

import orjson

from tunesmith.errors import InputError

LINE_LIMIT = 32 * 2**20
DEPTH_LIMIT = 64

# The one byte before a colon that ends a key: the key's closing quote, or white space.
_COLONS = (b'":', b" :", b"\t:", b"\r:", b"\n:")


class _TooDeepError(Exception):
    """Nested beyond DEPTH_LIMIT."""


class _DuplicateError(Exception):
    """A key that stands twice in one object."""


def lines(stream: IO[bytes], name: str) -> Iterator[tuple[bytes, int]]:
    """The lines of a file with their numbers from 1; a byte order mark is taken off.

    A line of more than LINE_LIMIT bytes is refused after reading that much and no more.
    """
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT:
            raise InputError(
                f"{name}:{number}: the line is longer than {LINE_LIMIT // 2**20} MB",
                "write one record a line, and split records that are this long",
            )
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        yield line, number


def read_jsonl(stream: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One JSON object a line -> (record, "name:line"). Lines of white space are passed over."""
    for line, number in lines(stream, name):
        if not line.strip():  # empty too: a file that is nothing but a byte order mark
            continue
        where = f"{name}:{number}"
        yield parse_object(line, where), where


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` holds. Refused: broken JSON or UTF-8, NaN, any key given twice, deep nesting."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _broken(text, where, error) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: a record must be a JSON object, this is {_kind(value)}",
            'write each record as {"column": value, ...}'
            + ", a line each; a JSON array belongs in a .json file" * isinstance(value, list),
        )
    record = cast("dict[str, Any]", value)
    try:
        pairs = _pairs(record, 1)
    except _TooDeepError:
        raise too_deep(where) from None
    # Every pair in the text has one colon of _COLONS, and a string may hold more of them: the sum
    # can only be too high. So an equal count proves that no key was lost, without a second parse.
    if pairs != sum(text.count(colon) for colon in _COLONS):
        _refuse_duplicates(text, where)
    return record


def too_deep(where: str) -> InputError:
    return InputError(
        f"{where}: nested more than {DEPTH_LIMIT} deep", "flatten the record; training data is never so deep"
    )


def _pairs(value: Any, depth: int) -> int:
    """Key-value pairs of an object and all that it holds."""
    if depth > DEPTH_LIMIT:
        raise _TooDeepError
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        count, members = len(inner), inner.values()
    else:
        count, members = 0, cast("list[Any]", value)
    for member in members:
        if member.__class__ is dict or member.__class__ is list:
            count += _pairs(member, depth + 1)
    return count


def _refuse_duplicates(text: bytes, where: str) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise _DuplicateError(key)
                seen.add(key)

    try:
        # Numbers stay text: only keys matter here, and a number of 5,000 digits must not stop it.
        json.loads(text, object_pairs_hook=check, parse_int=str, parse_float=str)
    except _DuplicateError as error:
        raise InputError(
            f"{where}: the key {error.args[0]!r} is given twice in one object", "keep one of the two values"
        ) from None


def _broken(text: bytes, where: str, error: orjson.JSONDecodeError) -> InputError:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as bad:
        return bad_utf8(where, bad.object, bad.start)
    column = error.pos + 1
    rest = text.decode("utf-8")[error.pos :]
    if error.msg.startswith("depth limit"):
        return too_deep(where)
    if "infinity" in error.msg and rest.lstrip("-")[:1].isdecimal():
        return InputError(f"{where} column {column}: a number beyond all bounds", "write it as text, or leave it out")
    if rest.lstrip("-").startswith(("NaN", "Infinity", "nan", "inf")) or "infinity" in error.msg:
        return InputError(
            f"{where} column {column}: NaN and Infinity are not JSON numbers",
            "leave the row out, or write null or a number",
        )
    return InputError(
        f"{where} column {column}: not JSON: {error.msg}",
        "each line must be one whole JSON object; a JSON array belongs in a .json file",
    )


def bad_utf8(where: str, text: bytes, start: int) -> InputError:
    """For the byte at `start` of the line `text`."""
    return InputError(
        f"{where} byte column {start + 1}: not UTF-8 (byte 0x{text[start]:02x})", "save the file again as UTF-8"
    )


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "an array"
    return "null" if value is None else f"the {type(value).__name__} {value!r:.40}"
