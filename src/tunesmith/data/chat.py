"""Messages or text -> tokens and per-token weights: the one place where it is decided which tokens are trained.

An assistant turn is trained from where its generation prompt ends through its end token, with its weight (1 if it
has none), unless it carries `"train": false`. `turns.py` finds those characters, `align.py` their tokens, so that the
tokens of `prompt` are always the first tokens of `encode`. An empty thinking block that the template's prompt for
answers without thinking writes (Qwen3 with `enable_thinking` off) belongs to the prompt: it is not trained, and
`prompt(..., thinking=False)` ends with it. Thinking that the template keeps is trained.

Text in a message that spells a control token is tokenised as text. BOS comes once: the template writes it or, where
the tokenizer puts one before any text and the template does not, it is added here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.data.align import Aligner, with_processor
from tunesmith.data.encoded import Encoded, Words
from tunesmith.data.template import Messages, Tools, templates_of
from tunesmith.data.turns import Rendering, Turns
from tunesmith.data.two_texts import Frame, Window, frame_of, kept
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # part of the fingerprint: raise it when the same input comes to give other tokens or weights

# Without a template: every other text on a line of its own, then the answer and EOS.
PLAIN = (
    "{% if tools %}{{ raise_exception('tools need a chat template') }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{{ raise_exception('tool calls need a chat template') }}{% endif %}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}"
    "{% endfor %}"
)

Kind = Literal["encoder", "decoder"]


class Renderer:
    """One tokenizer with one template, cut to one length. It can be pickled.

    `template` is a jinja text, or the path of a file with one; it stands in for the tokenizer's own. `start` is the
    token that the decoder of an encoder-decoder begins with; None for other models.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        sequence_length: int | None = None,
        start: int | None = None,
    ) -> None:
        self._set_up(tokenizer, templates_of(tokenizer, template), sequence_length, start)

    def _set_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str],
        sequence_length: int | None,
        start: int | None,
    ) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError(
                f"{type(tokenizer).__name__} has no tokenizer.json: its tokens cannot be traced to characters",
                "use a model folder with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.templates = templates
        self.sequence_length, self.start = sequence_length, start
        self._special_tokens = tokenizer.special_tokens_map
        self._aligner = Aligner(backend)
        self._json = with_processor(self._aligner.backend, backend)
        # What the tokenizer itself puts around a text, read off a text of one letter.
        letter, whole = self._aligner.read("a"), Tokenizer.from_str(self._json).encode("a").ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(letter)] == letter), 0)
        self._before, self._after = whole[:at], whole[at + len(letter) :]
        self._turns: dict[str, Turns] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("tokenizer", "templates", "sequence_length", "start")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._set_up(**state)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which tokens and weights an input gives."""
        parts = [VERSION, self._json, self._special_tokens, self.templates, self.sequence_length]
        parts += [] if self.start is None else [self.start]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end an assistant turn: the template's own first, then EOS. InputError if it has none."""
        own = [self._aligner.backend.token_to_id(end) for end in self._turns_for(None).shape.ends]
        return list(dict.fromkeys(i for i in (*own, self._eos) if i is not None))

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind any text."""
        return self._before, self._after

    @property
    def pad_id(self) -> int:
        """A token to fill with. Text may have it too (often it is EOS): padding is told by segment and weight."""
        own: Any = self.tokenizer.pad_token_id
        return next(int(i) for i in (own, self._eos, 0) if i is not None)

    @property
    def kind(self) -> Kind:
        """An encoder's tokenizer is known by having both CLS and SEP."""
        return "encoder" if {"cls_token", "sep_token"} <= self._special_tokens.keys() else "decoder"

    def encode(self, messages: Messages, tools: Tools = None) -> Encoded:
        """The tokens of a whole conversation, cut from the right to the sequence length.

        Raises InputError if the template refuses the messages, or if what is trained cannot be told exactly.
        """
        turns = self._turns_for(tools)
        ids, ranges = self._tokens(turns.lay_out(_checked(messages), tools), turns)
        weights = np.zeros(len(ids), np.float32)
        learned = [m for m in messages if m["role"] == "assistant" and m.get("train") is not False]
        for message, (start, stop) in zip(learned, ranges, strict=True):
            weights[start:stop] = message.get("weight", 1)
        return self._cut(ids, weights)

    def prompt(self, messages: Messages, tools: Tools = None, thinking: bool | None = None) -> NDArray[np.int32]:
        """The tokens that the next answer follows, generation prompt included; never cut.

        `thinking` turns the template's switch, if it has one; None leaves it at the template's default. Raises
        InputError if the last message is the assistant's, or the prompt is longer than the sequence length.
        """
        if _checked(messages)[-1]["role"] == "assistant":
            raise InputError("the messages of a prompt end with an assistant turn", "leave out the answer")
        turns = self._turns_for(tools)
        ids, _ = self._tokens(turns.lay_out(messages, tools, prompt=True, thinking=thinking), turns)
        if self.sequence_length is not None and len(ids) > self.sequence_length:
            raise InputError(
                f"a prompt has {len(ids)} tokens, more than the sequence length of {self.sequence_length}",
                "raise train.sequence_length, or take the row out",
            )
        return np.array(ids, np.int32)

    def text(self, text: str, special: Kind | None = None) -> Encoded:
        """Plain text as the tokenizer itself reads it, special tokens spelled in it included.

        encoder: with the tokenizer's own tokens around it (CLS, SEP), which stay when the text is cut.
        decoder: with BOS if the tokenizer puts one and with EOS at the end, neither twice; only BOS has weight 0.
        """
        ids = self._aligner.read(text)
        if (special or self.kind) == "encoder":
            first = self._stretches(ids)[0]
            return self._framed(first, len(ids) - len(first))
        return self._cut(*self._document(ids))

    def stretches(self, text: str, stride: int | None = None) -> list[NDArray[np.int32]]:
        """A text as `text` reads it; where that would cut it, windows of the sequence length, each a text by itself.

        Windows begin `stride` tokens apart (None: as many as fit, so that none is read twice). The last one ends with
        the text and is as long as the others. InputError: a stride that would pass over tokens.
        """
        whole = self.text(text)
        if not whole.cut:
            return [whole.input_ids]
        encoder, ids = self.kind == "encoder", self._aligner.read(text)
        before, after = (self._before, self._after) if encoder else (self._opening([]), self._end())
        room = (self.sequence_length or 0) - len(before) - len(after)
        if room < 1:
            raise self._no_room(len(before) + len(after))
        last = len(ids) - room
        parts = [ids[at : at + room] for at in (*range(0, last, self._step(stride or room, room)), last)]
        return [np.array([*before, *p, *after] if encoder else self._document(p)[0], np.int32) for p in parts]

    def pair(self, first: str, second: str) -> Encoded:
        """Two texts in one piece, all of it of weight 1; the longer one is cut first.

        encoder: exactly as the tokenizer puts two texts together, token types included. decoder: the texts on a line
        each, with BOS if the tokenizer puts one and EOS at the end.
        """
        frame = self._pair_frame
        first_ids, second_ids = self._aligner.read(first), self._second(second)[0]
        total = len(first_ids) + len(second_ids)
        of_first, of_second = kept(len(first_ids), len(second_ids), self._room(frame, total))
        ids, begin = frame.lay_out(first_ids[:of_first], second_ids[:of_second])
        cut = total - of_first - of_second
        ones = np.ones(len(ids), np.float32)
        return Encoded(np.array(ids, np.int32), ones, cut, cut, begin if frame.typed else 0)

    def passages(self, first: str, second: str, stride: int | None = None) -> tuple[list[Window], int]:
        """Two texts as `pair` puts them together, in windows over the second one where it is long.

        The first stands in each of them, cut to half of the room; how many tokens that took comes beside. Windows
        begin `stride` tokens of the second text apart (None: a third of the sequence length), less where less fits.
        """
        frame = self._pair_frame
        first_ids, (second_ids, characters) = self._aligner.read(first), self._second(second)
        room = self._room(frame, total := len(first_ids) + len(second_ids))
        of_first = len(first_ids) if total <= room else min(len(first_ids), room // 2)
        step = max(1, (self.sequence_length or 1) // 3) if stride is None else stride
        if total > room:
            self._step(step, room)
        windows = frame.windows(first_ids[:of_first], second_ids, characters, room, step)
        return list(windows), len(first_ids) - of_first

    def windows(self, text: str) -> list[Encoded]:
        """A document as `text` reads one, in windows of the sequence length instead of cut.

        encoder: windows follow each other, the tokenizer's own tokens around each. decoder: a window begins with the
        last token of the one before, which is shown there and not learned again.
        """
        if self.kind == "encoder":
            return [self._framed(ids) for ids in self._stretches(self._aligner.read(text))]
        ids, weights = self._document(self._aligner.read(text))
        length = len(ids) if self.sequence_length is None else self.sequence_length
        if self.sequence_length == 1 and len(ids) > 1:
            raise InputError("no token of a window of one token follows another", "raise train.sequence_length")
        found = [Encoded(np.array(ids[:length], np.int32), weights[:length])]
        for start in range(length - 1, len(ids) - 1, length - 1):
            own = weights[start : start + length].copy()
            own[0] = 0
            found.append(Encoded(np.array(ids[start : start + length], np.int32), own))
        return found

    def words(self, words: Sequence[str]) -> list[Words]:
        """Words joined by spaces, in windows of the sequence length that begin with a word where they can.

        An encoder's tokenizer puts its own tokens around each window, a decoder's its BOS before it. A word may have
        no token; no window where no word has one.
        """
        ids, first = self._aligner.words(words)
        before, after = (self._before, self._after) if self.kind == "encoder" else (self._opening([]), [])
        room = len(ids) if self.sequence_length is None else self.sequence_length - len(before) - len(after)
        if ids and room < 1:
            raise self._no_room(len(before) + len(after))
        begins = {token: word for word, token in enumerate(first) if token is not None}
        found: list[Words] = []
        start = 0
        while start < len(ids):
            stop = min(start + room, len(ids))
            if stop < len(ids):
                stop = max((token for token in begins if start < token <= stop), default=stop)
            places = {word: len(before) + at - start for at, word in begins.items() if start <= at < stop}
            found.append(Words(np.array([*before, *ids[start:stop], *after], np.int32), places))
            start = stop
        return found

    def _stretches(self, ids: list[int]) -> list[list[int]]:
        """The tokens in stretches that have room between the tokenizer's own, one at least."""
        around = len(self._before) + len(self._after)
        if self.sequence_length is not None and self.sequence_length <= around:
            raise self._no_room(around)
        room = max(1, len(ids) if self.sequence_length is None else self.sequence_length - around)
        return [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]

    def _framed(self, ids: list[int], cut: int = 0) -> Encoded:
        """A stretch of tokens with the tokenizer's own around it."""
        ids = [*self._before, *ids, *self._after]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.float32), cut, cut)

    def _document(self, ids: list[int]) -> tuple[list[int], NDArray[np.float32]]:
        """With BOS if the tokenizer puts one and with EOS at the end, neither twice; only BOS has weight 0."""
        end = self._end()
        ids = [*self._opening(ids), *ids, *([] if ids[-1:] == end else end)]
        weights = np.ones(len(ids), np.float32)
        if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id:
            weights[0] = 0
        return ids, weights

    @cached_property
    def _pair_frame(self) -> Frame:
        if self.kind == "encoder":
            named: Sequence[str] = self.tokenizer.model_input_names
            return frame_of(Tokenizer.from_str(self._json), "token_type_ids" in named)
        return Frame(self._opening([]), self._aligner.piece("\n", first=False)[0], self._end())

    def _room(self, frame: Frame, tokens: int) -> int:
        """For how many of so many tokens there is room inside a frame: two at least."""
        room = tokens if self.sequence_length is None else self.sequence_length - len(frame)
        if self.sequence_length is not None and room < 2:
            raise self._no_room(len(frame))
        return room

    def _second(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the second of two texts with their characters; a decoder's goes on behind a line end."""
        return self._aligner.piece(text, first=self.kind == "encoder")

    def plain(self, text: str) -> list[int]:
        """The tokens of a text alone, nothing put around it and nothing cut."""
        return self._aligner.read(text)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Exactly the text of the tokens, special ones included."""
        return self._aligner.decode([int(i) for i in ids])

    def show(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """The stretches of an example as text, and whether each is trained."""
        trained = encoded.weights > 0
        edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
        return [(self.decode(encoded.input_ids[a:b]), bool(trained[a])) for a, b in pairwise(edges) if a < b]

    @property
    def _eos(self) -> int | None:
        eos: Any = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    def _turns_for(self, tools: Tools) -> Turns:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self._turns:
            if not self.templates and self._eos is None:
                raise InputError(
                    "the tokenizer has neither a chat template nor an EOS token, so an answer would have no end",
                    "give a template with data.template",
                )
            added = list(self._aligner.backend.get_added_tokens_decoder().values())
            self._turns[name] = Turns(
                self.templates.get(name, PLAIN),
                self._special_tokens,
                [str(token.content) for token in added if token.special],
                [str(token.content) for token in added],
            )
        return self._turns[name]

    def _tokens(self, rendering: Rendering, turns: Turns) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens with BOS, and the ranges of them that are to be produced."""
        ids, ranges = self._aligner.align(rendering.text, rendering.spans, rendering.breaks)
        ends = {*self.end_ids, *(self._aligner.backend.token_to_id(end) for end in turns.shape.ends)}
        for _, stop in ranges:
            if ids[stop - 1] not in ends:
                raise InputError(
                    f"an answer ends with the token {self.decode(ids[stop - 1 : stop])!r}, not with its end token",
                    "give a template with data.template that ends answers with a special token",
                )
        opening = self._opening(ids)
        return [*opening, *ids], [(len(opening) + start, len(opening) + stop) for start, stop in ranges]

    def _opening(self, ids: Sequence[int]) -> list[int]:
        """The BOS that the tokenizer puts before any text, unless it is there."""
        bos: Any = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self._before and list(ids[:1]) != [bos] else []

    def _end(self) -> list[int]:
        if self._eos is None:
            raise InputError("the tokenizer has no EOS token, so a text has no end", "set eos_token in its config")
        return [self._eos]

    def _step(self, stride: int, room: int) -> int:
        if stride > room:
            raise InputError(
                f"objective.stride is {stride}, and a window has room for {room} tokens, so some would be left out",
                f"set objective.stride to {room} or less, or leave it out",
            )
        return stride

    def _no_room(self, around: int) -> InputError:
        return InputError(
            f"{around} of {self.sequence_length} tokens are the tokenizer's own, so no text has room",
            "raise train.sequence_length",
        )

    def _cut(self, ids: Sequence[int], weights: NDArray[np.float32]) -> Encoded:
        length = len(ids) if self.sequence_length is None else self.sequence_length
        cut_trained = int(np.count_nonzero(weights[length:]))
        return Encoded(np.array(ids[:length], np.int32), weights[:length], max(len(ids) - length, 0), cut_trained)


def _checked(messages: Messages) -> Messages:
    if not messages:
        raise InputError("a conversation has no messages", "take the row out")
    for place, message in enumerate(messages):
        role: Any = message.get("role") if isinstance(message, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(role, str):
            raise InputError(f"message {place} has no role", 'write messages as {"role": ..., "content": ...}')
    return messages
