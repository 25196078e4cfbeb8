"""A run as it goes: a progress bar on a terminal, plain lines anywhere else.

Both are listeners of the API's events; what they show stands in metrics.jsonl and timings.jsonl too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith.report.figures import duration, gibibytes, in_rows
from tunesmith.report.findings import file_name
from tunesmith.report.screen import is_terminal, screen
from tunesmith.report.visible import shortened

SMOOTHING = 0.9  # of the loss and of the seconds a step takes
SAMPLE = 400  # characters of a sample shown
PLAIN_LINES = 20  # lines of a whole training, one each 5%
QUIET_SECONDS = 2.0  # between two plain lines of the same wait
FRAME_SECONDS = 0.1


@dataclass(slots=True)
class Pace:
    """Where training stands: the loss smoothed (Adam's bias correction), and the time that is left."""

    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    def take(self, loss: float, seconds: float) -> None:
        self.steps += 1
        self.loss = SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.seconds = SMOOTHING * self.seconds + (1 - SMOOTHING) * seconds

    @property
    def smoothed(self) -> float:
        return self.loss / (1 - SMOOTHING**self.steps)

    def left(self, steps: int) -> float:
        """Seconds that `steps` more will take."""
        return steps * self.seconds / (1 - SMOOTHING**self.steps)


class Screen(Protocol):
    """What differs between a terminal, a file and a notebook."""

    def line(self, text: Text) -> None: ...
    def wait(self, what: str, done: int, of: int | None) -> None: ...
    def step(self, data: Mapping[str, Any], pace: Pace) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


class View:
    """A listener over one stream; leaving it takes the progress bar off the screen.

    A view that can no longer be written falls silent: who watches a run must not be able to end it.
    """

    def __init__(self, stream: TextIO, *, with_plan: bool = True, on: Screen | None = None) -> None:
        self.console = screen(stream)
        self._screen: Screen = on or (_Terminal(self.console) if is_terminal(stream) else _Plain(self.console))
        self._pace = Pace()
        self._with_plan = with_plan
        self._silent = False

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._silent:
            self._screen.close()

    def listen(self, event: str, data: Mapping[str, Any]) -> None:
        """Shows one event; unknown ones are left out."""
        if self._silent:
            return
        try:
            self._show(event, data)
        except OSError:
            self._silent = True

    def _show(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "progress":
            self._screen.wait(str(data["what"]), int(data["done"]), data["of"])
        elif event == "step":
            self._pace.take(float(data["loss"]), float(data["seconds"]))
            self._screen.step(data, self._pace)
        elif event == "planned":
            self._planned(data)
        elif event == "phase":
            self._screen.idle()
            self._screen.line(Text(_phase(data)))
        elif event == "validation":
            self._screen.line(_validation(data))
        elif event == "sample":
            self._screen.line(_sample(data))
        elif event == "tracking":
            self._screen.line(Text(f"tracked by {data['tracker']}: {data['where']}"))
        elif event == "best":
            self._screen.line(Text(f"back to the best checkpoint: step {data['step']} ({data['value']:.4f})"))

    def _planned(self, data: Mapping[str, Any]) -> None:
        self._screen.idle()
        if self._with_plan:
            from tunesmith.report.plan_view import show_plan

            show_plan(data["plan"], self.console)
        self._screen.line(Text(f"run: {data['run']}"))


class _Plain:
    """Lines that can be read in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = -1
        self._last_wait = time.monotonic()

    def line(self, text: Text) -> None:
        self._console.print(Text(text.plain), soft_wrap=True)

    def wait(self, what: str, done: int, of: int | None) -> None:
        now = time.monotonic()
        if now - self._last_wait >= QUIET_SECONDS:
            self._last_wait = now
            self.line(Text(": ".join(filter(None, (what, share_done(done, of))))))

    def step(self, data: Mapping[str, Any], pace: Pace) -> None:
        number, total = int(data["step"]), int(data["total_steps"])
        portion = number * PLAIN_LINES // total
        if portion > self._shown or pace.steps == 1:
            self._shown = portion
            self.line(Text(f"step {number}/{total}  {step_numbers(data, pace)}"))

    def idle(self) -> None:
        """Nothing to take away."""

    def close(self) -> None:
        """Nothing to take away."""


class _Terminal:
    """A bar that is drawn over; lines go above it. Drawn by events alone: a thread would be forked into workers."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._drawn = 0.0

    def line(self, text: Text) -> None:
        self._console.print(text)

    def wait(self, what: str, done: int, of: int | None) -> None:
        self._draw(what, done, of, share_done(done, of))

    def step(self, data: Mapping[str, Any], pace: Pace) -> None:
        number, total = int(data["step"]), int(data["total_steps"])
        self._draw("training", number, total, f"step {number}/{total}", step_numbers(data, pace))

    def idle(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self) -> None:
        self.idle()

    def _draw(self, what: str, done: int, of: int | None, count: str, numbers: str = "") -> None:
        now = time.monotonic()
        if self._live is not None and now - self._drawn < FRAME_SECONDS and done != of:
            return
        self._drawn = now
        row = Table.grid(padding=(0, 1))
        row.add_row(what, ProgressBar(total=of or None, completed=done, width=30, pulse=not of), count)
        picture = Group(row, Text(numbers, style="cyan")) if numbers else row
        live = self._live
        if live is None:
            live = self._live = Live(console=self._console, auto_refresh=False, transient=True)
            live.start()
        live.update(picture, refresh=True)


def step_numbers(data: Mapping[str, Any], pace: Pace) -> str:
    left = int(data["total_steps"]) - int(data["step"])
    skipped = "  skipped: nothing to learn in it" if data.get("skipped") else ""
    rate = f"{data['tokens_per_second']:,.0f} tokens/s"
    if not data["tokens_per_second"]:  # vectors made once before: no token goes through the model any more
        rate = f"{data['examples_per_second']:,.0f} examples/s"
    return (
        f"loss {data['loss']:.4f} (smoothed {pace.smoothed:.4f})  {rate}  "
        f"{duration(pace.left(left))} left  {gibibytes(data['peak_memory_bytes'])}{skipped}"
    )


def share_done(done: int, of: int | None) -> str:
    if not of:
        return f"{done:,}" if done else ""
    return f"{done:,} of {of:,}" if of < 10**7 else f"{done / 2**20:,.0f} of {of / 2**20:,.0f} MiB"


def _phase(data: Mapping[str, Any]) -> str:
    name, what = str(data["name"]), data.get("what")
    text = name if what is None else f"{name} {what}"
    if data.get("rows") is not None:
        text += f": {in_rows(data['rows'])}"
    if data.get("total_steps") is not None:
        text += f": {data['total_steps']:,} steps"
    return text + (f", going on after step {data['from_step']:,}" if data.get("from_step") else "")


def _validation(data: Mapping[str, Any]) -> Text:
    numbers = [f"{name} {value:.4f}" for name, value in data.items() if name not in ("step", "best")]
    best = " (the best so far)" if data["best"] else ""
    return Text(f"validation after step {data['step']}: {'  '.join(numbers)}{best}", style="bold")


def _sample(data: Mapping[str, Any]) -> Text:
    text = Text(f"  {file_name(data['where'])}\n", style="dim")
    if data["reference"] is not None:
        text.append("    expected  ", style="dim").append(shortened(data["reference"], SAMPLE) + "\n", style="not dim")
    text.append("    answered  ", style="dim").append(shortened(data["output"], SAMPLE), style="not dim green")
    return text
