"""Messages -> text, and which characters of it the model must produce: found by marking, never by the template's word.

Method. Rendering prefixes of a conversation does not give its turns: templates drop earlier thinking, move the
system text, close the last turn differently. So each trained turn's text is wrapped in private-use characters, the
conversation is rendered once with them and once without, and the two must agree when the marks are taken out. From
its marks a turn is extended forward through its end token and back to where its generation prompt ends.

Text in a message that spells a control token ("<|im_end|>" from a user) is rendered with a mark inside it and its
place is reported in `breaks`: the tokeniser cuts there, so it stays text and cannot forge a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast

from tunesmith.data.template import Messages, Tools, View, render_views
from tunesmith.errors import InputError

# Private-use planes: a conversation is marked from the one that it does not use itself.
PLANES = (0xF0000, 0x100000)
PLANE_SIZE = 0xFFFD
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_THINK_TAG = re.compile("(<think>|</think>)")
# The names that templates know the switch by. A template that knows neither ignores both.
QUIET: Mapping[str, Any] = {"enable_thinking": False, "thinking": False}
LOUD: Mapping[str, Any] = {"enable_thinking": True, "thinking": True}
OURS = ("train", "weight")  # what a message says of its loss, and no template sees
_REMEDY = 'set "train": false on that turn, or give a template with data.template'
_HEED = "make the template heed add_generation_prompt"


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text. `spans` [start, stop) are to be produced; `breaks` lie inside text, never in a token."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    breaks: tuple[int, ...] = ()


@dataclass(slots=True)
class Found:
    """Where the marks of one turn came out, in characters of the unmarked text."""

    first: int
    last: int
    limit: int


class Marks:
    """The marked copy of a conversation, and the reading of its rendering."""

    def __init__(
        self, messages: Messages, tools: Tools, turns: Sequence[int], controls: re.Pattern[str] | None, base: int
    ) -> None:
        self.base = base
        self.cut = chr(self.base + PLANE_SIZE)
        self.owners: list[tuple[int, bool]] = []
        self.limits: dict[int, str] = {}
        copies = self._cut(list(messages), controls) if controls else [dict(m) for m in messages]
        self.tools: Tools = self._cut(tools, controls) if controls else tools
        for turn in turns:
            self._mark_turn(copies[turn], turn)
            if copies[turn].get("tool_calls") and turn + 1 < len(copies) and turn + 1 not in turns:
                self._mark_limit(copies[turn + 1], turn)
        if 2 * len(self.owners) + len(turns) >= PLANE_SIZE:
            raise InputError("the conversation has too many turns to be marked", "split it into shorter ones")
        self.messages: Messages = copies

    def _cut(self, value: Any, controls: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return controls.sub(lambda m: m[0][0] + self.cut + m[0][1:], value)
        if isinstance(value, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            return {self._cut(k, controls): self._cut(v, controls) for k, v in pairs}
        if isinstance(value, list | tuple):
            return [self._cut(item, controls) for item in cast("Sequence[Any]", value)]
        return value

    def _wrap(self, text: str, turn: int, required: bool) -> str:
        core = text.strip()
        if not core:
            return text
        at, mark = text.index(core), self.base + 2 * len(self.owners)
        self.owners.append((turn, required))
        return f"{text[:at]}{chr(mark)}{core}{chr(mark + 1)}{text[at + len(core) :]}"

    def _wrap_pieces(self, text: str, turn: int, required: bool) -> str:
        """Mark each stretch between think tags; of a text, only what follows the last tag is sure to be kept."""
        *head, last = _THINK_TAG.split(text)
        kept = [piece if _THINK_TAG.fullmatch(piece) else self._wrap(piece, turn, False) for piece in head]
        marked = "".join(kept) + self._wrap(last, turn, required)
        return self._wrap(text, turn, False) if marked == text else marked  # nothing but tags

    def _mark_turn(self, message: dict[str, Any], turn: int) -> None:
        calls: list[Any] = list(message.get("tool_calls") or ())
        content = message.get("content")
        for name in ("reasoning_content", "thinking", "reasoning"):
            if isinstance(message.get(name), str):
                message[name] = self._wrap(message[name], turn, False)
                break
        if isinstance(content, str):
            message["content"] = self._wrap_pieces(content, turn, not calls)
        elif isinstance(content, list):
            message["content"] = [
                {**part, "text": self._wrap_pieces(part["text"], turn, not calls)}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in cast("list[Any]", content)
            ]
        for at, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                _refuse(turn, "holds a tool call without a function name", "give every tool call a name")
            named = {**function, "name": self._wrap(cast(str, function["name"]), turn, True)}
            calls[at] = {**call, "function": named} if "function" in call else named
        if calls:
            message["tool_calls"] = calls

    def _mark_limit(self, message: dict[str, Any], turn: int) -> None:
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            mark = self.limits[turn] = chr(self.base + PLANE_SIZE - 1 - len(self.limits))
            # In the middle: templates look at how a content begins and ends.
            message["content"] = content[: len(content) // 2] + mark + content[len(content) // 2 :]

    def read(self, marked: str) -> tuple[str, dict[int, Found], tuple[int, ...]]:
        """The text without marks, what was found of each turn, and the cuts. Raises InputError if marks are amiss."""
        places: dict[str, list[int]] = {}
        pieces: list[str] = []
        before = length = 0
        for match in _PRIVATE.finditer(marked):
            if self.base <= ord(match[0]) <= self.base + PLANE_SIZE:
                pieces.append(marked[before : match.start()])
                length += match.start() - before
                before = match.end()
                places.setdefault(match[0], []).append(length)
        pieces.append(marked[before:])
        text = "".join(pieces)
        found: dict[int, Found] = {}
        for number, (turn, required) in enumerate(self.owners):
            opened, closed = (places.get(chr(self.base + 2 * number + side), []) for side in (0, 1))
            whole = len(opened) == len(closed) == 1
            if max(len(opened), len(closed)) > 1 or (required and not whole):
                _refuse(
                    turn, "is not in the rendering exactly once: the template changes, repeats or drops it", _REMEDY
                )
            if whole:
                one = found.setdefault(turn, Found(opened[0], closed[0], len(text)))
                one.first, one.last = min(one.first, opened[0]), max(one.last, closed[0])
        for turn, mark in self.limits.items():
            if turn in found and mark in places:
                found[turn].limit = places[mark][0]
        return text, found, tuple(places.get(self.cut, ()))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template does around an answer.

    `ends`: the end tokens; `tail`: what stands between an answer and its end; `prompts`: there is a generation
    prompt; `controls`: all tokens that make turns.
    """

    ends: tuple[str, ...]
    tail: str
    prompts: bool
    controls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One rendered conversation with all that is known to tell its turns apart."""

    text: str
    messages: Sequence[Mapping[str, Any]]
    found: Mapping[int, Found]
    breaks: Sequence[int]
    prompts: Mapping[int, Sequence[str | InputError]]
    shape: Shape
    ends: re.Pattern[str]

    def span(self, turn: int, floor: int) -> tuple[int, int]:
        """[start, stop) of a turn that begins at `floor` or later."""
        here = self.found.get(turn)
        start = self._start(turn, floor, len(self.text) if here is None else here.first)
        stop = self._stop(turn, start if here is None else here.last)
        if start < floor:
            _refuse(turn, "overlaps the turn before it", _REMEDY)
        if here and not self.shape.prompts and not self.messages[turn].get("tool_calls"):
            header = _THINK_TAG.sub("", self.text[start : here.first])
            if header.strip():
                _refuse(turn, f"has a header {header!r} that no generation prompt gives", _HEED)
        return start, stop

    def _start(self, turn: int, floor: int, first: int) -> int:
        """Where the generation prompt of the turn ends, which is at or before its first mark."""
        known = [p for p in self.prompts.get(turn, ()) if isinstance(p, str)]
        fitting = [len(p) for p in known if len(p) <= first and self.text.startswith(p)]
        if fitting:
            return max(fitting)
        if not known:
            _refuse(turn, "follows nothing that could prompt it", "begin with a user turn, or " + _REMEDY)
        if turn == len(self.messages) - 1:
            _refuse(turn, "does not continue its own prompt: the template renders the two differently", _REMEDY)
        if turn not in self.found:
            _refuse(turn, "is empty", "take the turn out, or " + _REMEDY)
        # An earlier turn stands in a history that was another one when it was made. What introduces it is the end of
        # its prompt, from behind the text of the message before; a thinking block may be left out of it.
        before = _last_text(self.messages[turn - 1])
        leads = [_lead(p, before) for p in known]
        for header in [lead.partition("<think>")[0] for lead in leads]:
            at = self.text.rfind(header, floor, first) if header.strip() else -1
            if at >= 0:
                start = at + len(header)
                blocks = [lead[len(header) :] for lead in leads if lead.startswith(header)]
                kept = [len(b) for b in blocks if self.text.startswith(b, start) and start + len(b) <= first]
                return start + max(kept, default=0)
        _refuse(turn, "is not introduced by its generation prompt", _REMEDY)

    def _stop(self, turn: int, last: int) -> int:
        """Behind the end token that follows the last mark of the turn, before anything of the next message."""
        limits = [f.first for later, f in self.found.items() if later > turn]
        if turn in self.found:
            limits.append(self.found[turn].limit)
        for match in self.ends.finditer(self.text, last, min(limits, default=len(self.text))):
            if any(match.start() < b < match.end() for b in self.breaks):
                continue  # spelled in a message
            between = _THINK_TAG.sub("", self.text[last : match.start()]).strip()
            if between and between != self.shape.tail.strip() and not self.messages[turn].get("tool_calls"):
                break
            return match.end()
        _refuse(turn, "is not closed by an end token of its own", _REMEDY)


class Turns:
    """One template with its special tokens, over a tokenizer whose added tokens are given as strings.

    `special` are those that are flagged special; of the others, those that the template writes around a plain
    question and answer count as control tokens too. Think tags never do: they belong to what is said.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, str], special: Sequence[str], added: Sequence[str]
    ) -> None:
        self.template = template
        self.special_tokens = special_tokens
        self._special, self._added = special, added
        self._switches: list[Mapping[str, Any]] = [{}, QUIET] if "thinking" in template else [{}]

    @cached_property
    def shape(self) -> Shape:
        """Found on a question and an answer. Raises InputError if no token ends the answer."""
        opening, closing = chr(PLANES[0]), chr(PLANES[0] + 1)
        question = {"role": "user", "content": "x"}
        call = {"type": "function", "id": "123456789", "function": {"name": f"{opening}f{closing}", "arguments": {}}}
        chats: list[tuple[Messages, Tools]] = [
            ([question, {"role": "assistant", "content": f"{opening}y{closing}"}], None),
            ([question, {"role": "assistant", "content": "", "tool_calls": [call]}], None),
        ]
        views = [View(0), View(0, 1), View(0, 1, True), View(1)]
        whole, unprompted, prompted, called = render_views(self.template, chats, views, self.special_tokens)
        tail = _good(whole).partition(closing)[2]
        wanted = next((p for p in map(_any_of, (self._special, self._added)) if p.search(tail)), None)
        end = wanted.search(tail) if wanted else None
        if wanted is None or end is None:
            raise InputError(
                "the chat template ends no assistant turn with a special token: a model could not learn to stop",
                "write {{ eos_token }} after the answer and give that template with data.template",
            )
        ends = [end[0]]
        written = wanted.findall(called.partition(closing)[2]) if isinstance(called, str) else []
        if written and end[0] not in written:
            ends.append(written[-1])
        structure = _any_of(self._added).findall(f"{_good(whole)}{closing}{prompted}")
        controls = {c for c in (*self._special, *structure) if not _THINK_TAG.fullmatch(c)}
        return Shape(tuple(ends), tail[: end.start()], prompted != unprompted, tuple(sorted(controls)))

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
        """Control tokens in a text; the same in JSON, where a quote has a backslash; and tokens that end a turn."""
        controls = [c for c in self.shape.controls if len(c) > 1]
        eos = self.special_tokens.get("eos_token")
        in_json = [json.dumps(c, ensure_ascii=False)[1:-1] for c in controls]
        return _any_of(controls), _any_of(in_json), _any_of([*self.shape.ends, *([eos] if eos else [])])

    def lay_out(
        self, messages: Messages, tools: Tools = None, prompt: bool = False, thinking: bool | None = None
    ) -> Rendering:
        """The whole conversation, or with `prompt` the text that the next answer follows.

        Raises InputError if the template fails, or if what a trained turn must produce cannot be told exactly. (The
        history of a prompt need not be told apart: then it has no spans.)
        """
        plain = [{k: v for k, v in m.items() if k not in OURS and v is not None} for m in messages]
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and m.get("train") is not False]
        asked = {} if thinking is None else LOUD if thinking else QUIET
        anywhere, in_json, ends = self._patterns
        as_json = _as_json([plain, tools])
        controls = anywhere if in_json.search(as_json) else None
        if not turns and controls is None:
            (text,) = render_views(self.template, [(plain, tools)], [View(0, None, prompt, asked)], self.special_tokens)
            return Rendering(_good(text))
        marks = Marks(plain, tools, turns, controls, _free_plane(as_json))
        prompted = [turn for turn in turns if turn]
        views = [View(0, None, prompt, asked), View(1, None, prompt, asked)]
        views += [View(0, turn, True, switch) for turn in prompted for switch in self._switches]
        answers = render_views(
            self.template, [(plain, tools), (marks.messages, marks.tools)], views, self.special_tokens
        )
        text, wide = _good(answers[0]), len(self._switches)
        try:
            unmarked, found, breaks = marks.read(_good(answers[1]))
            if unmarked != text:
                raise InputError("the template renders the conversation differently when it is marked", _REMEDY)
        except InputError:
            if prompt and controls is None:
                return Rendering(text)
            raise
        prompts = {turn: answers[2 + wide * k :][:wide] for k, turn in enumerate(prompted)}
        reading = _Reading(text, plain, found, breaks, prompts, self.shape, ends)
        spans: list[tuple[int, int]] = []
        for turn in turns:
            try:
                spans.append(reading.span(turn, spans[-1][1] if spans else 0))
            except InputError:
                if not prompt:
                    raise
        return Rendering(text, tuple(spans), breaks)


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted((s for s in strings if s.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _free_plane(as_json: str) -> int:
    used = {ord(c) for c in _PRIVATE.findall(as_json)}
    for base in PLANES:
        if not any(base <= c <= base + PLANE_SIZE for c in used):
            return base
    raise InputError(
        "the conversation uses private-use characters of both planes that marking needs",
        "take the characters from U+F0000 up out of the data",
    )


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"a message holds what JSON cannot: {error}", "keep to text, numbers, lists and maps"
        ) from error


def _lead(prompt: str, before: str) -> str:
    """What a prompt has behind the text of its last message; "" if that is not found."""
    at = prompt.rfind(before)
    # A message may say "assistant" too: what is left of the header must be more than a line end.
    while at >= 0 and not prompt[at + len(before) :].partition("<think>")[0].strip():
        at = prompt.rfind(before, 0, at + len(before) - 1) if before else -1
    return "" if at < 0 else prompt[at + len(before) :]


def _last_text(message: Mapping[str, Any]) -> str:
    content: Any = message.get("content")
    if isinstance(content, list):
        texts = [p["text"] for p in cast("list[Any]", content) if isinstance(p, Mapping) and "text" in p]
        content = texts[-1] if texts else ""
    return str(content or "").strip()


def _good(answer: str | InputError) -> str:
    if isinstance(answer, InputError):
        raise answer
    return answer


def _refuse(turn: int, why: str, remedy: str) -> NoReturn:
    raise InputError(f"message {turn} (an assistant turn) {why}", remedy)
