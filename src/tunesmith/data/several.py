"""Records of several texts as canonical rows: queries with their passages, and two texts to be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.data.fields import Fields

Value = dict[str, Any]


def two_texts(fields: Fields) -> Value:
    return {name: fields.text(name) for name in ("text_a", "text_b")}


def two_texts_label(fields: Fields) -> Value:
    return {**two_texts(fields), "label": fields.label("label")}


def two_texts_score(fields: Fields) -> Value:
    return {**two_texts(fields), "score": fields.number("score")}


def query_positive(fields: Fields) -> Value:
    return _query_with(fields, "positives", fields.texts("positive"), "negatives", fields.texts)


def query_ids(fields: Fields) -> Value:
    return _query_with(fields, "positive_ids", fields.ids("positive_ids"), "negative_ids", fields.ids)


def _query_with(
    fields: Fields, name: str, positives: list[str], negative: str, read: Callable[[str, int], list[str]]
) -> Value:
    negatives = read(negative, 0) if fields.get(negative) is not None else []
    for both in positives:
        if both in negatives:
            raise fields.wrong(negative, f"{both!r:.40} is a positive of the row too", "take it out of one of them")
    value = {"query": fields.text("query"), name: list(dict.fromkeys(positives))}
    return {**value, negative: list(dict.fromkeys(negatives))} if negatives else value


def query(fields: Fields) -> Value:
    return {"query": fields.text("query")}


def passage(fields: Fields) -> Value:
    return {"text": fields.text("text"), **({} if fields.get("id") is None else {"id": fields.label("id")})}
