"""Text with spans of characters -> tokens with ranges of tokens, as generation would have made them.

The text is tokenised once, with offsets. Where a span begins, the tokens before it must be the ones that the text up
to there has by itself, for that is what generation continues. Added tokens separate what is around them, so this is
looked at from the last added token on. Where it does not hold the text is cut and both sides are tokenised apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from tunesmith.errors import InputError

REMEMBERED_CHARACTERS = 200
REMEMBERED = 1024

Range = tuple[int, int]


class Aligner:
    """A tokenizer without its post-processor, which would add tokens and take spaces out of the offsets."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        self.added: frozenset[int] = frozenset(self.backend.get_added_tokens_decoder())
        self._remembered: dict[str, list[int]] = {}

    def read(self, text: str) -> list[int]:
        """The tokens of a text by itself. Raises InputError for what is not Unicode."""
        return self._encoding(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def align(self, text: str, spans: Sequence[Range], breaks: Iterable[int]) -> tuple[list[int], list[Range]]:
        """Tokens of `text`, of which none crosses a break, and the range of them for each span."""
        cuts = set(breaks)
        tokens = _Tokens(self, text, cuts)
        crossed = {start for start, _ in spans if not tokens.is_prompt(start)}
        if crossed:
            tokens = _Tokens(self, text, cuts | crossed)
        return tokens.ids, [(bisect_left(tokens.starts, a), bisect_left(tokens.starts, b)) for a, b in spans]

    def words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """Tokens of words joined by spaces, and the first token of each word: None where it has none of its own.

        A token of two words is the first one's; a word may be dropped by the tokenizer's normaliser.
        """
        spans: list[Range] = []
        for word in words:
            start = spans[-1][1] + 1 if spans else 0
            spans.append((start, start + len(word)))
        ids, offsets = self.piece(" ".join(words), first=True)
        found: list[int | None] = [None] * len(words)
        at = 0
        for token, (start, stop) in enumerate(offsets):
            while at < len(spans) and (spans[at][1] <= start or (found[at] is not None and spans[at][1] < stop)):
                at += 1
            if at < len(spans) and found[at] is None and spans[at][0] < stop:
                found[at] = token
        return ids, found

    def piece(self, text: str, first: bool) -> tuple[list[int], list[Range]]:
        """Tokens and offsets of a stretch of text that begins the text or goes on from another stretch."""
        if first or self._continues:
            encoding = self._encoding(text)
            return encoding.ids, encoding.offsets
        # Tokenizers in the manner of SentencePiece put a space before any text: let it stand before a line end.
        newline, encoding = self.read("\n"), self._encoding("\n" + text)
        if encoding.ids[: len(newline)] != newline:
            raise InputError(
                "this tokenizer cannot take up a text in the middle, which an answer with leading spaces, or a "
                "special token spelled in a message, asks for",
                "take them out of the row",
            )
        return encoding.ids[len(newline) :], [(max(a - 1, 0), b - 1) for a, b in encoding.offsets[len(newline) :]]

    def remembered(self, text: str) -> list[int]:
        """`read`, for texts that come again and again, such as the header of a turn."""
        if len(text) > REMEMBERED_CHARACTERS:
            return self.read(text)
        if text not in self._remembered:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[text] = self.read(text)
        return self._remembered[text]

    @cached_property
    def _continues(self) -> bool:
        return self.decode(self.read("<") + self.read("|a")) == "<|a"

    def _encoding(self, text: str) -> Any:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"a text cannot be tokenised: {error}", "take lone surrogates out of the text") from error


class _Tokens:
    """The tokens of one text cut at some places. `starts` and `stops` are their characters, in order."""

    def __init__(self, aligner: Aligner, text: str, cuts: set[int]) -> None:
        self.aligner = aligner
        self.text = text
        self.cuts = sorted(cuts - {0, len(text)})
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.stops: list[int] = []
        for a, b in pairwise([0, *self.cuts, len(text)]):
            ids, offsets = aligner.piece(text[a:b] if self.cuts else text, a == 0)
            self.ids += ids
            self.starts += [a + start for start, _ in offsets]
            self.stops += [a + stop for _, stop in offsets]

    def is_prompt(self, place: int) -> bool:
        """Whether the tokens before `place` are those that the text before it has by itself."""
        count = bisect_left(self.starts, place)
        if count and self.stops[count - 1] > place:
            return False
        cut = bisect_left(self.cuts, place + 1)
        floor = self.cuts[cut - 1] if cut else 0
        lead = count - 1
        while lead >= 0 and self.starts[lead] >= floor and self.ids[lead] not in self.aligner.added:
            lead -= 1
        if lead >= 0 and self.starts[lead] >= floor:
            return self.aligner.remembered(self.text[self.starts[lead] : place]) == self.ids[lead:count]
        return self.aligner.piece(self.text[floor:place], floor == 0)[0] == self.ids[lead + 1 : count]


def with_processor(bare: Tokenizer, backend: Tokenizer) -> str:
    """The tokenizer as JSON, without the truncation and padding that an earlier call may have left on it."""
    whole = Tokenizer.from_str(bare.to_str())
    whole.post_processor = backend.post_processor
    return whole.to_str()
