"""A chat on the screen: answers as they come, two models side by side, labels with their probabilities."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith.report.screen import is_terminal, screen
from tunesmith.report.visible import visible

if TYPE_CHECKING:
    from tunesmith.chatting import Reply

# Besides tabs and line ends: the spaces of typographers, and what joins letters and emoji.
KEPT = "\t\n\u00a0\u2009\u202f\u3000\u200c\u200d"
FRAME_SECONDS = 0.06
TOP = 5  # labels shown
BAR = 24  # columns of the longest bar


class Talk(Protocol):
    """Where a chat goes. `begin` names the model that answers next, and the texts that stand beside it already."""

    def begin(self, model: str, beside: Mapping[str, str] | None = None) -> None: ...
    def text(self, piece: str) -> None: ...
    def end(self, reply: Reply, remarks: Sequence[str]) -> None: ...
    def abandon(self) -> None: ...
    def labels(
        self, probabilities: Mapping[str, float], model: str | None = None, chosen: Sequence[str] | None = None
    ) -> None: ...
    def tags(self, pairs: Sequence[tuple[str, str]], model: str | None = None) -> None: ...
    def note(self, text: str) -> None: ...
    def fail(self, cause: str, remedy: str) -> None: ...


def talk(answers: TextIO, notes: TextIO, as_json: bool = False) -> Talk:
    """For a terminal, for a file, or lines of JSON; all but answers goes to `notes` where answers are a file's."""
    if as_json:
        return JsonTalk(answers, notes)
    return TerminalTalk(answers) if is_terminal(answers) else PlainTalk(answers, notes)


def harmless(text: str) -> str:
    """An answer as it may reach a terminal: escape sequences are written out."""
    return visible(text, KEPT)


class PlainTalk:
    """Answers and nothing else; two answers to one question are named."""

    def __init__(self, answers: TextIO, notes: TextIO) -> None:
        self._answers = answers
        self._notes = notes

    def begin(self, model: str, beside: Mapping[str, str] | None = None) -> None:
        if beside is not None:
            self._answers.write(f"{model}:\n")

    def text(self, piece: str) -> None:
        self._answers.write(harmless(piece))
        self._answers.flush()

    def end(self, reply: Reply, remarks: Sequence[str]) -> None:
        self._answers.write("\n")
        self._answers.flush()
        for remark in remarks:
            self.note(remark)

    def abandon(self) -> None:
        self._answers.write("\n")

    def labels(
        self, probabilities: Mapping[str, float], model: str | None = None, chosen: Sequence[str] | None = None
    ) -> None:
        if model is not None:
            self._answers.write(f"{harmless(model)}:\n")
        screen(self._answers).print(_ranking(probabilities, chosen))
        self._answers.flush()

    def tags(self, pairs: Sequence[tuple[str, str]], model: str | None = None) -> None:
        if model is not None:
            self._answers.write(f"{harmless(model)}:\n")
        screen(self._answers).print(_tagged(pairs))
        self._answers.flush()

    def note(self, text: str) -> None:
        self._notes.write(harmless(text) + "\n")
        self._notes.flush()

    def fail(self, cause: str, remedy: str) -> None:
        self.note(f"error: {cause}\nremedy: {remedy}")


class JsonTalk:
    """A line of JSON for each answer."""

    def __init__(self, answers: TextIO, notes: TextIO) -> None:
        self._answers = answers
        self._notes = PlainTalk(notes, notes)
        self._model = ""

    def begin(self, model: str, beside: Mapping[str, str] | None = None) -> None:
        self._model = model

    def text(self, piece: str) -> None:
        """The whole answer comes at once."""

    def end(self, reply: Reply, remarks: Sequence[str]) -> None:
        self._line({"model": self._model, **asdict(reply)})

    def abandon(self) -> None:
        """Nothing was begun."""

    def labels(
        self, probabilities: Mapping[str, float], model: str | None = None, chosen: Sequence[str] | None = None
    ) -> None:
        ranked = _ranked(probabilities)
        told = {} if model is None else {"model": model}
        answer = {"label": ranked[0][0]} if chosen is None else {"labels": list(chosen)}
        self._line({**told, **answer, "probabilities": dict(ranked)})

    def tags(self, pairs: Sequence[tuple[str, str]], model: str | None = None) -> None:
        told = {} if model is None else {"model": model}
        self._line({**told, "tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})

    def note(self, text: str) -> None:
        self._notes.note(text)

    def fail(self, cause: str, remedy: str) -> None:
        self._line({"error": cause, "remedy": remedy})

    def _line(self, value: Mapping[str, Any]) -> None:
        ascii_only = (self._answers.encoding or "ascii").lower().replace("-", "") != "utf8"
        self._answers.write(json.dumps(value, ensure_ascii=ascii_only) + "\n")
        self._answers.flush()


class TerminalTalk:
    """Answers are written as they come; those of two models in columns that are drawn over until both are whole."""

    def __init__(self, answers: TextIO) -> None:
        self._console = screen(answers)
        self._live: Live | None = None
        self._columns: dict[str, str] = {}
        self._model = ""
        self._drawn = 0.0

    def begin(self, model: str, beside: Mapping[str, str] | None = None) -> None:
        self._model = model
        self._columns = {**(beside or {}), model: ""}
        if beside is not None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._live.update(self._table(), refresh=True)

    def text(self, piece: str) -> None:
        if self._live is None:
            self._console.file.write(harmless(piece))
            self._console.file.flush()
            return
        self._columns[self._model] += piece
        if time.monotonic() - self._drawn > FRAME_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def end(self, reply: Reply, remarks: Sequence[str]) -> None:
        self.abandon()
        if len(self._columns) > 1:
            self._console.print(self._table())
        for remark in remarks:
            self.note(remark)

    def abandon(self) -> None:
        if self._live is None:
            self._console.file.write("\n")
            self._console.file.flush()
        else:
            self._live.stop()
            self._live = None

    def labels(
        self, probabilities: Mapping[str, float], model: str | None = None, chosen: Sequence[str] | None = None
    ) -> None:
        if model is not None:
            self._console.print(Text(harmless(model), style="bold"))
        self._console.print(_ranking(probabilities, chosen))

    def tags(self, pairs: Sequence[tuple[str, str]], model: str | None = None) -> None:
        if model is not None:
            self._console.print(Text(harmless(model), style="bold"))
        self._console.print(_tagged(pairs))

    def _table(self) -> Table:
        """The answers side by side, with room behind them for the ^C that a terminal writes where it stands."""
        width = max(self._console.width - 4, 20)
        table = Table(box=box.SIMPLE_HEAD, width=width, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        for model in self._columns:
            table.add_column(model, ratio=1, overflow="fold", header_style="bold")
        table.add_row(*(Text(harmless(text)) for text in self._columns.values()))
        return table

    def note(self, text: str) -> None:
        self._console.print(Text(harmless(text), style="dim"), soft_wrap=True)

    def fail(self, cause: str, remedy: str) -> None:
        self._console.print(Text(f"{harmless(cause)}\n{harmless(remedy)}", style="yellow"), soft_wrap=True)


def _ranking(probabilities: Mapping[str, float], chosen: Sequence[str] | None) -> Table:
    """The most probable labels, and what is left for the others; of a set of labels, all `chosen` and who came near.

    A mark tells those that are chosen from those that are not.
    """
    ranked = _ranked(probabilities)
    shown = TOP if chosen is None else max(TOP, len(chosen))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for place, (label, share) in enumerate(ranked[:shown]):
        given = place == 0 if chosen is None else label in chosen
        style, mark = "bold" if given else "", "✓ " if given and chosen is not None else "  "
        bar = Text("█" * round(BAR * share), style="cyan")
        table.add_row(Text(f"{mark}{visible(label)}", style=style), Text(f"{share:.3f}", style=style), bar)
    rest = ranked[shown:]
    if rest:
        left = f"{sum(s for _, s in rest):.3f}" if chosen is None else f"≤ {rest[0][1]:.3f}"
        table.add_row(Text(f"  {len(rest)} more", style="dim"), Text(left, style="dim"), "")
    return table


def _tagged(pairs: Sequence[tuple[str, str]]) -> Table:
    """Words with their tags."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for word, tag in pairs:
        table.add_row(Text(f"  {visible(word)}"), Text(visible(tag)))
    return table


def _ranked(probabilities: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(probabilities.items(), key=lambda pair: -pair[1])
