"""Records and baselines."""

from __future__ import annotations

import json
import math

import pytest

from tunesmith.errors import InputError
from tunesmith.evaluation.likelihood_metrics import Loss
from tunesmith.evaluation.metrics import build
from tunesmith.evaluation.run import measure, metric_names, records_to_json
from tunesmith.objectives.classify import majority
from tunesmith.types import Prediction, Row


def test_measure_gives_a_record_a_metric() -> None:
    rows = [Prediction(o, r, "row") for o, r in zip("aabb", "aaba", strict=True)]
    records = measure("base", "test", rows, build(["accuracy", "macro_f1"], rows), seed=1)
    assert [(r.model, r.data, r.metric, r.n, r.group) for r in records] == [
        ("base", "test", "accuracy", 4, "all"),
        ("base", "test", "macro_f1", 4, "all"),
    ]
    assert records[0].value == 0.75
    assert records[1].value == pytest.approx((0.8 + 2 / 3) / 2)
    assert 0 <= records[0].low <= records[0].value <= records[0].high <= 1
    assert records[0].reason is None
    # Two classes, of 3 rows and 1, show no interval.
    assert math.isnan(records[1].low)
    assert math.isnan(records[1].high)
    assert records[1].reason == "no interval: class 'b' has 1 row, so all rows are worth 3.0; 10 are needed"


def test_majority_answers_the_most_frequent_label() -> None:
    rows = [
        Row({"text": "x", "label": "b"}, "t:1"),
        Row({"text": "y", "label": "new"}, "t:2"),
        Row({"text": "z"}, "t:3"),
    ]
    predictions = majority({"c": 2, "b": 4, "a": 4}, rows)
    assert [(p.output, p.reference, p.where) for p in predictions] == [
        ("a", "b", "t:1"),
        ("a", "new", "t:2"),
        ("a", None, "t:3"),
    ]
    assert predictions[0].scores == {"nll": pytest.approx(-math.log(0.4)), "tokens": 1.0}
    assert predictions[0].probabilities == {"a": 0.4, "b": 0.4, "c": 0.2}
    assert predictions[1].scores["nll"] == pytest.approx(126 * math.log(2))
    assert predictions[2].scores == {}
    measured = measure("majority", "t", predictions[:2], build(["accuracy", "macro_f1", "loss"], predictions[:2]), 0)
    assert [r.value for r in measured][:2] == [0.0, 0.0]
    with pytest.raises(InputError, match="no majority label"):
        majority({}, rows)


def test_metric_names() -> None:
    assert metric_names(["loss", "accuracy"], None) == ["loss", "accuracy"]
    assert metric_names(["loss"], ["macro_f1", "accuracy", "macro_f1"]) == ["macro_f1", "accuracy"]
    with pytest.raises(InputError, match="unknown metric 'acuracy'") as caught:
        metric_names(["loss"], ["acuracy"])
    assert "did you mean 'accuracy'?" in caught.value.remedy
    with pytest.raises(InputError, match="names no metric"):
        metric_names(["loss"], [])


def test_records_are_json_even_where_there_is_no_limit() -> None:
    records = measure("tuned", "test", [Prediction("", None, "row", {"nll": 2.0, "tokens": 4.0})], [Loss()], 0)
    assert json.loads(json.dumps(records_to_json(records), allow_nan=False)) == [
        {
            "model": "tuned",
            "data": "test",
            "metric": "loss",
            "value": 0.5,
            "low": None,
            "high": None,
            "n": 1,
            "group": "all",
            "reason": "no interval: 1 row, and it takes 5",
            "signature": None,
        }
    ]
