"""A run in a notebook: progress that is drawn over in its cell, and results as a table."""

from __future__ import annotations

import html
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tunesmith.report.comparison_view import LEGEND, comparison_tables
from tunesmith.report.live import Pace, View, share_done, step_numbers
from tunesmith.report.results import results_tables, weaknesses

if TYPE_CHECKING:
    from tunesmith.comparing import Comparison

FRAME_SECONDS = 0.3
WIDTH = 110
TAIL = 12  # lines kept below the bar


def in_notebook() -> bool:
    """Whether the code that calls runs in a notebook's kernel, which can draw."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def view() -> View:
    """A listener that shows a run in the cell's output."""
    return View(io.StringIO(), with_plan=False, on=_Cell())


def show_plan(plan: Any) -> None:
    """Draws a plan below the cell."""
    from IPython.display import HTML, display

    from tunesmith.report import plan_view

    console = _recording()
    plan_view.show_plan(plan, console)
    display(HTML(_exported(console)))


def results_html(path: Path, records: Sequence[Mapping[str, Any]], effects: Sequence[Mapping[str, Any]]) -> str:
    """The tables of a run's results and where to read on, as HTML."""
    console = _recording()
    for table in results_tables(records, effects):
        console.print(table)
    for warning in weaknesses(records):
        console.print(Text(f"warning: {warning}"))
    return f"{_exported(console)}<div>run: <code>{html.escape(str(path))}</code></div>"


def comparison_html(comparison: Comparison) -> str:
    """The tables of compared runs, as HTML."""
    console = _recording()
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(Text(f"\n{LEGEND}"))
    for note in comparison.notes:
        console.print(Text(f"note: {note}"))
    return _exported(console)


def _recording() -> Console:
    """A console that is exported; it must not draw into the cell by itself, as rich's do in a notebook."""
    return Console(
        file=io.StringIO(), record=True, width=WIDTH, markup=False, emoji=False, highlight=False, force_jupyter=False
    )


def _exported(console: Console) -> str:
    return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>")


class _Cell:
    """The last lines and one bar, redrawn in place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._lines: list[str] = []
        self._bar = ""
        self._drawn = 0.0

    def line(self, text: Text) -> None:
        self._lines = [*self._lines, text.plain][-TAIL:]
        self._draw(self._bar)

    def wait(self, what: str, done: int, of: int | None) -> None:
        self._advance(what, done, of, share_done(done, of))

    def step(self, data: Mapping[str, Any], pace: Pace) -> None:
        number, total = int(data["step"]), int(data["total_steps"])
        self._advance("training", number, total, f"step {number}/{total}  {step_numbers(data, pace)}")

    def idle(self) -> None:
        self._draw("")

    def close(self) -> None:
        self._draw("")

    def _advance(self, what: str, done: int, of: int | None, count: str) -> None:
        if time.monotonic() - self._drawn >= FRAME_SECONDS or done == of:
            state = f'value="{done}" max="{of}"' if of else ""
            self._draw(f"<div>{html.escape(what)} <progress {state}></progress> {html.escape(count)}</div>")

    def _draw(self, bar: str) -> None:
        from IPython.display import HTML, display

        self._bar, self._drawn = bar, time.monotonic()
        lines = html.escape(chr(10).join(self._lines))
        picture = HTML((f"<pre style='line-height:1.3'>{lines}</pre>" if lines else "") + bar)
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
