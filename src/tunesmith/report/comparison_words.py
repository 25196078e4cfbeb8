"""What compared runs come to, in sentences that claim no more than the tests show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.report.before_after import TUNED, facts_of
from tunesmith.report.figures import in_rows, p_told
from tunesmith.report.verdict import Verdict, difference, value

if TYPE_CHECKING:
    from tunesmith.comparing import Comparison, Contrast, Shared

_TONES = {"better": "better", "worse": "worse", "undecided": "caution", "cannot tell": "caution"}


def heading(comparison: Comparison) -> str:
    """Who is compared."""
    if len(comparison.pairs) == 1:
        before, after = comparison.pairs[0]
        return f"{after} against {before}"
    *first, last = [name for name, entrant in comparison.models.items() if entrant.model == TUNED]
    return f"{', '.join(first)} and {last}"


def verdict(comparison: Comparison, shared: Shared, before: str, after: str) -> Verdict:
    """On one pair and set, by the first metric that can tell the models apart, as a run's report has it."""
    tests = tests_of(comparison, shared, before, after)
    if not tests:
        said = f"{after} is not tested against {before}: random guesses beat it by these metrics too."
        return Verdict("Not tested", "caution", said)
    found = {(r.metric, r.model): r.value for r in comparison.records if r.data == shared.data}
    telling = (t for t in tests if t.difference or found[t.metric, after] not in facts_of(t.metric).bounds)
    test = next((t for t in telling if not t.reason), tests[0])
    facts = facts_of(test.metric)
    values = {model: value(facts, found[test.metric, model]) for model in (before, after)}
    gap = difference(facts, test.difference)
    low, high = (difference(facts, known(limit), unit=False) for limit in (test.low, test.high))
    evidence = test.reason or f"95% interval {low} to {high}, {p_told(test.p_holm)}"
    told = f"{facts.title} {values[after]} against {values[before]}, {gap} ({evidence})"
    if test.reason:
        sentence = f"Cannot tell {after} from {before}: {told}."
    elif test.standing != "undecided":
        sentence = f"{after} is {test.standing} than {before}: {told}."
    else:
        sentence = f"{in_rows(shared.rows)} do not tell {after} from {before}: {told}. {_outlook(test, shared)}"
    against = [t for t in tests if t.standing not in (test.standing, "undecided", "cannot tell")]
    also = tuple(f"By {facts_of(t.metric).title}, {after} is {t.standing}." for t in against)
    return Verdict(test.standing.capitalize(), _TONES[test.standing], sentence, also)


def tests_of(comparison: Comparison, shared: Shared, before: str, after: str) -> Sequence[Contrast]:
    return [t for t in comparison.tests if (t.data, t.before, t.after) == (shared.data, before, after)]


def on_rows(shared: Shared) -> str:
    """On what a set is compared."""
    left = ", ".join(f"{count:,} of {name}" for name, count in shared.left_out.items() if count)
    return (
        f"{shared.data}: {in_rows(shared.rows)} that all answered"
        + (f" ({left} left out)" if left else "")
        + (f", clustered by {shared.cluster}" if shared.cluster else "")
        + f"; {shared.tests} test{'s' * (shared.tests != 1)}"
    )


def reasons(comparison: Comparison, shared: Shared, before: str, after: str) -> list[str]:
    """Why values and differences of a pair have no interval, in a line each."""
    parts = [
        (r.metric, r.model, r.reason)
        for r in comparison.records
        if r.data == shared.data and r.model in (before, after)
    ]
    parts += [(t.metric, "difference", t.reason) for t in tests_of(comparison, shared, before, after)]
    return [f"{facts_of(metric).title} ({who}): {why}" for metric, who, why in parts if why]


def known(limit: float) -> float | None:
    """A limit of an interval, or None where it is infinite: nothing is known."""
    return limit if math.isfinite(limit) else None


def more_rows(test: Contrast, shared: Shared) -> str:
    """How many more rows would settle an undecided test."""
    if not test.difference:
        return "no gap seen"
    if test.rows_needed is None:
        return "+∞ rows"
    return f"+{_about(test.rows_needed - shared.rows)} rows"


def _outlook(test: Contrast, shared: Shared) -> str:
    least = None if test.detectable is None else difference(facts_of(test.metric), test.detectable).lstrip("+")
    shows = "They are too few to show any difference"
    if least is not None:
        shows = f"They would show a difference of {least} or more in at least 4 of 5 such tests"
    if not test.difference:
        return f"{shows}."
    if test.rows_needed is None:
        return f"{shows}; no number of rows would settle one like this."
    return f"{shows}; to settle one like this takes about {_about(test.rows_needed - shared.rows)} more."


def _about(rows: int) -> str:
    """Two digits, rounded up: the number is as uncertain as the difference that it is for."""
    step = 10 ** max(0, len(str(rows)) - 2)
    return f"{max(1, -(-rows // step) * step):,}"
