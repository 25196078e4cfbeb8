"""Metrics of class counts against scikit-learn, and their intervals against the spread of resamples."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import interval, wilson
from tunesmith.evaluation.metrics import applicable, build, lacking, statistics
from tunesmith.types import Prediction

LABELS = ("a", "b", "c", "d")
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30)
SETS = st.lists(st.tuples(st.sets(st.sampled_from(LABELS)), st.sets(st.sampled_from(LABELS))), min_size=1, max_size=20)


def rows_of(pairs: list[tuple[str, str]]) -> list[Prediction]:
    return [Prediction(said, true, f"row {i}") for i, (said, true) in enumerate(pairs)]


def value(name: str, rows: list[Prediction]) -> float:
    metric = build([name], rows, LABELS)[0]
    return float(metric.aggregate(statistics(metric, rows).sum(axis=0)))


@settings(max_examples=30)
@given(PAIRS)
def test_of_one_label_a_row_they_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    said, true = ([pair[i] for pair in pairs] for i in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that only predictions hold
        expected = {
            "balanced_accuracy": sk.balanced_accuracy_score(true, said),
            "macro_recall": sk.recall_score(true, said, average="macro", zero_division=0),
            "macro_precision": sk.precision_score(true, said, average="macro", zero_division=0),
            "micro_precision": sk.precision_score(true, said, average="micro"),
            "micro_recall": sk.recall_score(true, said, average="micro"),
            "mcc": sk.matthews_corrcoef(true, said),
        }
    assert {name: value(name, rows_of(pairs)) for name in expected} == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(PAIRS, st.integers(1, 5))
def test_answers_that_are_no_label_are_one_more_class_of_mcc(pairs: list[tuple[str, str]], noise: int) -> None:
    pairs = [*pairs, *[("no label", "a")] * noise]
    expected = sk.matthews_corrcoef([true for _, true in pairs], [said for said, _ in pairs])
    assert value("mcc", rows_of(pairs)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(SETS)
def test_of_label_sets_they_are_scikit_learns(pairs: list[tuple[set[str], set[str]]]) -> None:
    rows = [Prediction(json.dumps(sorted(a)), json.dumps(sorted(b)), "row", multi_label=True) for a, b in pairs]
    said, true = (np.array([[label in pair[i] for label in LABELS] for pair in pairs]) for i in (0, 1))
    held = np.flatnonzero(said.any(0) | true.any(0)).tolist()
    if not held:
        return
    for average in ("macro", "micro"):
        precision, recall, _, _ = sk.precision_recall_fscore_support(
            true, said, average=average, labels=held, zero_division=0
        )
        assert value(f"{average}_precision", rows) == pytest.approx(precision)
        if average == "macro" or true.any():
            assert value(f"{average}_recall", rows) == pytest.approx(recall)


def test_what_is_of_one_label_refuses_several_and_is_left_out_by_default() -> None:
    row = Prediction('["a", "b"]', '["a"]', "rows.jsonl:4", multi_label=True)
    for name in ("balanced_accuracy", "mcc"):
        with pytest.raises(InputError, match=f"{name} is of one label a row, and rows.jsonl:4 may have several"):
            value(name, [row])
    names = ["balanced_accuracy", "mcc", "macro_recall", "micro_recall"]
    assert applicable(names, [row]) == ["macro_recall", "micro_recall"]
    assert applicable(names, rows_of([("a", "b")])) == ["balanced_accuracy", "mcc", "macro_recall"]


def test_a_class_whose_few_rows_are_all_right_is_not_certain() -> None:
    rows = rows_of([("a", "a")] * 150 + [("b", "b")] * 12)
    metric = build(["balanced_accuracy"], rows, LABELS[:2])[0]
    found, low, high = interval(metric, statistics(metric, rows), seed=0)
    assert (found, high) == (1.0, 1.0)
    alone = (1 - wilson(12, 12)[0]) / 2  # were only the rarer class uncertain
    assert alone < 1 - low < 2 * alone


def test_rows_of_one_source_are_less_sure_than_rows() -> None:
    draw = np.random.default_rng(1)
    true = draw.choice(list(LABELS), 200)
    said = np.where(draw.random(200) < 0.8, true, draw.choice(list(LABELS), 200))
    once = rows_of(list(zip(said.tolist(), true.tolist(), strict=True)))
    metric = METRICS.get("macro_recall")(LABELS)
    alone = interval(metric, statistics(metric, once), seed=0)
    fourfold = statistics(metric, [row for row in once for _ in range(4)])
    sources = interval(metric, fourfold, seed=0, clusters_N=np.repeat(np.arange(200), 4))
    assert sources == pytest.approx(alone, abs=0.01)


def test_they_say_which_class_has_too_little() -> None:
    rows = rows_of([("a", "a")] * 40 + [("a", "b")] * 20)
    said = {name: build([name], rows, LABELS[:2])[0] for name in ("macro_precision", "balanced_accuracy", "mcc")}
    reasons = {name: lacking(metric, statistics(metric, rows)) for name, metric in said.items()}
    assert reasons == {
        "macro_precision": "no interval: class 'b' without an answer to judge by",
        "balanced_accuracy": None,
        "mcc": None,
    }
    few = rows_of([("a", "a")] * 40 + [("b", "b")] * 3)
    metric = build(["mcc"], few, LABELS[:2])[0]
    assert lacking(metric, statistics(metric, few)) == ("no interval: 3 rows outside the largest class; 10 are needed")
