"""The report of a run as a page: what its template and its script are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.report import drawings, page, verdict
from tunesmith.report.answers import OUTCOMES, compact
from tunesmith.report.before_after import Line, model_title
from tunesmith.report.classes import SHADES, Classes
from tunesmith.report.findings import file_name
from tunesmith.report.gaps import NO_VALUE, small_line, titled_line
from tunesmith.report.plots import Scale
from tunesmith.report.summary import Summary

LABELS = 24  # of the training rows that get a bar
COUNTS = {
    "rows": "rows",
    "examples": "used",
    "tokens": "tokens",
    "trained": "trained",
    "truncated": "cut",
    "truncated_answers": "answers cut",
    "masked": "masked",
    "empty": "empty",
}
ALWAYS = ("rows", "examples", "tokens")
PIECE = 1500  # characters of a stretch of the shown example


def run_page(summary: Summary) -> str:
    """The whole report.html."""
    return page.render(
        "run",
        title=f"{summary.name}: {summary.title}",
        context={
            "run": summary,
            "plan": summary.plan,
            "audit": summary.plan["audit"],
            "manifest": summary.manifest,
            "first": summary.verdicts[0],
            "share": Scale(0.0, 1.0),
            "shades": SHADES,
            "model_title": model_title,
            "file_name": file_name,
            "value": verdict.value,
            "limits": verdict.limits,
            "changed_by": verdict.changed_by,
            "difference": verdict.difference,
            "lengths": _lengths(summary.plan["audit"]["lengths"]),
            "labels": _labels(summary.plan["audit"]["train"]["labels"] or {}),
            "shown": [(_shortened(text), trained) for text, trained in summary.plan["shown"]],
            "columns": _columns(summary),
            "groups": _groups(summary),
            "apart": {(entry["data"], entry["column"]): entry for entry in summary.groups},
            "drawings": drawings,
            "gap_line": titled_line,
            "small_line": small_line,
            "changed": _changed(summary),
        },
        data={
            "charts": [chart.points() for chart in summary.training.charts],
            "outcomes": OUTCOMES,
            "answers": [compact(answers) for answers in summary.answers.values()],
            "classes": [_cells(one) for one in summary.classes],
        },
        styles=["run.css"],
        scripts=["run.js"],
    )


def _changed(summary: Summary) -> tuple[int, int] | None:
    """Rows of the first set that became better and worse, where both models answered."""
    answers = summary.answers.get(summary.verdicts[0].data)
    if answers is None or answers.before is None or answers.kept < answers.measured:
        return None
    return answers.counts.get("better", 0), answers.counts.get("worse", 0)


def _columns(summary: Summary) -> list[tuple[str, str]]:
    """Counts of the splits, without those that are 0 in all."""
    return [(k, title) for k, title in COUNTS.items() if k in ALWAYS or any(s[k] for s in summary.splits.values())]


@dataclass(slots=True)
class _Groups:
    """Of one column: by each metric's title a line for each group that has it, with what the group is called."""

    before: str | None
    metrics: dict[str, list[tuple[str, Line]]]


def _groups(summary: Summary) -> dict[tuple[str, str], _Groups]:
    """By data set and column."""
    found: dict[tuple[str, str], _Groups] = {}
    for table in summary.tables:
        if table.group != "all":
            column, _, value = table.group.partition("=")
            own = found.setdefault((table.data, column), _Groups(table.before, {}))
            for line in table.lines:
                own.metrics.setdefault(line.metric.title, []).append((value or NO_VALUE, line))
    return found


def _lengths(histogram: Mapping[str, list[int]]) -> list[tuple[str, int, float]]:
    """Bins from the first to the last that has rows: tokens, rows, percent of the largest bin."""
    counts = histogram["counts"]
    filled = [i for i, count in enumerate(counts) if count]
    bins = range(filled[0], filled[-1] + 1) if filled else range(0)
    edges, most = histogram["edges"], max(counts, default=1)
    return [(f"{edges[i]:,} to {edges[i + 1] - 1:,}", counts[i], 100 * counts[i] / most) for i in bins]


def _labels(counts: Mapping[str, int]) -> dict[str, Any]:
    """The most frequent labels with the percent of the first, and how many more there are."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    most = ordered[0][1] if ordered else 1
    bars = [(label, count, 100 * count / most) for label, count in ordered[:LABELS]]
    return {"bars": bars, "all": len(ordered), "rest": ordered[LABELS:]}


def _shortened(text: str) -> str:
    if len(text) <= PIECE:
        return text
    return f"{text[: PIECE // 2]} … {len(text) - PIECE:,} characters … {text[-PIECE // 2 :]}"


def _cells(classes: Classes) -> dict[str, Any]:
    confusion = classes.confusion
    if confusion is None:
        return {}
    return {
        "set": classes.data,
        "labels": confusion.labels,
        "cells": [[c.row, c.column, c.count] for c in confusion.cells],
    }
