"""A conversation with a run's model, and with the base that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from pydantic import Field, ValidationError

from tunesmith import rundir
from tunesmith.data.chat import Renderer
from tunesmith.errors import InputError
from tunesmith.models.drawing import of_card
from tunesmith.protocols import Converses
from tunesmith.recipe_keys import Positive, Strict
from tunesmith.types import Row, SampleSpec

if TYPE_CHECKING:
    from tunesmith.loaded import Loaded

ANSWER_TOKENS = 512  # an answer may have so many, or as many as the run's evaluation allowed if that is more
ROOM = 4  # turns are left out until the answer has what it may have, or this part of the context
UNDECODED = "\ufffd"  # what the first bytes of a character decode to

OnText = Callable[[str], None]
Stop = Callable[[], bool]
Message = dict[str, Any]


class Sampling(Strict):
    """How answers are drawn: the most probable token each time at temperature 0, as in an evaluation."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = ANSWER_TOKENS
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17

    def changed(self, **values: Any) -> Sampling:
        """With other values, which may be text. Raises InputError naming the value that will not do."""
        try:
            return Sampling.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            wrong = error.errors()[0]
            name = str(wrong["loc"][0])
            if name not in Sampling.model_fields:
                raise InputError(f"there is no {name} to set", f"known: {', '.join(Sampling.model_fields)}") from error
            remedy = wrong["msg"].replace("Input should be", "it must be")
            raise InputError(f"{name} cannot be {values[name]!r}", remedy) from error


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `finished`: the model ended it; `stopped`: who asked did; else it was cut at `limit` tokens.

    `left_out` counts the oldest messages that the model no longer sees.
    """

    text: str
    finished: bool
    stopped: bool
    tokens: int
    limit: int
    seconds: float
    left_out: int


class Chat:
    """Turns of a person and the model. What does not fit into the model's context is left out, oldest first.

    `system` is said before them: if None what all of training had, if empty nothing. The n-th answer is drawn with
    the n-th seed from `sampling.seed` on, so that the same turns give the same answers and a repeated question
    another one. Raises InputError where the run's objective does not converse.
    """

    def __init__(self, loaded: Loaded, system: str | None = None, sampling: Sampling | None = None) -> None:
        self.messages: list[Message] = []
        self.system = system
        self._turn(loaded, follow=system is None)
        self.sampling = sampling or default_sampling(loaded)
        self._drawn = -1
        self._saved: tuple[Path, bytes] | None = None

    @property
    def has_base(self) -> bool:
        """Whether the base can be asked: the method lets go of the model it changed."""
        return self._method.facts.reference != "none" and not self._objective.heads()

    def turn_to(self, loaded: Loaded) -> None:
        """Goes on with another model, such as another adapter; a system message that training gave gives way to its."""
        self._turn(loaded, follow=self.system == self._converses.system)

    def _turn(self, loaded: Loaded, *, follow: bool) -> None:
        if not isinstance(loaded.objective, Converses):
            name = loaded.card["objective"]["name"]
            raise InputError(f"{name} answers no conversations", "give rows to `predict`")
        self._objective, self._converses = loaded.objective, loaded.objective
        self._policy, self._method, self._name = loaded.policy, loaded.method, str(loaded.card["method"]["name"])
        # Training cut its rows; a conversation may be as long as the model sees.
        trained = loaded.renderer
        self._renderer = Renderer(trained.tokenizer, trained.templates.get("default"), start=trained.start)
        self.context: int | None = loaded.card["context_length"]
        if follow:
            self.system = loaded.objective.system

    def ask(self, text: str, on_text: OnText | None = None, stop: Stop | None = None) -> Reply:
        """The model's answer to one more turn, handed to `on_text` as it comes until `stop` says True.

        Where it fails, or is stopped before its first token, the conversation is what it was.
        """
        self._drawn += 1
        asked = [*self.messages, {"role": "user", "content": text}]
        reply = self._answer(asked, on_text, stop)
        if reply.text or not reply.stopped:
            cut: Message = {} if reply.finished else {"train": False}  # half an answer teaches to stop half way
            self.messages = [*asked, {"role": "assistant", "content": reply.text, **cut}]
        return reply

    def base(self, on_text: OnText | None = None, stop: Stop | None = None) -> Reply:
        """What the base answers to the last question, after the same turns and drawn with the same seed."""
        if not self.has_base:
            raise InputError(f"{self._name} keeps no base to ask", "a run by lora has its base beside it")
        self._last_question()
        with self._method.reference(self._policy):
            return self._answer(self.messages[:-1], on_text, stop)

    def retry(self, on_text: OnText | None = None, stop: Stop | None = None) -> Reply:
        """Another answer to the last question; where it fails the old one stays."""
        question, before = self._last_question(), self.messages
        self.messages = before[:-2]
        try:
            reply = self.ask(question, on_text, stop)
        except BaseException:
            self.messages = before
            raise
        if len(self.messages) < len(before):
            self.messages = before
        return reply

    def undo(self) -> str:
        """Takes the last question and its answer back; returns the question."""
        question = self._last_question()
        self.messages = self.messages[:-2]
        return question

    def reset(self) -> None:
        """Begins anew; the system message and the sampling stay."""
        self.messages, self._saved = [], None

    def save(self, path: Path) -> int:
        """Adds the conversation to a file of messages that `train` reads, one a line; returns how many it holds.

        Saved there before, it is replaced by what it has become. An answer that was cut is kept as context, and
        not to be trained. Raises InputError for a file that holds anything else.
        """
        self._last_question()
        line = orjson.dumps({"messages": self._with_system(self.messages)}) + b"\n"
        kept = _conversations(path)
        if self._saved is not None and self._saved[0] == path.absolute() and kept.endswith(self._saved[1]):
            kept = kept[: -len(self._saved[1])]
        rundir.write_file(path, kept + line)
        self._saved = (path.absolute(), line)
        return len((kept + line).splitlines())

    def _answer(self, messages: Sequence[Message], on_text: OnText | None, stop: Stop | None) -> Reply:
        began = time.perf_counter()
        asked, left_out, limit = self._window(messages)
        stream = _Stream(self._renderer, on_text or _nowhere, stop or _never)
        drawn = self.sampling
        spec = SampleSpec(
            limit,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=drawn.top_k,
            seed=(drawn.seed + self._drawn) % 2**31,
            on_token=stream.take,
        )
        (found,) = self._objective.predict(self._policy, [_row(asked)], self._renderer, spec)
        stream.tell(found.output)
        seconds = time.perf_counter() - began
        stopped = stream.stopped and not found.finished
        return Reply(found.output, found.finished, stopped, len(stream.ids), limit, seconds, left_out)

    def _window(self, messages: Sequence[Message]) -> tuple[list[Message], int, int]:
        """What the model is shown, how many of the oldest messages it is not, and how long the answer may be."""
        longest = self.sampling.max_new_tokens
        left_out = 0
        while True:
            shown = self._with_system(messages[left_out:])
            length = len(self._converses.prompt(_row(shown), self._renderer))
            if self.context is None:
                return shown, left_out, longest
            if length + min(longest, self.context // ROOM) <= self.context or left_out + 1 == len(messages):
                break
            left_out += 2
        if length >= self.context:
            raise InputError(
                f"the message takes {length} tokens with what stands around it, and the model sees {self.context}",
                "shorten it, or the system message",
            )
        return shown, left_out, min(longest, self.context - length)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def _last_question(self) -> str:
        if not self.messages:
            raise InputError("nothing was asked yet", "ask something first")
        return str(self.messages[-2]["content"])


def default_sampling(loaded: Loaded) -> Sampling:
    """As the run chose (greedy if it did not), and answers of `ANSWER_TOKENS` or what its evaluation allowed."""
    setting = of_card(loaded.card).tuned
    longest = max(ANSWER_TOKENS, int(loaded.card["max_new_tokens"]))
    return Sampling(temperature=setting.temperature, top_p=setting.top_p, top_k=setting.top_k, max_new_tokens=longest)


class _Stream:
    """Tokens of one answer -> stretches of text that no later token changes."""

    def __init__(self, renderer: Renderer, on_text: OnText, stop: Stop) -> None:
        self._renderer = renderer
        self._on_text = on_text
        self._stop = stop
        self._told = ""
        self.ids: list[int] = []
        self.stopped = False

    def take(self, token: int) -> bool:
        self.ids.append(token)
        self.tell(self._renderer.decode(self.ids).rstrip(UNDECODED))
        self.stopped = self._stop()
        return self.stopped

    def tell(self, text: str) -> None:
        """Hands on what `text` has beyond what was told."""
        if len(text) > len(self._told) and text.startswith(self._told):
            self._on_text(text[len(self._told) :])
            self._told = text


def _row(messages: Sequence[Message]) -> Row:
    return Row({"messages": list(messages)}, "chat")


def _conversations(path: Path) -> bytes:
    """The lines of a file of conversations, each ended; none where there is no file."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.absolute().parent}", "make it, or give another path")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "give the path of a file")
    if not path.exists():
        return b""
    try:
        content = path.read_bytes()
        strange = any("messages" not in orjson.loads(line) for line in content.splitlines())
    except (OSError, ValueError, TypeError):
        strange, content = True, b""
    if strange:
        raise InputError(f"{path} holds something else than conversations", "give another path: it is left as it is")
    return content if content.endswith(b"\n") or not content else content + b"\n"


def _nowhere(text: str) -> None:
    """Text that nobody follows."""


def _never() -> bool:
    return False
