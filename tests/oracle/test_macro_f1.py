"""Classification metrics against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tunesmith.evaluation.metrics import Accuracy, MacroF1, build, statistics
from tunesmith.types import Prediction

LABELS = ("a", "b", "c", "d", "e")
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)


def predictions_of(pairs: list[tuple[str, str]]) -> list[Prediction]:
    return [Prediction(output, reference, f"row {i}") for i, (output, reference) in enumerate(pairs)]


@given(PAIRS)
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    metric = MacroF1(LABELS)
    table = statistics(metric, predictions_of(pairs))
    expected = f1_score([r for _, r in pairs], [o for o, _ in pairs], average="macro")
    assert float(metric.aggregate(table.sum(axis=0))) == pytest.approx(expected, abs=1e-12)


@given(PAIRS)
def test_accuracy_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    metric = Accuracy()
    table = statistics(metric, predictions_of(pairs))
    expected = accuracy_score([r for _, r in pairs], [o for o, _ in pairs])
    assert float(metric.aggregate(table.sum(axis=0))) == pytest.approx(expected, abs=1e-12)


@given(PAIRS, st.lists(st.sampled_from(["", "A", "a.", "no label at all"]), min_size=1, max_size=5))
def test_an_answer_that_is_no_label_is_a_miss_and_no_class(pairs: list[tuple[str, str]], noise: list[str]) -> None:
    """scikit-learn's, given the labels that references and known answers hold."""
    pairs = [*pairs, *((text, "a") for text in noise)]
    metric = build(["macro_f1"], predictions_of(pairs), LABELS)[0]
    value = metric.aggregate(statistics(metric, predictions_of(pairs)).sum(axis=0))
    held = sorted({r for _, r in pairs} | {o for o, _ in pairs if o in LABELS})
    expected = f1_score([r for _, r in pairs], [o for o, _ in pairs], labels=held, average="macro")
    assert float(value) == pytest.approx(expected, abs=1e-12)


@given(st.lists(PAIRS, min_size=2, max_size=4))
def test_leading_dimensions_are_groups(groups: list[list[tuple[str, str]]]) -> None:
    metric = MacroF1(LABELS)
    sums = np.stack([statistics(metric, predictions_of(pairs)).sum(axis=0) for pairs in groups])
    together = metric.aggregate(sums[:, None])
    assert together.shape == (len(groups), 1)
    for value, row in zip(together[:, 0], sums, strict=True):
        assert value == metric.aggregate(row)
