"""How far the groups of a column are apart, in sentences that claim no more than the rows show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.report.before_after import facts_of
from tunesmith.report.figures import figure

NO_VALUE = "(no value)"  # what a group is called whose rows have none in the column
Json = Mapping[str, Any]
FEW_ROWS = 20  # of a group; intervals of fewer hold less often than they say
NAMED = 8  # groups that are too small are named, and counted beyond


def _called(value: str) -> str:
    return repr(value) if value else NO_VALUE


def gap_line(gap: Json, rows: Mapping[str, int], title: str | None = None) -> str:
    """One metric, called by its `title` or else its name: the best group, the worst, what chance leaves of the gap.

    `rows`: how many each group has.
    """
    few = [rows[gap["best"]], rows[gap["worst"]]]
    told = f"; so few rows ({few[0]:,} and {few[1]:,}) tell little" if min(few) < FEW_ROWS else ""
    best, worst = _called(gap["best"]), _called(gap["worst"])
    if gap["value"] == 0:
        return f"{title or gap['metric']} is the same of all {gap['groups']} groups"
    ends = f"{title or gap['metric']} is best of {best}, worst of {worst}, of {gap['groups']} groups"
    if gap["low"] is None:
        because = f", because of {gap['reason'].partition(': ')[2]}" if gap.get("reason") else ""
        return f"{ends}: {figure(gap['value'])} apart; no interval of that{because}{told}"
    span = f"{figure(gap['value'])} apart [{figure(gap['low'])}, {figure(gap['high'])}]"
    return f"{ends}: {span}" + ("" if gap["low"] > 0 else ", which chance alone can make") + told


def titled_line(gap: Json, rows: Mapping[str, int]) -> str:
    """The same, with the metric called as in a report."""
    return gap_line(gap, rows, facts_of(gap["metric"]).title)


def small_line(entry: Json) -> str | None:
    """The groups that are not judged; None if all are."""
    small: Mapping[str, int] = entry["small"]
    if not small:
        return None
    listed = ", ".join(f"{_called(name)} {count:,}" for name, count in list(small.items())[:NAMED])
    more = f", and {len(small) - NAMED:,} more" if len(small) > NAMED else ""
    return f"not judged, of fewer than {entry['least']:,} rows: {listed}{more}"


def gap_lines(groups: Sequence[Json]) -> list[str]:
    """All of them, a line each, for a screen."""
    lines: list[str] = []
    for entry in groups:
        gaps = [gap_line(gap, entry["judged"]) for gap in entry["gaps"]]
        found = [*gaps, *filter(None, [small_line(entry)])]
        lines += [f"{entry['data']} by {entry['column']}: {line}" for line in found]
    return lines
