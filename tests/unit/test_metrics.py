"""What each metric counts, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.json_metrics import FieldAccuracy, JsonValid, SchemaValid, parse_object, same
from tunesmith.evaluation.likelihood_metrics import Loss, Perplexity
from tunesmith.evaluation.metrics import ExactMatch, MacroF1, RowMetric, build, statistics
from tunesmith.types import Prediction


def value_of(metric: RowMetric, *predictions: Prediction) -> float:
    return float(metric.aggregate(statistics(metric, predictions).sum(axis=0)))


def test_every_metric_is_found_by_its_own_name() -> None:
    expected = {
        "exact_match",
        "accuracy",
        "macro_f1",
        "loss",
        "perplexity",
        "json_valid",
        "schema_valid",
        "field_accuracy",
    }
    assert expected <= set(METRICS)
    for name in METRICS:
        assert METRICS.get(name)(["a", "b"]).name == name


@pytest.mark.parametrize(
    ("output", "reference", "hit"),
    [("yes", "yes", 1), (" yes\n", "yes", 1), ("Yes", "yes", 0), ("y es", "yes", 0), ("", " ", 1)],
)
def test_exact_match_forgives_only_white_space_at_the_ends(output: str, reference: str, hit: int) -> None:
    assert ExactMatch().statistics(Prediction(output, reference, "r")) == (hit, 1.0)


def test_loss_is_per_token_not_per_row() -> None:
    rows = [Prediction("", None, "r", {"nll": 9.0, "tokens": 3}), Prediction("", None, "s", {"nll": 1.0, "tokens": 7})]
    assert value_of(Loss(), *rows) == pytest.approx(1.0)
    assert value_of(Perplexity(), *rows) == pytest.approx(math.e)


def test_no_tokens_have_no_loss() -> None:
    assert math.isnan(value_of(Loss(), Prediction("", None, "r", {"nll": 0.0, "tokens": 0.0})))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        (' {"a": [1, null]}\n', True),
        ("{}", True),
        ("[1]", False),
        ("1", False),
        ("", False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": 1} and so on', False),
        ("{'a': 1}", False),
        ('{"a": NaN}', False),
        ('{"a": -Infinity}', False),
        ('{"a": 1, "a": 2}', False),
        ('{"b": {"a": 1, "a": 1}}', False),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, False),
    ],
)
def test_strict_json_objects(text: str, valid: bool) -> None:
    assert (parse_object(text) is not None) == valid
    assert JsonValid().statistics(Prediction(text, None, "r")) == (float(valid), 1.0)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (None, None, True),
        (None, False, False),
        ("1", 1, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ([True], [1], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": {"b": 1}}, {"a": {"b": True}}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([], {}, False),
    ],
)
def test_json_equality(left: Any, right: Any, equal: bool) -> None:
    assert same(left, right) == equal
    assert same(right, left) == equal


@pytest.mark.parametrize(
    ("output", "reference", "share"),
    [
        ('{"a": 1, "b": "x"}', '{"a": 1, "b": "x"}', 1.0),
        ('{"a": 1}', '{"a": 1, "b": "x"}', 0.5),
        ('{"a": 1, "b": null, "c": 3}', '{"a": 1, "b": "x"}', 0.5),
        ('{"a": 1, "c": 3}', '{"a": 1}', 1.0),
        ("a: 1", '{"a": 1}', 0.0),
        ("{}", "{}", 1.0),
        ('{"a": 1}', "{}", 0.0),
        ("{}", '{"a": null}', 0.0),
    ],
)
def test_field_accuracy(output: str, reference: str, share: float) -> None:
    assert FieldAccuracy().statistics(Prediction(output, reference, "r")) == (share, 1.0)


@pytest.mark.parametrize(
    ("metric", "prediction", "cause"),
    [
        ("exact_match", Prediction("x", None, "test.jsonl:3"), "exact_match needs a reference, and test.jsonl:3"),
        ("accuracy", Prediction("x", None, "test.jsonl:3"), "accuracy needs a reference, and test.jsonl:3"),
        ("macro_f1", Prediction("x", None, "test.jsonl:3"), "macro_f1 needs a reference, and test.jsonl:3"),
        ("field_accuracy", Prediction("x", None, "test.jsonl:3"), "field_accuracy needs a reference"),
        ("field_accuracy", Prediction("{}", "x", "test.jsonl:3"), "JSON objects, and that of test.jsonl:3 is not"),
        ("loss", Prediction("x", "x", "test.jsonl:3"), "loss needs the score 'nll', and test.jsonl:3"),
        ("perplexity", Prediction("x", "x", "t:3", {"nll": 1.0}), "perplexity needs the score 'tokens', and t:3"),
        ("macro_f1", Prediction("a", "z", "test.jsonl:3"), "test.jsonl:3 has the label 'z'"),
    ],
)
def test_predictions_that_lack_what_a_metric_needs(metric: str, prediction: Prediction, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        METRICS.get(metric)(["a", "b"]).statistics(prediction)
    assert cause in caught.value.cause
    assert caught.value.remedy


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        statistics(Loss(), [])


def test_the_label_set_is_the_classifiers_and_the_references() -> None:
    rows = [Prediction("a", "b", "r", probabilities={"a": 0.5, "b": 0.2, "c": 0.3}), Prediction("free text", "d", "s")]
    metric = build(["macro_f1"], rows)[0]
    assert isinstance(metric, MacroF1)
    assert metric.labels == ("a", "b", "c", "d")


def test_a_label_that_training_never_saw_is_a_class_of_score_0() -> None:
    rows = [Prediction("a", "a", "r"), Prediction("a", "new", "s")]
    metric = build(["macro_f1"], rows, labels=["a", "b"])[0]
    assert value_of(metric, *rows) == pytest.approx((2 / 3 + 0) / 2)


def test_perfect_macro_f1_ignores_absent_classes() -> None:
    metric = MacroF1(["a", "b", "c"])
    assert value_of(metric, Prediction("a", "a", "r"), Prediction("b", "b", "s")) == 1.0
    assert math.isnan(float(metric.aggregate(np.zeros(9))))


@pytest.mark.parametrize(
    ("output", "valid"),
    [
        ('{"a": 2, "b": {"c": "z"}}', 1),
        ('{"b": {"c": ""}, "a": 0.5}', 1),
        ('{"a": 2}', 0),
        ('{"a": 2, "b": {"c": "z"}, "d": 1}', 0),
        ('{"a": true, "b": {"c": "z"}}', 0),
        ('{"a": "2", "b": {"c": "z"}}', 0),
        ('{"a": 2, "b": {"c": null}}', 0),
        ("no JSON", 0),
    ],
)
def test_a_schema_is_the_fields_and_types_of_the_reference(output: str, valid: int) -> None:
    assert SchemaValid().statistics(Prediction(output, '{"a": 1, "b": {"c": "x"}}', "r")) == (valid, 1.0)
