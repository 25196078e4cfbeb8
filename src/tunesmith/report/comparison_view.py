"""Compared runs as tables of 80 columns: each pair on each test set, and what the numbers cannot say."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.report.comparison_words import known, more_rows, on_rows, reasons, tests_of, verdict
from tunesmith.report.figures import figure, p_value
from tunesmith.report.visible import shortened, visible

if TYPE_CHECKING:
    from tunesmith.comparing import Comparison, Contrast, Shared
    from tunesmith.types import Metric

NAME, SHORT = 14, 11  # characters of a run's name over its column
LONGEST_METRIC = 14  # characters of its name that stay on one line
LEGEND = (
    "[low, high]: 95% intervals. p: after Holm's correction for all tests of the set. "
    "+N rows: that many more would show a difference like the one seen in at least 4 of 5 repetitions. "
    "±: the smallest difference that these rows would show so."
)


def show_comparison(comparison: Comparison, page: Path | None, console: Console) -> None:
    """The tables, what they leave out, and where to look further."""
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(Text(f"\n{LEGEND}\n", style="dim"))
    for shared, (before, after) in itertools.product(comparison.shared, comparison.pairs):
        for line in reasons(comparison, shared, before, after):
            console.print(Text(visible(line), style="dim"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(f"note: {visible(note)}"), soft_wrap=True)
    runs = " ".join(dict.fromkeys(shlex.quote(str(entrant.run)) for entrant in comparison.models.values()))
    more = f"next: tunesmith compare {runs} --open    the answers side by side"
    console.print(Text(more if page is None else f"page: {page}"), soft_wrap=True)


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """For every set and pair of models, a line for each metric."""
    for shared in comparison.shared:
        for before, after in comparison.pairs:
            yield _table(comparison, shared, before, after)


def _table(comparison: Comparison, shared: Shared, before: str, after: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    said = verdict(comparison, shared, before, after)
    lines = (f"\n{after} against {before}", on_rows(shared), "", said.sentence, *said.caveats)
    table.title, table.title_justify = (
        Text("\n".join(visible(line, "\n") for line in lines), style="not italic"),
        "left",
    )
    values = {(r.metric, r.model): r for r in comparison.records if r.data == shared.data}
    metrics = dict.fromkeys(name for name, _ in values)
    # Where 80 columns are too few, what is said of a test breaks between its words before a metric's name breaks.
    table.add_column("metric", overflow="fold", min_width=min(LONGEST_METRIC, max(map(len, metrics), default=0)))
    for heading in (before, after, "difference", "p"):
        table.add_column(Text(shortened(heading, NAME)), justify="right", no_wrap=True)
    table.add_column(Text(shortened(after, SHORT)), min_width=len("undecided"))
    tested = {test.metric: test for test in tests_of(comparison, shared, before, after)}
    for metric in metrics:
        test = tested.get(metric)
        table.add_row(
            metric,
            _with_limits(values[metric, before]),
            _with_limits(values[metric, after]),
            "-" if test is None else _difference(test),
            "-" if test is None or test.reason else p_value(test.p_holm),
            "not tested" if test is None else _standing(test, shared),
        )
    return table


def _with_limits(record: Metric) -> str:
    if record.reason:
        return f"{figure(record.value)}\nno interval"
    return f"{figure(record.value)}\n[{figure(known(record.low))}, {figure(known(record.high))}]"


def _difference(test: Contrast) -> str:
    """The difference, its interval, and where that is undecided the smallest that could be seen."""
    if test.reason:
        return f"{figure(test.difference, '+')}\nno interval"
    silent = test.standing != "undecided" or test.detectable is None
    least = "" if silent else f"\n±{figure(test.detectable)}"
    low, high = (figure(known(limit), "+") for limit in (test.low, test.high))
    return f"{figure(test.difference, '+')}\n[{low}, {high}]{least}"


def _standing(test: Contrast, shared: Shared) -> str:
    return test.standing if test.standing != "undecided" else f"undecided\n{more_rows(test, shared)}"
