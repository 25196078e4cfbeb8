"""What an encoder-decoder is shown and what it must say: the tokens of both its sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.encoded import Encoded
from tunesmith.errors import InputError
from tunesmith.types import Example, Piece

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.template import Messages, Tools


def example(messages: Messages, tools: Tools, renderer: Renderer) -> Example:
    """For each answer that is to be learned: all that was said before it in the encoder, the answer in the decoder."""
    pieces: list[Piece] = []
    cut = cut_trained = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", True):
            shown, said = asked(messages[:index], tools, renderer), _answer(message, renderer)
            weights = said.weights * np.float32(message.get("weight", 1))
            pieces += [Piece(shown.input_ids), Piece(said.input_ids, weights, stream="decoder")]
            cut += shown.cut + said.cut
            cut_trained += said.cut_trained
    return Example(tuple(pieces), cut=cut, cut_trained=cut_trained)


def asked(messages: Messages, tools: Tools, renderer: Renderer) -> Encoded:
    """The encoder's side of an answer to these messages.

    Where the tokenizer has a chat template, as that renders them, and never cut; else their texts, a line each, with
    the tokenizer's own tokens around them, cut from the right to the sequence length.
    """
    if renderer.templates:
        ids = renderer.prompt(messages, tools)
        return Encoded(ids, np.zeros(len(ids), np.float32))
    if tools or any(message.get("tool_calls") for message in messages):
        raise InputError("tools need a chat template, and the tokenizer has none", "leave them out of the row")
    return renderer.text("\n".join(_content(message) for message in messages), "encoder")


def answer_of(ids: Sequence[int], renderer: Renderer) -> str:
    """The text of what the decoder said behind its start token, without what the tokenizer puts before every text."""
    before = renderer.around[0]
    return renderer.decode(ids[len(before) :] if before and list(ids[: len(before)]) == before else ids)


def _answer(message: Mapping[str, Any], renderer: Renderer) -> Encoded:
    """The decoder's start token, which is not learned, and the text as the tokenizer closes it."""
    assert renderer.start is not None
    if message.get("tool_calls"):
        raise InputError("an encoder-decoder answers with text, and this answer calls a tool", "leave the row out")
    said = renderer.text(_content(message), "encoder")
    ends = renderer.end_ids
    close = [] if int(said.input_ids[-1]) in ends else ends[-1:]
    ids = np.array([renderer.start, *said.input_ids.tolist(), *close], np.int32)
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0
    return Encoded(ids, weights, said.cut, said.cut_trained)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise InputError("a message without text cannot be shown to an encoder-decoder", "leave the row out")
    return content
