"""Normalised hashes of rows: which rows say the same, inside one split and across two."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

KEY_BYTES = 16
Keys = NDArray[np.bytes_]  # of dtype S16: fixed width, so equal bytes are equal keys


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, runs of white space made one space, none at the ends."""
    if not text.isascii():  # ASCII is NFKC already
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def row_keys(value: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The keys of a canonical row: of what the model is shown, and of that with the answer.

    Shown are the messages before the last assistant's, and the tools; or the text or words without labels, score and
    tags; or the query without its passages; or a question with its context and choices. Where nothing that tells rows
    apart comes before the answer, both keys are of the whole.
    """
    if "messages" in value:
        return _conversation_keys(value["messages"], value.get("tools"), value.get("other_answers", ()))
    text = _shown(value)
    shown = hashlib.blake2b(normalise(text).encode(), digest_size=KEY_BYTES)
    whole = shown.copy()
    for label in [value["label"]] if "label" in value else sorted(value.get("labels", [])):
        whole.update(b"\x1e" + label.encode())
    if "score" in value:
        whole.update(b"\x1e" + repr(value["score"]).encode())
    for name in ("positives", "positive_ids", "negatives", "negative_ids"):
        for passage in value.get(name, []):
            whole.update(b"\x1e" + name.encode() + b"\x1f" + passage.encode())
    if "tags" in value:
        whole.update(b"\x1e" + " ".join(value["tags"]).encode())
    if "answer" in value:
        whole.update(b"\x1e" + str(value["answer"]).encode())
    for answer in value.get("answers", []):
        whole.update(b"\x1e%d\x1f%s" % (answer["start"], answer["text"].encode()))
    return shown.digest(), whole.digest()


def _both(value: Mapping[str, Any]) -> str:
    """Two texts as one that no other two are."""
    return f"{len(value['text_a'])} {value['text_a']} {value['text_b']}" if "text_a" in value else ""


def duplicates(keys: Keys) -> NDArray[np.int64]:
    """Indices, ascending, of the keys that stand earlier in the array too."""
    _, first = np.unique(keys, return_index=True)
    later = np.ones(len(keys), dtype=bool)
    later[first] = False
    return np.flatnonzero(later)


def contradicting(keys: Keys, whole: Keys) -> list[NDArray[np.int64]]:
    """Of rows that show the same and are answered differently, the indices; a group for each thing shown."""
    shown_N = np.unique(keys, return_inverse=True)[1]
    answer_N = np.unique(whole, return_inverse=True)[1]
    pairs_P = np.unique(np.column_stack([shown_N, answer_N]), axis=0)
    several = np.flatnonzero(np.bincount(pairs_P[:, 0]) > 1)
    order = np.argsort(shown_N, kind="stable")
    starts = np.searchsorted(shown_N[order], several)
    stops = np.searchsorted(shown_N[order], several, side="right")
    return [order[start:stop] for start, stop in zip(starts, stops, strict=True)]


def shared(keys: Keys, others: Keys) -> NDArray[np.int64]:
    """Indices, ascending, of the `keys` that stand among the `others`."""
    return np.flatnonzero(np.isin(keys, others))


def as_keys(joined: bytes | bytearray) -> Keys:
    """Keys laid end to end -> an array of them."""
    return np.frombuffer(bytes(joined), dtype=f"S{KEY_BYTES}")


def _shown(value: Mapping[str, Any]) -> str:
    if "question" in value:
        return "\x1f".join([value["question"], value.get("context", ""), *value.get("choices", [])])
    return value.get("text") or value.get("query") or _both(value) or " ".join(value["tokens"])


def _conversation_keys(messages: Sequence[Mapping[str, Any]], tools: Any, others: Sequence[str]) -> tuple[bytes, bytes]:
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    digest = hashlib.blake2b(orjson.dumps(tools, option=orjson.OPT_SORT_KEYS) if tools else b"", digest_size=KEY_BYTES)
    for message in messages[:last]:
        digest.update(_said(message))
    asked = any(message["role"] in ("user", "tool") for message in messages[:last])
    shown = digest.digest()
    for message in messages[last:]:
        digest.update(_said(message))
    for answer in others:
        digest.update(b"\x1d" + normalise(answer).encode())
    whole = digest.digest()
    return (shown if asked else whole), whole


def _said(message: Mapping[str, Any]) -> bytes:
    calls = message.get("tool_calls")
    tail = orjson.dumps(calls, option=orjson.OPT_SORT_KEYS) if calls else b""
    return b"\x1e%s\x1f%s\x1f%s" % (message["role"].encode(), normalise(message["content"]).encode(), tail)
