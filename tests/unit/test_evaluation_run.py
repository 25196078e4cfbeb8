"""Records, paired effects, baselines and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from tunesmith.errors import InputError
from tunesmith.evaluation.json_metrics import FieldAccuracy
from tunesmith.evaluation.metrics import Accuracy, ExactMatch, Loss, MacroF1, Perplexity, build
from tunesmith.evaluation.run import (
    Effect,
    compare,
    majority,
    mcnemar,
    measure,
    metric_names,
    records_to_json,
    table,
)
from tunesmith.types import Metric, Prediction, Row


def answered(outputs: str, references: str) -> list[Prediction]:
    return [Prediction(o, r, f"row {i}") for i, (o, r) in enumerate(zip(outputs, references, strict=True))]


def scored(nll: Sequence[float], tokens: Sequence[float]) -> list[Prediction]:
    pairs = zip(nll, tokens, strict=True)
    return [Prediction("", None, f"row {i}", {"nll": float(x), "tokens": float(t)}) for i, (x, t) in enumerate(pairs)]


def test_measure_gives_a_record_a_metric() -> None:
    rows = answered("aabb", "aaba")
    records = measure("base", "test", rows, build(["accuracy", "macro_f1"], rows), seed=1)
    assert [(r.model, r.data, r.metric, r.n, r.group) for r in records] == [
        ("base", "test", "accuracy", 4, "all"),
        ("base", "test", "macro_f1", 4, "all"),
    ]
    assert records[0].value == 0.75
    assert records[1].value == pytest.approx((0.8 + 2 / 3) / 2)
    assert all(0 <= r.low <= r.value <= r.high <= 1 for r in records)


@pytest.mark.parametrize("metric", [ExactMatch(), Accuracy()])
def test_rates_are_tested_by_mcnemar(metric: ExactMatch) -> None:
    references = "a" * 40
    base, tuned = (
        answered("a" * 20 + "b" * 20, references),
        answered("a" * 18 + "b" * 2 + "a" * 15 + "b" * 5, references),
    )
    effect = compare(base, tuned, metric, seed=0)
    assert effect.difference == pytest.approx(13 / 40)
    assert effect.p == pytest.approx(binomtest(2, 17).pvalue)
    assert 0 < effect.low < effect.difference < effect.high < 1


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (0, 9), (300, 240)])
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


def test_a_model_compared_with_itself_has_no_effect() -> None:
    rng = np.random.default_rng(0)
    rows = scored(rng.gamma(2, 20, 60), np.full(60, 40))
    assert compare(rows, rows, Loss(), 0) == Effect(0.0, 0.0, 0.0, 1.0)
    assert compare(rows, rows, Perplexity(), 0) == Effect(0.0, 0.0, 0.0, 1.0)
    labels = answered("ab" * 30, "aab" * 20)
    assert compare(labels, labels, MacroF1("ab"), 0) == Effect(0.0, 0.0, 0.0, 1.0)
    effect = compare(labels, labels, Accuracy(), 0)
    # 60 rows that did not change do not prove that none ever will.
    assert effect.low < effect.difference == 0 < effect.high
    assert effect.p == 1.0


def test_pairing_sees_what_two_intervals_hide() -> None:
    """Rows differ far more than models: the intervals overlap, and the difference is still certain."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 200, 100)
    base = tokens * rng.lognormal(0, 0.8, 100)
    tuned = base * rng.uniform(0.85, 0.99, 100)
    before, after = scored(base, tokens), scored(tuned, tokens)
    records = [measure("m", "d", rows, [Loss()], 0)[0] for rows in (before, after)]
    assert records[1].high > records[0].low
    for metric in (Loss(), Perplexity()):
        effect = compare(before, after, metric, 0)
        assert effect.low < effect.difference < effect.high < 0
        assert effect.p == pytest.approx(1 / 2001)
    assert compare(before, after, Loss(), 0).difference == pytest.approx(records[1].value - records[0].value)


@pytest.mark.parametrize("same_tokens", [True, False])
def test_paired_loss_covers_its_difference(same_tokens: bool) -> None:
    rng = np.random.default_rng(2)
    held = 0
    small: list[float] = []
    for trial in range(400):
        tokens = np.maximum(1, np.round(rng.lognormal(4, 0.6, 60)))
        other = tokens if same_tokens else tokens + 1
        per_token = rng.lognormal(0, 0.5, 60)
        base, tuned = scored(per_token * tokens, tokens), scored(per_token * rng.lognormal(0, 0.2, 60) * other, other)
        effect = compare(base, tuned, Loss(), trial, resamples=400)
        held += effect.low <= math.exp(0.125) * (math.exp(0.02) - 1) <= effect.high
        small.append(effect.p)
    assert 0.92 <= held / 400 <= 0.98
    assert min(small) >= 1 / 401


def test_p_values_are_uniform_where_there_is_no_effect() -> None:
    rng = np.random.default_rng(3)
    found: list[float] = []
    for trial in range(400):
        # The tuned model is right as often as the base, on other rows.
        base = "".join(rng.choice(["a", "b"], 40, p=[0.7, 0.3]))
        tuned = "".join(rng.choice(["a", "b"], 40, p=[0.7, 0.3]))
        references = "".join(rng.choice(["a", "b"], 40))
        found.append(compare(answered(base, references), answered(tuned, references), MacroF1("ab"), trial, 300).p)
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.08
    assert 0.4 <= np.mean(np.array(found) <= 0.5) <= 0.6


def test_one_row_says_nothing_of_a_difference() -> None:
    one = [Prediction('{"a": 1}', '{"a": 1}', "r")]
    other = [Prediction('{"a": 2}', '{"a": 1}', "r")]
    assert compare(other, one, FieldAccuracy(), 0) == Effect(1.0, -1.0, 1.0, 1.0)


def test_other_rows_are_refused() -> None:
    rows = answered("ab", "ab")
    with pytest.raises(InputError, match="2 and 1 rows"):
        compare(rows, rows[:1], Accuracy(), 0)
    with pytest.raises(InputError, match="different rows: row 0 and row 1"):
        compare(rows, rows[::-1], Accuracy(), 0)


def test_effects_repeat_with_their_seed() -> None:
    rng = np.random.default_rng(0)
    base, tuned = scored(rng.gamma(2, 20, 50), np.full(50, 40)), scored(rng.gamma(2, 18, 50), np.full(50, 40))
    assert compare(base, tuned, Loss(), 7) == compare(base, tuned, Loss(), 7)


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


def test_records_are_json_even_where_a_limit_is_infinite() -> None:
    records = measure("tuned", "test", scored([2.0], [4.0]), [Loss()], 0)
    assert json.loads(json.dumps(records_to_json(records), allow_nan=False)) == [
        {
            "model": "tuned",
            "data": "test",
            "metric": "loss",
            "value": 0.5,
            "low": 0.0,
            "high": None,
            "n": 1,
            "group": "all",
        }
    ]


def shown(records: list[Metric], effects: dict[tuple[str, str], Effect]) -> str:
    console = Console(width=140, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(table(records, effects))
    return capture.get()


def test_table_before_and_after() -> None:
    records = [
        Metric("base", "test", "accuracy", 0.5, 0.4, 0.6, 100),
        Metric("tuned", "test", "accuracy", 0.75, 0.65, 0.83, 100),
        Metric("tuned", "test", "loss", 1.25, 1.0, math.inf, 100),
    ]
    text = shown(records, {("test", "accuracy"): Effect(0.25, 0.15, 0.34, 0.0004)})
    assert "0.500 [0.400, 0.600]" in text
    assert "0.750 [0.650, 0.830]" in text
    assert "+0.250 [+0.150, +0.340]" in text
    assert "<0.001" in text
    assert "1.250 [1.000, inf]" in text
    assert "data" not in text


def test_table_names_the_data_when_there_are_several() -> None:
    records = [
        Metric("tuned", "test", "accuracy", 0.5, 0.4, 0.6, 100),
        Metric("tuned", "hard", "accuracy", 0.5, 0.4, 0.6, 50),
        Metric("tuned", "hard", "accuracy", 0.25, 0.1, 0.6, 8, group="long"),
    ]
    text = shown(records, {})
    assert "hard / long" in text
    assert "test" in text


def test_table_shows_the_baseline_that_was_measured() -> None:
    records = [
        Metric("majority", "test", "accuracy", 0.3, 0.2, 0.4, 100),
        Metric("tuned", "test", "accuracy", 0.5, 0.4, 0.6, 100),
    ]
    text = shown(records, {("test", "accuracy"): Effect(0.2, 0.1, 0.3, 0.01)})
    assert "majority" in text
    assert "0.300 [0.200, 0.400]" in text
    assert "base" not in text
