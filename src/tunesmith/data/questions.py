"""Records of questions -> canonical values: answers that stand in a text, and choices of which one is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tunesmith.data.fields import Fields, shown

Value = dict[str, Any]


def about_text(fields: Fields) -> Value:
    return {"context": fields.text("context"), "question": fields.text("question")}


def answered_in_text(fields: Fields) -> Value:
    """The answers as SQuAD has them; none at all says that the context does not answer the question."""
    value = about_text(fields)
    found = [_placed(fields, place, value["context"], *pair) for place, pair in enumerate(_pairs(fields))]
    return {**value, "answers": [dict(pair) for pair in dict.fromkeys(tuple(answer.items()) for answer in found)]}


def open_choices(fields: Fields) -> Value:
    """A question and two or more texts to choose from, none twice; with a context or without."""
    choices, context = fields.items("choices"), fields.optional_text("context")
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            what = f"a choice must be text, this is {shown(choice)}"
            raise fields.wrong(f"choices[{place}]", what, "write it as a string")
        if choice in choices[:place]:
            raise fields.wrong("choices", f"the choice {choice!r} is given twice", "give each choice once")
    if len(choices) < 2:
        raise fields.wrong("choices", f"there is nothing to choose from: {len(choices)} of them", "give two or more")
    return {"question": fields.text("question"), "choices": choices} | ({} if context is None else {"context": context})


def answered_choices(fields: Fields) -> Value:
    """`label`: the right choice by its position, counted from 0, or by its text."""
    value, label = open_choices(fields), fields.need("label")
    choices: list[str] = value["choices"]
    if isinstance(label, str) and label in choices:
        return {**value, "answer": choices.index(label)}
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return {**value, "answer": label}
    what = f"{shown(label)} is none of the {len(choices)} choices"
    raise fields.wrong("label", what, "give the right choice's position, counted from 0, or its text")


def _pairs(fields: Fields) -> list[tuple[Any, Any]]:
    """Text and start of each answer; no start is None."""
    given = fields.need("answers")
    if isinstance(given, Mapping):
        columns = cast("Mapping[str, Any]", given)
        texts, starts = columns.get("text"), columns.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
        what = f"must have as many texts as starts, this is {shown(given)}"
        raise fields.wrong("answers", what, 'write {"text": [...], "answer_start": [...]}')
    found: list[tuple[Any, Any]] = []
    for answer in fields.items("answers"):
        pair = cast("Mapping[str, Any]", answer) if isinstance(answer, Mapping) else {"text": answer}
        found.append((pair.get("text"), pair.get("answer_start")))
    return found


def _placed(fields: Fields, place: int, context: str, text: Any, start: Any) -> Value:
    """An answer where it is said to stand, or, where that is not said, at the one place where it stands."""
    name = f"answers[{place}]"
    if not isinstance(text, str) or not text.strip():
        raise fields.wrong(name, f"an answer must be text, this is {shown(text)}", "write it as the context has it")
    at = context.find(text)
    if at < 0:
        raise fields.wrong(name, f"the context does not hold {text!r}", "give an answer that stands in the context")
    if start is None and context.find(text, at + 1) < 0:
        return {"text": text, "start": at}
    if start is None:
        what = f"{text!r} stands in the context more than once"
        raise fields.wrong(name, what, 'say where with "answer_start", counted in characters')
    if not isinstance(start, int) or start < 0 or not context.startswith(text, start):
        what = f"{text!r} does not stand at {shown(start)}, but at {at} for the first time"
        raise fields.wrong(name, what, "count the characters (not bytes) before it, or leave answer_start out")
    return {"text": text, "start": start}
