"""Calibration against slow versions and scikit-learn: ECE, Brier, the three scalings, and the coverage of sets."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from tunesmith.errors import InputError
from tunesmith.evaluation import scaling
from tunesmith.evaluation.calibrated import Calibration, of_card
from tunesmith.evaluation.calibration import BINS, AdaptiveEce, Brier
from tunesmith.evaluation.conformal import SCORES, ConformalCoverage, ConformalSetSize, Sets, chance, least_rows
from tunesmith.evaluation.metrics import FloatArray, statistics
from tunesmith.evaluation.scaling import Isotonic, Temperature, Vector
from tunesmith.recipe_evaluation import Conformal
from tunesmith.types import Prediction, Row

LABELS = ("a", "b", "c", "d")


def drawn(count: int, seed: int, hot: float = 1.0, labels: tuple[str, ...] = LABELS) -> list[Prediction]:
    """Labels drawn from true probabilities; answers whose log-probabilities are `hot` times theirs."""
    draw = np.random.default_rng(seed)
    logits = 2 * draw.normal(size=(count, len(labels)))
    truth, said = special.softmax(logits, axis=1), special.softmax(hot * logits, axis=1)
    found: list[Prediction] = []
    for index in range(count):
        own = labels[int(draw.choice(len(labels), p=truth[index]))]
        shares = dict(zip(labels, said[index].tolist(), strict=True))
        nll = -math.log(shares[own])
        found.append(
            Prediction(max(shares, key=shares.__getitem__), own, f"row {index}", {"nll": nll, "tokens": 1.0}, shares)
        )
    return found


def tables(predictions: list[Prediction]) -> tuple[FloatArray, np.ndarray]:
    label_N = np.array([LABELS.index(p.reference or "") for p in predictions])
    return scaling.table([p.probabilities or {} for p in predictions], LABELS, 1e-30), label_N


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 60))
def test_adaptive_ece_is_that_of_bins_of_equally_many_rows(seed: int, count: int) -> None:
    predictions = drawn(count, seed)
    sure = [max((p.probabilities or {}).values()) for p in predictions]
    order = sorted(range(count), key=lambda i: sure[i])
    slow = 0.0
    for number in range(BINS):
        own = [i for rank, i in enumerate(order) if rank * BINS // count == number]
        slow += abs(sum(sure[i] - (predictions[i].output == predictions[i].reference) for i in own)) / count
    metric = AdaptiveEce()
    assert float(metric.aggregate(statistics(metric, predictions).sum(0))) == pytest.approx(slow)
    assert math.isnan(metric.statistics(predictions[0])[0])


@given(st.integers(0, 999), st.integers(1, 20))
def test_brier_is_twice_that_of_scikit_learn(seed: int, count: int) -> None:
    predictions = drawn(count, seed, labels=("no", "yes"))
    said = [(p.probabilities or {})["yes"] for p in predictions]
    expected = 2 * brier_score_loss([p.reference == "yes" for p in predictions], said)
    metric = Brier()
    assert float(metric.aggregate(statistics(metric, predictions).sum(0))) == pytest.approx(expected)
    unseen = replace(predictions[0], reference="never")
    assert metric.statistics(unseen)[0] == pytest.approx(1 + said[0] ** 2 + (1 - said[0]) ** 2)


@pytest.mark.parametrize("hot", [0.4, 1.0, 2.5])
def test_the_temperature_is_the_one_that_was_put_in(hot: float) -> None:
    logprobs, label = tables(drawn(3000, 1, hot))
    found = Temperature.fit(logprobs, label)
    assert found.temperature == pytest.approx(hot, rel=0.1)
    grid = np.linspace(0.3, 3, 541)
    nll = [-special.log_softmax(logprobs / t, axis=1)[np.arange(len(label)), label].mean() for t in grid]
    assert found.temperature == pytest.approx(float(grid[int(np.argmin(nll))]), abs=6e-3)
    assert (found(logprobs).argmax(1) == logprobs.argmax(1)).all()


def test_vector_scaling_is_the_best_of_its_kind() -> None:
    """Of two labels it is logistic regression on the difference; on the true scale it stays what it is."""
    logprobs, label = tables(drawn(3000, 2, 1.7))
    logprobs[:, 1] -= 0.8  # a label that is told too rarely
    found = Vector.fit(logprobs, label)
    own = np.arange(len(label)), label

    def nll(one: scaling.Scaling) -> float:
        return -float(np.log(one(logprobs))[own].mean())

    assert nll(found) < nll(Temperature.fit(logprobs, label)) - 0.005
    weights, biases = np.array(found.weight_V), np.array(found.bias_V)
    for step in (1e-3, -1e-3):
        for at in range(len(LABELS)):
            nudge = step * np.eye(len(LABELS))[at]
            for other in (
                Vector((weights + nudge).tolist(), found.bias_V),
                Vector(found.weight_V, (biases + nudge).tolist()),
            ):
                assert nll(other) > nll(found) - 3e-6
    logprobs, label = tables(drawn(20_000, 2, 1.7))  # so many that what is expected of them before counts little
    two, inside = logprobs[:, :2] - [0, 0.8], label < 2
    pair = Vector.fit(two[inside], label[inside])
    by_sklearn = LogisticRegression(C=np.inf, max_iter=1000).fit(two[inside], label[inside])
    assert pair(two)[:, 1] == pytest.approx(by_sklearn.predict_proba(two)[:, 1], abs=0.02)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(2, 80))
def test_isotonic_scaling_is_that_of_scikit_learn(seed: int, count: int) -> None:
    logprobs, label = tables(drawn(count, seed, 2.0))
    shares, least = np.exp(logprobs).round(2), 1 / (2 * count)
    new = np.log(np.linspace(0.01, 1, 40)[:, None] * np.array([0.1, 0.2, 0.3, 0.4]))
    by_sklearn = np.stack(
        [
            IsotonicRegression(out_of_bounds="clip", y_min=least, y_max=1 - least)
            .fit(shares[:, v], label == v)
            .predict(np.exp(new)[:, v])
            for v in range(len(LABELS))
        ],
        axis=1,
    )
    found = Isotonic.fit(np.log(np.maximum(shares, 1e-30)), label)(new)
    assert found == pytest.approx(by_sklearn / by_sklearn.sum(1, keepdims=True), abs=1e-6)


@pytest.mark.parametrize("name", ["temperature", "vector", "isotonic"])
def test_answers_are_calibrated_and_a_card_keeps_how(name: str) -> None:
    """The likelihood follows; only temperature promises the same answers; a label that training lacked stays wrong."""
    known = drawn(2000, 3, 3.0)
    fitted = Calibration.fit(known, as_rows(known), name, Conformal(coverage=0.9, sets="aps"), seed=5)
    assert fitted.rows == (1000, 1000)
    again = of_card(json.loads(json.dumps({"calibration": fitted.to_json()})))
    assert again == fitted
    new = [*drawn(1500, 4, 3.0), replace(drawn(1, 5)[0], reference="never", scores={"nll": 87.0, "tokens": 1.0})]
    found = again.apply(new, as_rows(new))
    assert sum(p.scores["nll"] for p in found) < sum(p.scores["nll"] for p in new) * 0.9
    for before, after in zip(new, found, strict=True):
        shares = after.probabilities or {}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[after.output] == max(shares.values())
        assert before.output == after.output or name != "temperature"
        own = shares.get(after.reference or "")
        assert after.scores["nll"] == pytest.approx(87.0 if own is None else -math.log(own))
    metric = AdaptiveEce()
    ece = [float(metric.aggregate(statistics(metric, rows[:1500]).sum(0))) for rows in (new, found)]
    assert ece[1] < ece[0] / 2


def as_rows(predictions: list[Prediction]) -> list[Row]:
    return [Row({"text": f"{number}"}, p.where) for number, p in enumerate(predictions)]


@pytest.mark.parametrize("by", ["lac", "aps"])
def test_sets_cover_what_they_promise_over_many_splits(by: str) -> None:
    """The mean over 200 splits is in the binomial band of all rows that were judged; one split is as theory has it.

    Of n rows that fitted and m that are judged the number of covered rows is beta-binomial (Vovk 2012).
    """
    drawn_rows = drawn(3000, 6, 0.5)
    rows = [
        (p.probabilities or {}, p.reference or "", chance(row))
        for p, row in zip(drawn_rows, as_rows(drawn_rows), strict=True)
    ]
    score_N = np.array([SCORES[by](shares, own)[label] for shares, label, own in rows])
    for coverage in (0.8, 0.9, 0.99):
        draw, fitted, shares = np.random.default_rng(7), 500, list[float]()
        for _ in range(200):
            order = draw.permutation(len(rows))
            sets = Sets.fit([rows[i] for i in order[:fitted]], coverage, by)
            shares.append(float((score_N[order[fitted:]] <= sets.threshold).mean()))
        needed = math.ceil((fitted + 1) * coverage - 1e-9)
        count = len(rows) - fitted
        law = stats.betabinom(count, needed, fitted + 1 - needed)
        low, high = law.ppf([0.025, 0.975]) / count
        inside = np.mean([low <= share <= high for share in shares])
        assert stats.binom.ppf(1e-3, 200, 0.95) / 200 <= inside
        assert abs(np.mean(shares) - needed / (fitted + 1)) < 4 * law.std() / count / math.sqrt(200)
        assert np.mean(shares) >= coverage - 4 * law.std() / count / math.sqrt(200)
        held = [sets.of(own, part) for own, _, part in rows[:500]]
        covered = [label in held_labels for held_labels, (_, label, _) in zip(held, rows, strict=False)]
        assert np.mean(covered) == np.mean(score_N[:500] <= sets.threshold)


def test_sets_by_rank_cover_hard_rows_nearly_as_easy_ones() -> None:
    """Half of the rows are nearly sure, half are not, and probabilities are true: LAC leaves the latter short."""
    rng, labels = np.random.default_rng(9), "abcdefgh"
    rows: list[tuple[dict[str, float], str, float]] = []
    for number in range(6000):
        shares = rng.dirichlet([30.0, *[0.2] * 7] if number % 2 else [1.0] * 8)
        rows.append((dict(zip(labels, shares.tolist(), strict=True)), labels[rng.choice(8, p=shares)], rng.random()))

    def covered(by: str) -> list[float]:
        sets = Sets.fit(rows[:3000], 0.9, by)
        judged = [label in sets.of(shares, own) for shares, label, own in rows[3000:]]
        return [float(np.mean(judged[hard::2])) for hard in (0, 1)]

    (hard, easy), (hard_lac, easy_lac) = covered("aps"), covered("lac")
    assert hard == pytest.approx(0.9, abs=0.03)
    assert easy == pytest.approx(0.9, abs=0.03)
    assert hard_lac < 0.87
    assert easy_lac > 0.92


def test_a_set_by_rank_is_that_of_the_paper() -> None:
    """Labels from the most probable on, until the threshold falls inside one; that one by chance."""
    sets = Sets(0.9, 0.8, "aps")
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    assert sets.of(shares, 0.0) == ("a", "c", "b")
    assert sets.of(shares, 0.99) == ("a", "c")
    assert SCORES["aps"](shares, 0.5) == pytest.approx({"a": 0.25, "c": 0.65, "b": 0.9})
    one, other = (Row({"text": text}, "here") for text in ("one", "other"))
    assert chance(one) == chance(Row({"text": "one", "label": "x"}, "elsewhere")) != chance(other)
    assert 0 <= chance(one) < 1


def test_a_set_holds_what_is_probable_enough() -> None:
    sets = Sets.fit([({"x": share}, "x", 0.0) for share in (0.9, 0.7, 0.4, 0.95)], 0.6)
    assert sets.threshold == pytest.approx(1 - 0.7)  # the third smallest of 1 - p: ceil(5 * 0.6)
    assert sets.of({"a": 0.1, "b": 0.71, "c": 0.75}, 0.0) == ("c", "b")
    assert sets.of({"a": 0.4, "b": 0.6}, 0.0) == ()
    assert [least_rows(coverage) for coverage in (0.5, 0.9, 0.99)] == [1, 9, 99]
    made = [replace(p, label_set=("a", "b")) for p in drawn(50, 8)]
    covered = ConformalCoverage()
    share = sum(p.reference in ("a", "b") for p in made) / 50
    assert float(covered.aggregate(statistics(covered, made).sum(0))) == pytest.approx(share)
    size = ConformalSetSize()
    assert float(size.aggregate(statistics(size, made).sum(0))) == 2.0
    assert not covered.applies(drawn(2, 0))
    with pytest.raises(InputError, match="needs a set of labels"):
        covered.statistics(drawn(1, 0)[0])


def test_few_rows_that_are_all_right_make_nothing_sure() -> None:
    """Their likelihood has no largest temperature or weight; what stands before them keeps true probabilities near."""
    new, label = tables(drawn(4000, 1, 1.0))
    true = -float(new[np.arange(len(label)), label].mean())
    for name in ("temperature", "vector"):
        for seed in range(5):
            some = [p for p in drawn(200, seed, 1.0) if p.output == p.reference][:20]
            shares = scaling.fit(name, *tables(some))(new)
            assert -float(np.log(shares[np.arange(len(label)), label]).mean()) < true + 1.6  # else 6.4 to 8.5


@pytest.mark.parametrize(
    ("name", "counts", "cause"),
    [
        ("temperature", {"a": 10, "b": 9, "never": 5}, "takes 20 or more and finds 19"),
        ("temperature", {"a": 30}, "finds none of 'b', 'c'"),
        ("temperature", {"a": 19, "b": 1}, None),
        ("vector", {"a": 20, "b": 9}, "takes 30 or more and finds 29"),
        ("vector", {"a": 20, "b": 20}, "finds none of 'c'"),
        ("isotonic", {"a": 20, "c": 20}, "finds none of 'b'"),
        ("isotonic", {"a": 20, "b": 9, "c": 1}, None),
    ],
)
def test_rows_that_cannot_carry_a_scaling(name: str, counts: dict[str, int], cause: str | None) -> None:
    rows = [label for label, count in counts.items() for _ in range(count)]
    if cause is None:
        scaling.check(name, rows, "abc")
        return
    with pytest.raises(InputError, match=cause):
        scaling.check(name, rows, "abc")
