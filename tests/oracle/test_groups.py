"""Gaps between groups: against Newcombe's hybrid score interval, and how often chance alone is called a gap."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from tunesmith.evaluation.calibration import Ece
from tunesmith.evaluation.groups import Gap, gap, gaps, parted, sources, told
from tunesmith.evaluation.metrics import Accuracy, FloatArray
from tunesmith.report.gaps import gap_line, gap_lines, small_line
from tunesmith.types import Prediction


def hits(right: int, count: int) -> FloatArray:
    return np.column_stack([np.arange(count) < right, np.ones(count)]).astype(np.float64)


def score_interval(right: int, count: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return middle - half, middle + half


def test_two_groups_have_newcombes_interval() -> None:
    """Newcombe 1998, Stat. Med. 17: 56/70 and 48/80 differ by 0.2, within 0.0524 and 0.3339 (his method 10)."""
    found = gap(Accuracy(), {"one": hits(56, 70), "other": hits(48, 80)}, seed=0)
    assert found is not None
    assert (found.best, found.worst, found.groups) == ("one", "other", 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_of_more_groups_the_interval_is_one_of_all_pairs() -> None:
    tables = {"a": hits(45, 50), "b": hits(30, 50), "c": hits(40, 50), "d": hits(20, 40)}
    found = gap(Accuracy(), tables, seed=0)
    assert found is not None
    level = 1 - 0.05 / 6
    (below, above), (under, over) = score_interval(45, 50, level), score_interval(20, 40, level)
    assert (found.best, found.worst, found.value) == ("a", "d", pytest.approx(0.4))
    assert found.low == pytest.approx(0.4 - math.hypot(0.9 - below, over - 0.5))
    assert found.high == pytest.approx(0.4 + math.hypot(above - 0.9, 0.5 - under))


def test_chance_alone_is_rarely_called_a_gap() -> None:
    """Of groups that are equally good, at most 5% of samples have an interval above 0; without the care, most would."""
    draw, false, careless = np.random.default_rng(3), 0, 0
    for _ in range(300):
        rights = draw.binomial(60, 0.8, size=8)
        tables = {str(i): hits(int(right), 60) for i, right in enumerate(rights)}
        found = gap(Accuracy(), tables, seed=0)
        ends = {str(i): tables[str(i)] for i in (int(rights.argmax()), int(rights.argmin()))}
        alone = gap(Accuracy(), ends, seed=0)
        if found is not None and alone is not None:
            false, careless = false + (found.low > 0), careless + (alone.low > 0)
    assert false <= 24  # of 300, above which 5% has a probability of 1%
    assert careless > 100


def answered(right: list[bool], by: list[str]) -> tuple[list[Prediction], list[str]]:
    rows = [
        Prediction("up" if hit else "down", "up", f"row {i}", {}, {"up": 0.9, "down": 0.1})
        for i, hit in enumerate(right)
    ]
    return rows, by


def test_small_groups_are_named_and_not_judged() -> None:
    rows, by = answered(
        [True] * 30 + [i % 2 == 0 for i in range(30)] + [False] * 3, ["n"] * 30 + ["s"] * 30 + ["w"] * 3
    )
    of = parted(by, "shop", 20)
    assert {name: len(places) for name, places in of.judged.items()} == {"n": 30, "s": 30}
    entry = told("test", of, gaps(of, rows, [Accuracy(), Ece()], seed=0))
    assert (entry["judged"], entry["small"], entry["least"]) == ({"n": 30, "s": 30}, {"w": 3}, 20)
    accuracy, ece = entry["gaps"]
    assert (accuracy["metric"], accuracy["best"], accuracy["worst"]) == ("accuracy", "n", "s")
    assert (accuracy["value"], accuracy["groups"]) == (0.5, 2)
    assert accuracy["low"] > 0
    assert ece["low"] is None
    assert "200 are needed" in ece["reason"]
    assert small_line(entry) == "not judged, of fewer than 20 rows: 'w' 3"
    lines = gap_lines([entry])
    assert lines[0].startswith("test by shop: accuracy is best of 'n', worst of 's', of 2 groups: 0.500 apart [")
    assert "no interval of that, because of 30 rows in 15 bins" in lines[1]
    assert gap_line({**accuracy, "low": -0.1}, entry["judged"]).endswith("which chance alone can make")
    assert small_line({**entry, "small": {}}) is None
    assert gap_line({**accuracy, "value": 0.0}, entry["judged"]) == "accuracy is the same of all 2 groups"


def test_rows_of_one_source_count_as_such_and_one_group_has_no_gap() -> None:
    right = [i // 10 % 2 == 0 for i in range(60)] + [True] * 60
    rows, by = answered(right, ["a"] * 60 + ["b"] * 60)
    clusters = np.arange(120) // 10
    of = parted(by, "shop", 20)
    (alone,), (together,) = (gaps(of, rows, [Accuracy()], 0), gaps(of, rows, [Accuracy()], 0, clusters))
    assert alone.value == together.value == 0.5
    assert together.low < alone.low
    assert gap(Accuracy(), {"a": hits(3, 9)}, seed=0) is None
    assert isinstance(alone, Gap)


def test_rows_without_a_source_are_sources_of_their_own() -> None:
    assert len(set(sources(["a", "", "b", "", "a"]))) == 4
    found = sources(["a", "", "b", "", "a"])
    assert found[0] == found[4]
    assert sorted(set(found)) == [0, 1, 2, 3]
