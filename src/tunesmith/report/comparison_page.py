"""Compared runs as a page: each pair on each test set, and the answers side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import rundir
from tunesmith.report import page, verdict
from tunesmith.report.answers import BUDGET, OUTCOMES, Answers, compact, gather_pair
from tunesmith.report.before_after import MetricFacts, facts_of
from tunesmith.report.comparison_words import heading, known, more_rows, on_rows, reasons, tests_of
from tunesmith.report.comparison_words import verdict as verdict_of
from tunesmith.report.plots import Mark, Scale, scale_of
from tunesmith.report.verdict import Verdict

if TYPE_CHECKING:
    from tunesmith.comparing import Comparison, Contrast, Shared
    from tunesmith.types import Metric

TONES = {"better": "better", "worse": "worse", "undecided": "quiet", "cannot tell": "quiet"}


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a pair; `test` is None where none would be fair."""

    metric: MetricFacts
    before: Metric
    after: Metric
    test: Contrast | None

    @property
    def marks(self) -> list[Mark]:
        test = self.test
        if test is None:
            return []
        return [Mark("difference", test.difference, known(test.low), known(test.high), TONES[test.standing])]

    @property
    def scale(self) -> Scale:
        """Around 0, which is where nothing is gained."""
        reach = max((abs(n) for m in self.marks for n in (m.low, m.high, m.value) if n is not None), default=1.0)
        return scale_of([-reach, reach])


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models on one set."""

    shared: Shared
    before: str
    after: str
    verdict: Verdict
    lines: tuple[Line, ...]
    reasons: tuple[str, ...]


def write_page(path: Path, comparison: Comparison) -> None:
    """Writes the page as one file; a page that was there gives way."""
    rundir.write_file(path, comparison_page(comparison).encode())


def comparison_page(comparison: Comparison) -> str:
    """The whole page."""
    pairs = [
        _pair(comparison, shared, before, after) for shared in comparison.shared for before, after in comparison.pairs
    ]
    return page.render(
        "compare",
        title=heading(comparison),
        context={
            "comparison": comparison,
            "heading": heading(comparison),
            "pairs": pairs,
            "value": verdict.value,
            "difference": verdict.difference,
            "known": known,
            "more_rows": more_rows,
            "on_rows": on_rows,
        },
        data={
            "charts": [],
            "classes": [],
            "outcomes": OUTCOMES,
            "order": "change",
            "answers": [compact(_answers(comparison, pair, BUDGET // len(pairs), len(pairs) > 1)) for pair in pairs],
        },
        styles=["run.css", "compare.css"],
        scripts=["run.js"],
    )


def _pair(comparison: Comparison, shared: Shared, before: str, after: str) -> Pair:
    records = {(r.metric, r.model): r for r in comparison.records if r.data == shared.data}
    tested = {test.metric: test for test in tests_of(comparison, shared, before, after)}
    lines = tuple(
        Line(facts_of(name), records[name, before], records[name, after], tested.get(name))
        for name in dict.fromkeys(metric for metric, _ in records)
    )
    silent = tuple(reasons(comparison, shared, before, after))
    return Pair(shared, before, after, verdict_of(comparison, shared, before, after), lines, silent)


def _answers(comparison: Comparison, pair: Pair, budget: int, several: bool) -> Answers:
    """The pair's answers; where there are several pairs, the set's name says which."""
    name = f"{pair.shared.data}: {pair.after} against {pair.before}" if several else pair.shared.data
    metrics = [line.metric.name for line in pair.lines]
    return gather_pair(comparison.rows[pair.shared.data], name, pair.before, pair.after, metrics, budget)
