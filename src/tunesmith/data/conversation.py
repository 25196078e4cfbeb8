"""The turns of a conversation as data files spell them -> canonical messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import orjson

from tunesmith.data.fields import Fields, shown

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# What else of a message reaches the template. Anything more (ids, time stamps) says nothing to the model.
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")

Message = dict[str, Any]
ReadTurn = Callable[[Fields, str, Mapping[str, Any]], Message]


def messages(fields: Fields, name: str) -> list[Message]:
    """OpenAI's spelling: role and content, with tool calls."""
    return _turns(fields, name, _openai)


def sharegpt(fields: Fields, name: str) -> list[Message]:
    """ShareGPT's spelling: from and value."""
    return _turns(fields, name, _sharegpt)


def tools(fields: Fields) -> dict[str, Any]:
    """{"tools": [...]} where the record declares tools (a list, or its JSON text), else {}."""
    value = fields.get("tools")
    if isinstance(value, str) and value.strip():
        value = _json(fields, "tools", value)
    if value is None or value in ("", []):
        return {}
    if not _is_objects(value):
        raise fields.wrong(
            "tools", f"must be a list of objects, this is {shown(value)}", "give the tools' JSON schemas"
        )
    return {"tools": value}


def untrained(turns: list[Message]) -> list[Message]:
    """The same turns, none of whose answers is to be learned."""
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in turns]


def _turns(fields: Fields, name: str, read: ReadTurn) -> list[Message]:
    items = fields.items(name)
    if not items:
        raise fields.wrong(name, "the conversation is empty", "give at least one turn, or leave the row out")
    found: list[Message] = []
    for index, item in enumerate(items):
        at = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise fields.wrong(at, f"a turn must be an object, this is {shown(item)}", "write each turn as an object")
        turn = cast("dict[str, Any]", item)
        message = read(fields, at, turn)
        found.append(message | _weight(fields, at, turn, message["role"]))
    return found


def _openai(fields: Fields, at: str, turn: Mapping[str, Any]) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        remedy = 'give each turn "role" and "content"'
        if "from" in turn:
            remedy = (
                "this is sharegpt's spelling: set data.format: sharegpt and data.columns: {conversations: messages}"
            )
        elif role is not None:
            remedy = f"known roles: {', '.join(ROLES)}"
        raise fields.wrong(at, f"unknown role {role!r}" if role is not None else "no role", remedy)
    if turn.get("function_call"):
        raise fields.wrong(at, "function_call is the old spelling of a tool call", 'write it as "tool_calls": [...]')
    message: Message = {"role": role, "content": _content(fields, at, turn)}
    message.update({key: turn[key] for key in _KEPT if turn.get(key) not in (None, [])})
    if "tool_calls" in message and (role != "assistant" or not _is_objects(message["tool_calls"])):
        raise fields.wrong(at, "tool_calls must be a list of objects in an assistant's turn", "mend the turn")
    return message


def _content(fields: Fields, at: str, turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined(fields, at, cast("list[Any]", content))
    if content is None or content == "":
        if turn.get("tool_calls") and turn.get("role") == "assistant":
            return ""
        what = "empty" if content == "" else "null" if "content" in turn else "missing"
        raise fields.wrong(at, f"content is {what}", "fill it in, or leave the turn out")
    if not isinstance(content, str):
        raise fields.wrong(at, f"content must be text, this is {shown(content)}", "write it as a string")
    return _filled(fields, at, "content", content)


def _joined(fields: Fields, at: str, parts: list[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        entry = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        text = entry.get("text")
        if entry.get("type") != "text" or not isinstance(text, str):
            kind = entry.get("type", type(part).__name__)
            raise fields.wrong(at, f"a content part of type {kind!r}", 'only {"type": "text", "text": ...} is learned')
        texts.append(text)
    return "".join(texts)


def _sharegpt(fields: Fields, at: str, turn: Mapping[str, Any]) -> Message:
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        remedy = f"known roles: {', '.join(SHAREGPT_ROLES)}"
        if "role" in turn:
            remedy = "these are messages: set data.format: messages and data.columns: {messages: conversations}"
        raise fields.wrong(at, f"unknown role {speaker!r}" if "from" in turn else "no 'from'", remedy)
    value = turn.get("value")
    if not isinstance(value, str):
        what = "missing" if "value" not in turn else f"not text: {shown(value)}"
        raise fields.wrong(at, f"value is {what}", "write it as a string, or leave the row out")
    value = _filled(fields, at, "value", value)
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value}
    call = _json(fields, at, value)
    if not isinstance(call, dict) or "name" not in call:
        raise fields.wrong(
            at, "a function_call must be an object with a name", 'as in {"name": "search", "arguments": {}}'
        )
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}


def _weight(fields: Fields, at: str, turn: Mapping[str, Any], role: str) -> Message:
    """How much the turn counts in the loss; `train: false` or a weight of 0: it is context and not to be learned."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise fields.wrong(at, f"train must be true or false, this is {shown(train)}", "mend the turn")
    if isinstance(train, bool) and weight is not None and train != bool(weight):
        said = f"train is {str(train).lower()}, and weight is {weight!r:.40}"
        raise fields.wrong(at, f"{said}: one says what the other denies", "keep one of them")
    if train is False or weight == 0:
        return {"train": False}
    if weight is None or weight == 1:
        return {}
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise fields.wrong(at, f"weight must be a number of at least 0, this is {shown(weight)}", "mend the turn")
    if role != "assistant":
        raise fields.wrong(at, f"a weight on a turn of the {role}, which is not learned", "leave it out")
    return {"weight": float(weight)}


def _filled(fields: Fields, at: str, key: str, text: str) -> str:
    if not text or text.isspace():
        raise fields.wrong(at, f"{key} is empty", "fill it in, or leave the turn out")
    return text


def _json(fields: Fields, at: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise fields.wrong(at, f"not JSON: {error.msg}", "write it as JSON, or leave the row out") from None


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in cast("list[Any]", value))
