"""Two texts in one piece: what stands around and between them, and what of each where room is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of a second text behind the first one. `characters`: where its tokens, from `begin` on, stand in it.

    `typed_from`: as in `Piece`.
    """

    input_ids: NDArray[np.int32]
    begin: int
    characters: Sequence[tuple[int, int]]
    typed_from: int


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens before, between and behind two texts. `typed`: from the second text on, token types are 1."""

    before: Sequence[int]
    between: Sequence[int]
    after: Sequence[int]
    typed: bool = False

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def lay_out(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], int]:
        """The tokens of the piece, and where the second text begins among them."""
        opening = [*self.before, *first, *self.between]
        return [*opening, *second, *self.after], len(opening)

    def windows(
        self, first: Sequence[int], second: Sequence[int], characters: Sequence[tuple[int, int]], room: int, stride: int
    ) -> Iterator[Window]:
        """The second text in stretches of what is left of `room`, `stride` tokens (or all of it) apart."""
        space = max(1, room - len(first))
        for start in range(0, max(1, len(second) - space + min(stride, space)), min(stride, space)):
            part = slice(start, start + space)
            ids, begin = self.lay_out(first, second[part])
            yield Window(np.array(ids, np.int32), begin, characters[part], begin if self.typed else 0)


def frame_of(tokenizer: Tokenizer, with_types: bool) -> Frame:
    """What a tokenizer's post-processor puts around two texts, read off a pair of one letter each.

    `with_types`: the model is given the tokenizer's token types. Raises InputError where these tell two texts apart
    otherwise than by 0 up to the second one and 1 from there on.
    """
    found = tokenizer.encode("a", "a")
    first = [place for place, text in enumerate(found.sequence_ids) if text == 0]
    second = [place for place, text in enumerate(found.sequence_ids) if text == 1]
    types = found.type_ids if with_types else [0] * len(found.ids)
    expected = [int(place >= second[0]) for place in range(len(types))]
    if any(types) and types != expected:
        raise InputError(
            f"the tokenizer gives two texts the token types {', '.join(map(str, types))}, not 0 and then 1",
            "use a base whose tokenizer numbers its texts as BERT's does",
        )
    ids = found.ids
    return Frame(ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :], any(types))


def kept(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts keep of those they have: the longer one is cut first, then both, to halves of the room.

    As transformers' `longest_first`: an odd token is the longer text's, of equals the second's.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)
