"""Answers that may follow one question: their tokens, and the question's with room for the longest of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.data.chat import Encoded, Renderer

Ids = NDArray[np.int32]


@lru_cache(maxsize=4)
def endings(renderer: Renderer, answers: tuple[str, ...]) -> list[Ids]:
    """The tokens that the model produces for each answer, its end token among them, whatever was asked."""
    found = [_whole(".", answer, renderer) for answer in answers]
    if any(one.cut_trained for one in found):
        raise _no_room(renderer, max(one.cut_trained for one in found))
    return [one.input_ids[one.weights > 0] for one in found]


def beginning(around: tuple[str, str], text: str, answers: tuple[str, ...], renderer: Renderer) -> tuple[Ids, int]:
    """The tokens of a question that all answers follow, and how many of the text's were cut to make room for them.

    The question is the text between the two parts of `around`. InputError: these alone leave no room.
    """
    longest = max(len(ids) for ids in endings(renderer, answers))
    ids = renderer.plain(text)
    kept, shown = len(ids), text
    while True:
        encoded = _whole(shown.join(around), answers[0], renderer)
        count = len(encoded.input_ids) + encoded.cut - _behind(renderer, answers)
        missing = 0 if renderer.sequence_length is None else count + longest - renderer.sequence_length
        if missing <= 0:
            return encoded.input_ids[:count], len(ids) - kept
        if not kept:
            raise _no_room(renderer, missing)
        kept = max(0, kept - missing)  # what is left may take more tokens beside its neighbours than it did
        shown = renderer.decode(ids[:kept]).rstrip("\ufffd")  # half of a character


@lru_cache(maxsize=4)
def _behind(renderer: Renderer, answers: tuple[str, ...]) -> int:
    """Tokens from where the first answer begins to the end of its conversation."""
    found = _whole(".", answers[0], renderer)
    return len(found.input_ids) + found.cut - int(np.flatnonzero(found.weights)[0])


def _whole(question: str, answer: str, renderer: Renderer) -> Encoded:
    return renderer.encode([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _no_room(renderer: Renderer, missing: int) -> InputError:
    return InputError(
        f"what is asked around a text has {missing} tokens more than the {renderer.sequence_length} of "
        "train.sequence_length, its longest answer among them",
        "raise train.sequence_length, or shorten objective.prompt",
    )
