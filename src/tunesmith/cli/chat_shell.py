"""A chat as it goes: what is typed is a turn, or a command that begins with a slash."""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunesmith.cli.failures import Terminated, explain
from tunesmith.cli.typed import BLOCK, Typed
from tunesmith.cli.verb import Call
from tunesmith.errors import InputError
from tunesmith.monitor import stoppable

if TYPE_CHECKING:
    from tunesmith.adapters import Adapters
    from tunesmith.chatting import Chat, OnText, Reply, Stop
    from tunesmith.loaded import Loaded
    from tunesmith.report.talk import Talk

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
TUNED, BASE = "tuned", "base"


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` is the command with what it takes; `run` is given what stands behind its name."""

    usage: str
    summary: str
    run: Callable[[str], None]

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0].removeprefix("/")


class Partner(Protocol):
    """Who is talked to: says something to a turn, and has commands of its own."""

    commands: Sequence[Command]

    def say(self, text: str) -> None: ...


class Shell:
    """Reads turns until the end. What goes wrong in one is said, and the next may be better."""

    def __init__(self, partner: Partner, talk: Talk, call: Call) -> None:
        own = [
            Command("/help", "this list", self._help),
            Command("/quit", "end the chat; so does Ctrl-D", self._quit),
        ]
        self._partner = partner
        self._commands = {command.name: command for command in (*partner.commands, *own)}
        self._talk = talk
        self._call = call
        self._typed = Typed()
        self._over = False

    def run(self, about: Sequence[str]) -> int:
        """`about` greets a person at a terminal."""
        for line in about if self._typed.terminal else []:
            self._talk.note(line)
        while not self._over:
            try:
                turn = self._typed.turn()
                if turn is None:
                    break
                self._take(turn)
            except KeyboardInterrupt as error:
                if isinstance(error, Terminated):
                    raise
                self._talk.note("\nCtrl-D or /quit ends the chat")
            except BrokenPipeError:
                raise
            except Exception as error:
                if self._call.debug:
                    raise
                failure = explain(error, self._call)
                self._talk.fail(failure.cause, failure.remedy)
        return 0

    def _take(self, turn: str) -> None:
        command = COMMAND.fullmatch(turn.strip())
        if command is None:
            if turn.strip():
                self._partner.say(turn)
            return
        name, argument = command[1], command[2] or ""
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help has the commands"
            raise InputError(f"unknown command /{name}", f'{hint} (a text that begins so is said between """ and """)')
        self._commands[name].run(argument.strip())

    def _help(self, _: str) -> None:
        width = max(len(command.usage) for command in self._commands.values())
        for command in self._commands.values():
            self._talk.note(f"{command.usage:{width}}  {command.summary}")
        self._talk.note(f"{BLOCK:{width}}  begins a turn of several lines, and ends it; a paste is one turn too")

    def _quit(self, _: str) -> None:
        self._over = True


def switching(adapters: Adapters, turn_to: Callable[[str], None], talk: Talk) -> Sequence[Command]:
    """Commands of a chat with several adapters; `turn_to` is what the next turn needs of the switch."""

    def listed(_: str) -> None:
        for name in adapters:
            method = adapters[name].card["method"]["name"]
            talk.note(f"{'*' if name == adapters.active else ' '} {name} ({method})")

    def use(name: str) -> None:
        if not name:
            raise InputError("/use needs the name of an adapter", f"loaded: {', '.join(adapters)}")
        turn_to(name)
        talk.note(f"(now with {name})")

    return (
        Command("/adapters", "the adapters that are loaded, and which is in use", listed),
        Command("/use NAME", "go on with another adapter", use),
    )


class Conversation:
    """A chat with a tuned model; `both`: its base is asked each time too. `adapters`: those to switch between.

    `longer`: what the user writes for longer answers.
    """

    def __init__(
        self,
        chat: Chat,
        talk: Talk,
        both: bool = False,
        adapters: Adapters | None = None,
        longer: str = "/set max_new_tokens",
    ) -> None:
        self._chat = chat
        self._talk = talk
        self._both = both
        self._longer = longer
        self._adapters = adapters
        self._last = ""
        self.commands: Sequence[Command] = (
            Command("/base", "ask the base the same, beside the answer", self._base),
            Command("/retry", "answer the last question again", self._retry),
            Command("/undo", "take the last question and its answer back", self._undo),
            Command("/reset", "begin anew; the system message stays", self._reset),
            Command("/system TEXT", "what the model is told before all; - takes it away, alone shows it", self._system),
            Command("/set NAME VALUE", "how answers are drawn, as in /set temperature 0.7; alone shows it", self._set),
            Command("/save FILE", "add the conversation to a file that `train` can read", self._save),
            *(switching(adapters, self.turn_to, talk) if adapters is not None else ()),
        )

    def turn_to(self, name: str, *, anew: bool = False) -> None:
        """Another adapter answers from here on; the conversation stays, unless it begins anew."""
        assert self._adapters is not None
        self._chat.turn_to(self._adapters[name])
        self._adapters.use(name)
        if anew:
            self._chat.reset()

    @property
    def _model(self) -> str:
        """What answers are told to be by."""
        return TUNED if self._adapters is None else str(self._adapters.active)

    def say(self, text: str) -> None:
        self._tuned(lambda on_text, stop: self._chat.ask(text, on_text, stop))

    def drawing(self) -> str:
        """How answers are drawn, in words."""
        how = self._chat.sampling
        limits = f"up to {how.max_new_tokens:,} tokens"
        if not how.temperature:
            return f"greedy (temperature 0), {limits}"
        return f"temperature {how.temperature:g}, top_p {how.top_p:g}, top_k {how.top_k}, seed {how.seed}, {limits}"

    def _tuned(self, act: Callable[[OnText, Stop], Reply]) -> None:
        reply = self._follow(self._model, {} if self._both or self._adapters is not None else None, act)
        self._last = reply.text
        if self._both and not reply.stopped:
            self._base("")

    def _base(self, _: str) -> None:
        self._follow(BASE, {self._model: self._last}, self._chat.base)

    def _follow(self, model: str, beside: Mapping[str, str] | None, act: Callable[[OnText, Stop], Reply]) -> Reply:
        """Shows an answer as it comes. Ctrl-C stops it; a second one does not wait for the next token."""
        with stoppable() as stop:
            self._talk.begin(model, beside)
            try:
                reply = act(self._talk.text, lambda: stop.asked)
            except BaseException:
                self._talk.abandon()
                raise
            self._talk.end(reply, self._remarks(reply))
        if signal.SIGTERM in stop.signals:
            raise Terminated
        return reply

    def _remarks(self, reply: Reply) -> list[str]:
        found: list[str] = []
        if reply.left_out:
            found.append(
                f"(the model sees {self._chat.context:,} tokens and the conversation is longer: "
                f"its oldest {reply.left_out} messages were left out)"
            )
        if reply.stopped:
            found.append("(stopped)" if reply.text else "(stopped before it began: the question was not kept)")
        elif not reply.finished and reply.limit < self._chat.sampling.max_new_tokens:
            found.append(f"(cut after {reply.limit:,} tokens: the {self._chat.context:,} that the model sees are full)")
        elif not reply.finished:
            found.append(f"(cut after {reply.limit:,} tokens: {self._longer} allows more)")
        elif not reply.text:
            found.append("(an empty answer)")
        return found

    def _retry(self, _: str) -> None:
        if not self._chat.sampling.temperature:
            self._talk.note("(greedy: the same answer comes again; /set temperature 0.7 draws another)")
        self._tuned(self._chat.retry)

    def _undo(self, _: str) -> None:
        self._talk.note(f"(taken back: {self._chat.undo()})")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._talk.note("(a new conversation)")

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == "-" else text.strip('"').strip("\n")
        self._talk.note(f"(system: {self._chat.system})" if self._chat.system else "(no system message)")

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.replace("=", " ", 1).partition(" ")
            if not value.strip():
                raise InputError(f"/set {argument} gives no value", "as in /set temperature 0.7")
            self._chat.sampling = self._chat.sampling.changed(**{name.replace("-", "_"): value.strip()})
        self._talk.note(f"({self.drawing()})")

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs a file", "as in /save chats.jsonl")
        path = Path(name).expanduser()
        count = self._chat.save(path)
        self._talk.note(f"({path} holds {count} conversation{'s' * (count > 1)})")


class Labelling:
    """Each turn is a text that gets its label, or its labels. `adapters`: those to switch between."""

    def __init__(self, loaded: Loaded, talk: Talk, adapters: Adapters | None = None) -> None:
        self._loaded = loaded
        self._talk = talk
        self._adapters = adapters
        self.commands: Sequence[Command] = switching(adapters, self.turn_to, talk) if adapters is not None else ()

    def turn_to(self, name: str, *, anew: bool = False) -> None:
        """Another adapter gives the labels from here on; each turn is new anyway."""
        del anew
        assert self._adapters is not None
        self._loaded = self._adapters.use(name)

    def say(self, text: str) -> None:
        (found,) = self._loaded.predict([{"text": text}])
        active = self._adapters and self._adapters.active
        if self._loaded.objective.needs.vectors == "token":
            self._talk.tags(list(zip(text.split(), found.output.split(), strict=True)), active)
            return
        shares = found.probabilities or {found.output: 1.0}
        self._talk.labels(shares, active, found.answered if found.multi_label else None)
