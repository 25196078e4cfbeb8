"""docs/statistics.md names every figure of the simulation that is out of bounds, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "error_bars.json").read_text(encoding="utf-8"))
GAPS: dict[str, dict[str, float]] = json.loads(
    (ROOT / "benchmarks" / "results" / "group_gaps.json").read_text(encoding="utf-8")
)["figures"]
TOLD = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")


def test_what_does_not_hold_is_told_with_its_figure() -> None:
    outside: list[float] = []
    for found in RESULTS["populations"].values():
        for figure in ("coverage of values", "coverage of differences"):
            outside += [share for share in found[figure].values() if share is not None and not 0.93 <= share <= 0.97]
        outside += [share for share in found["false alarms"].values() if share > 0.065]
        outside += [share for share in [found.get("power at these rows", 1.0)] if share < 0.8]
    assert outside
    assert [share for share in outside if f"{100 * share:.1f}%" not in TOLD] == []


def test_intervals_are_missing_where_the_rows_are_too_few_and_nowhere_else() -> None:
    given = ("values with an interval", "differences with an interval")
    shares = {
        (name, kind, size): share
        for name, found in RESULTS["populations"].items()
        for kind in given
        for size, share in found[kind].items()
    }
    few = {key[0] for key, share in shares.items() if share < 0.95}
    metrics = {
        "macro-F1",
        "ROC-AUC",
        "ECE",
        "adaptive ECE",
        "balanced accuracy",
        "macro precision",
        "average precision",
    }
    assert {name.split(",")[0] for name in few} == metrics
    never_at_200 = ("ECE", "adaptive ECE", "macro precision")  # some samples, or all
    assert {key[2] for key, share in shares.items() if share < 0.95 and not key[0].startswith(never_at_200)} == {"50"}
    assert all(share == 1 for key, share in shares.items() if key[2] == "1000")


def test_equal_models_are_seldom_told_apart_by_any_metric() -> None:
    alarms = RESULTS["false alarms of a family after Holm"].values()
    assert len(alarms) == 3
    assert max(alarms) <= 0.065
    assert all(f"{100 * share:.1f}%" in TOLD for share in alarms)


def test_chance_is_called_a_gap_between_groups_as_seldom_as_is_told() -> None:
    for groups in (2, 5, 10):
        own = [found for name, found in GAPS.items() if f", {groups} groups of" in name]
        assert len(own) == 8
        told = []
        for figure in ("equal groups called apart", "holds the gap of the groups named", "holds the largest gap"):
            shares = [found[figure] for found in own]
            told.append(f"{100 * min(shares):.1f}% to {100 * max(shares):.1f}%")
            assert max(shares) <= 0.06 if figure.startswith("equal") else min(shares) >= 0.93
        assert f"| {groups} | {' | '.join(told)} |" in TOLD
