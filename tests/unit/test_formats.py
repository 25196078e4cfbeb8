"""Every data format to its canonical rows, and the place and remedy of each refusal."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tunesmith.data.formats import FORMATS, convert, detect, rows
from tunesmith.errors import InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


def one(raw: dict[str, Any], format: str | None = None, columns: dict[str, str] | None = None) -> dict[str, Any]:
    _, found = rows([(raw, "f.jsonl:1")], format, columns or {})
    return next(found).value


def refused(raw: dict[str, Any], format: str | None = None, columns: dict[str, str] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        one(raw, format, columns)
    return caught.value


@pytest.mark.parametrize("name", FORMATS)
def test_each_sample_is_detected_as_its_format(name: str) -> None:
    """But a passage of a corpus, which looks like any text and is never guessed."""
    sample = json.loads(FORMATS[name].sample)
    assert detect([(sample, "f:1"), (sample, "f:2")]) == ("text" if name == "passage" else name)
    value = convert(sample, name, {}, "f:1")
    assert ("messages" in value) == (FORMATS[name].kind == "messages")
    labelled = FORMATS[name].kind == "label" or name == "text_a+text_b+label"
    assert ("label" in value or "labels" in value) == labelled


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            {"messages": [USER]},
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": False, "id": 7}, USER, ANSWER]},
            {"messages": [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "train": False}, USER, ANSWER]},
        ),
        (
            {
                "messages": [
                    {**USER, "tool_calls": None},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                    {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
                ],
                "tools": '[{"type": "function"}]',
            },
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
                    {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
                ],
                "tools": [{"type": "function"}],
            },
        ),
        (
            {
                "instruction": "Add.",
                "input": "1, 2",
                "output": "3",
                "system": "Be brief.",
                "history": [["Hi", "Hello!"]],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    USER,
                    ANSWER,
                    {"role": "user", "content": "Add.\n\n1, 2"},
                    {"role": "assistant", "content": "3"},
                ]
            },
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello!", "id": 3}, {"messages": [USER, ANSWER]}),
        (
            {
                "system": "S",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "Hello!"},
                ],
            },
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
                    },
                    {"role": "tool", "content": "1"},
                    ANSWER,
                ]
            },
        ),
        ({"prompt": "Hi", "completion": "Hello!"}, {"messages": [USER, ANSWER]}),
        (
            {"prompt": "Hi", "completion": ["Hello!", "Hey.", "Good day."]},
            {"messages": [USER, ANSWER], "other_answers": ["Hey.", "Good day."]},
        ),
        ({"prompt": "Hi", "completion": ["Hello!"]}, {"messages": [USER, ANSWER]}),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER]},
        ),
        ({"text": "a", "label": " x "}, {"text": "a", "label": "x"}),
        ({"text": "a", "label": 3}, {"text": "a", "label": "3"}),
        ({"text": "a", "label": np.int64(3)}, {"text": "a", "label": "3"}),
        ({"text": "a", "label": False}, {"text": "a", "label": "false"}),
        ({"text": "a", "labels": ["x", 2]}, {"text": "a", "labels": ["x", "2"]}),
        ({"text": "a", "labels": []}, {"text": "a", "labels": []}),
        ({"text": " a\n"}, {"text": " a\n"}),
    ],
)
def test_canonical_rows(raw: dict[str, Any], value: dict[str, Any]) -> None:
    assert one(raw) == value


def test_a_column_map_renames() -> None:
    raw = {"question": "a", "intent": 3, "text": "not this"}
    assert one(raw, None, {"text": "question", "label": "intent"}) == {"text": "a", "label": "3"}
    assert one(raw, "text", {"text": "question"}) == {"text": "a"}


def test_a_mapped_column_tells_the_format_that_knows_it() -> None:
    raw = {"text": "fine", "label": "positive", "rating": 2.5}
    assert detect([(raw, "f:1")]) == "text+label"
    assert detect([(raw, "f:1")], {"score": "rating"}) == "text+score"


def test_a_map_to_an_absent_column_names_those_there_and_the_nearest() -> None:
    error = refused({"question": "a", "intent": "b"}, None, {"text": "question", "label": "intend"})
    assert error.cause == "f.jsonl:1: there is no column 'intend', which data.columns gives as 'label'"
    assert error.remedy == "did you mean 'intent'? the row has: question, intent"


def test_names_that_no_format_has() -> None:
    assert refused({"text": "a"}, "alpacca").remedy.startswith("did you mean 'alpaca'? known: messages, sharegpt")
    error = refused({"q": "a"}, None, {"txt": "q"})
    assert error.cause == "data.columns: 'txt' is not a column of any format"
    assert error.remedy.startswith("did you mean 'text'?")
    assert refused({"q": "a"}, "text", {"label": "q"}).cause.endswith("is not a column of the format 'text'")


def test_unknown_columns_are_told_how_to_be_mapped() -> None:
    error = refused({"question": "a", "answer": "b"})
    assert error.cause == "f.jsonl:1: no known format has the columns question, answer"
    assert "data.columns: {prompt: question, completion: answer}" in error.remedy
    assert "data.columns: {text: body, label: queue}" in error.remedy


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ({"text": ""}, "text: the text is empty"),
        ({"text": " \n"}, "text: the text is empty"),
        ({"text": None}, "text: the value is null"),
        ({"text": math.nan}, "text: the value is NaN"),
        ({"text": 3}, "text: must be text, this is int 3"),
        ({"text": "a", "label": None}, "label: the value is null"),
        ({"text": "a", "label": math.nan}, "label: the value is NaN"),
        ({"text": "a", "label": "nan"}, "label: the label is NaN"),
        ({"text": "a", "label": ""}, "label: the text is empty"),
        ({"text": "a", "label": 0.5}, "label: a label must be text or a whole number, this is float 0.5"),
        ({"text": "a", "labels": "x"}, "labels: must be a list, this is str 'x'"),
        ({"text": "a", "labels": ["x", None]}, "labels: a label must be text or a whole number, this is null"),
        ({"text": "a", "labels": ["x", "x"]}, "labels: the label 'x' is given twice"),
        ({"prompt": "a", "completion": ""}, "completion: the text is empty"),
        ({"prompt": None, "completion": "a"}, "prompt: the value is null"),
        ({"prompt": "a", "completion": ["b", ""]}, "completion[1]: must be a text, this is str ''"),
        ({"prompt": "a", "completion": ["b", ANSWER]}, "completion[1]: must be a text, this is dict"),
        ({"prompt": "a", "completion": []}, "completion: the conversation is empty"),
        ({"instruction": "a", "output": None}, "output: the value is null"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]: must be two texts"),
        ({"messages": []}, "messages: the conversation is empty"),
        ({"messages": "Hi"}, "messages: must be a list, this is str 'Hi'"),
        ({"messages": ["Hi"]}, "messages[0]: a turn must be an object, this is str 'Hi'"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1]: no role"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0]: unknown role 'bot'"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content is null"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1]: content is empty"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0]: content is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: content must be text, this is int 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]: a content part of type 'image_url'",
        ),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0]: tool_calls must be a list of objects in an assis"),
        ({"messages": [{**ANSWER, "function_call": {"name": "f"}}]}, "messages[0]: function_call is the old spelling"),
        ({"messages": [{**ANSWER, "train": "no"}]}, "messages[0]: train must be true or false, this is str 'no'"),
        (
            {"messages": [{**ANSWER, "weight": -1}]},
            "messages[0]: weight must be a number of at least 0",
        ),
        (
            {"messages": [{**ANSWER, "train": False, "weight": 2}]},
            "messages[0]: train is false, and weight is 2: one says what the other denies",
        ),
        (
            {"messages": [{**ANSWER, "train": True, "weight": 0}]},
            "messages[0]: train is true, and weight is 0: one says what the other denies",
        ),
        ({"messages": [USER], "tools": "x"}, "tools: not JSON"),
        ({"messages": [USER], "tools": [1]}, "tools: must be a list of objects"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0]: unknown role 'narrator'"),
        ({"conversations": [{"value": "a"}]}, "conversations[0]: no 'from'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: value is missing"),
        ({"conversations": [{"from": "human", "value": ""}]}, "conversations[0]: value is empty"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0]: not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "conversations[0]: a function_call must be"),
    ],
)
def test_refusals_name_place_and_field(raw: dict[str, Any], cause: str) -> None:
    error = refused(raw)
    assert error.cause.startswith(f"f.jsonl:1: {cause}")
    assert error.remedy


@pytest.mark.parametrize("score", ["much", True, "inf", [1]])
def test_a_score_that_is_no_number_is_named(score: Any) -> None:
    with pytest.raises(InputError, match="f:1: score: must be a number, this is"):
        convert({"text": "fine", "score": score}, "text+score", {}, "f:1")


def test_spellings_mixed_up_are_told_apart() -> None:
    assert "data.format: sharegpt" in refused({"messages": [{"from": "human", "value": "a"}]}).remedy
    assert "data.format: messages" in refused({"conversations": [{"role": "user", "content": "a"}]}).remedy
    fixed = one({"conversations": [USER, ANSWER]}, "messages", {"messages": "conversations"})
    assert fixed == {"messages": [USER, ANSWER]}


def test_a_mapped_field_is_called_as_the_file_calls_it() -> None:
    error = refused({"q": "a", "intent": None}, None, {"text": "q", "label": "intent"})
    assert error.cause == "f.jsonl:1: intent: the value is null"


@pytest.mark.parametrize(
    ("second", "what"),
    [
        ({"messages": [USER, ANSWER]}, "a.jsonl:3 is 'messages' (columns: messages)"),
        ({"text": "b"}, "a.jsonl:3 is 'text' (columns: text)"),
        ({"label": "b"}, "a.jsonl:3 lacks 'text' (columns: label)"),
        ({}, "a.jsonl:3 lacks 'text', 'label' (columns: )"),
    ],
)
def test_mixed_schemas_are_refused_with_both_places(second: dict[str, Any], what: str) -> None:
    sample = [
        ({"text": "a", "label": "x"}, "a.jsonl:1"),
        ({"label": "x", "text": "b"}, "a.jsonl:2"),
        (second, "a.jsonl:3"),
    ]
    name, found = rows(sample, None, {})
    assert name == "text+label"
    with pytest.raises(InputError) as caught:
        list(found)
    assert caught.value.cause == f"two schemas in one file: a.jsonl:1 is 'text+label', {what}"
    with pytest.raises(InputError, match="two schemas in one file"):
        detect(sample)


def test_a_given_format_refuses_a_row_that_lacks_its_column() -> None:
    _, found = rows([({"text": "a", "label": "x"}, "a:1"), ({"text": "b", "lable": "x"}, "a:2")], "text+label", {})
    with pytest.raises(InputError) as caught:
        list(found)
    assert caught.value.cause == "a:2: there is no column 'label'"
    assert caught.value.remedy == "did you mean 'lable'? the row has: text, lable"
