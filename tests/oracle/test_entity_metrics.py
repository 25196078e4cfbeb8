"""Entities of tagged words and their F1 against a slow version that looks at every stretch, and cases by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.entity_metrics import entities
from tunesmith.evaluation.metrics import applicable, statistics
from tunesmith.types import Prediction

TAGS = ["O", *(f"{mark}-{kind}" for mark in "BIESLU" for kind in ("PER", "A-B"))]
tags = st.lists(st.sampled_from(TAGS), min_size=1, max_size=9)


def _slow(given: list[str]) -> set[tuple[str, int, int]]:
    """Every stretch of words of one type, of which only the first begins it, only the last ends it, and none could be
    added to at either side."""

    def joined(at: int) -> bool:
        """Whether word at goes on with the entity of the word before it."""
        if not 0 < at < len(given) or "O" in (given[at - 1], given[at]):
            return False
        (mark, kind), (last, before) = given[at].split("-", 1), given[at - 1].split("-", 1)
        return kind == before and mark in "IEL" and last in "BI"

    return {
        (given[start][2:], start, stop)
        for start, stop in combinations(range(len(given) + 1), 2)
        if given[start] != "O"
        and all(joined(at) for at in range(start + 1, stop))
        and not joined(start)
        and not joined(stop)
    }


@given(tags)
def test_entities_are_those_of_the_slow_version(given: list[str]) -> None:
    assert entities(given) == _slow(given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER O", {("PER", 0, 2)}),
        ("I-PER I-PER O I-PER", {("PER", 0, 2), ("PER", 3, 4)}),  # no B, and yet they begin
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("B-PER E-PER I-PER", {("PER", 0, 2), ("PER", 2, 3)}),
        ("S-PER U-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B I O", {("", 0, 2)}),
    ],
)
def test_entities_by_hand(given: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(given.split()) == found


@given(st.lists(st.tuples(tags, st.lists(st.one_of(st.none(), st.sampled_from(TAGS)), min_size=9)), min_size=1))
def test_the_metrics_are_the_counts_of_all_rows(rows: list[tuple[list[str], list[str | None]]]) -> None:
    pairs = [(actual, [new or old for old, new in zip(actual, other, strict=False)]) for actual, other in rows]
    predictions = [Prediction(" ".join(given), " ".join(actual), "t:1") for actual, given in pairs]
    true = {(row, *found) for row, (actual, _) in enumerate(pairs) for found in _slow(actual)}
    told = {(row, *found) for row, (_, given) in enumerate(pairs) for found in _slow(given)}
    hits = len(true & told)
    expected = {
        "entity_precision": hits / len(told) if told else 0.0,
        "entity_recall": hits / len(true) if true else 0.0,
        "entity_f1": 2 * hits / (len(true) + len(told)) if true or told else 0.0,
        "tag_accuracy": sum(a == b for pair in pairs for a, b in zip(*pair, strict=True))
        / sum(len(actual) for actual, _ in pairs),
    }
    for name, value in expected.items():
        metric = METRICS.get(name)()
        assert float(metric.aggregate(statistics(metric, predictions).sum(0))) == pytest.approx(value)
    assert ("entity_f1" in applicable(list(expected), predictions)) == bool(true)


def test_where_the_metrics_apply() -> None:
    speech = [Prediction("NOUN VERB", "NOUN IN", "t:1")]
    assert applicable(["entity_f1", "tag_accuracy"], speech) == ["tag_accuracy"]
    assert applicable(["entity_f1", "tag_accuracy"], [Prediction("O", None, "t:1")]) == []
    metric = METRICS.get("tag_accuracy")()
    assert metric.statistics(Prediction("O", "O B-X", "t:1")) == (1.0, 2.0)
    with pytest.raises(InputError, match="entity_f1 needs a reference"):
        METRICS.get("entity_f1")().statistics(Prediction("O", None, "t:1"))
    f1 = METRICS.get("entity_f1")()
    assert f1.worth(np.array([1.0, 4.0, 3.0])) == 3.0  # type: ignore[attr-defined]
