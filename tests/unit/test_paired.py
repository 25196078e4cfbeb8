"""Two models on the same rows: effects, their intervals and p-values, families of tests."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, kurtosis
from scipy.stats import t as t_distribution
from sklearn.metrics import f1_score

from tunesmith.errors import InputError
from tunesmith.evaluation.calibration import BINS, Brier, Ece
from tunesmith.evaluation.class_metrics import RocAuc, areas
from tunesmith.evaluation.intervals import degrees_of_freedom, influence, interval, paired_rate, square_and_add, wilson
from tunesmith.evaluation.json_metrics import FieldAccuracy
from tunesmith.evaluation.likelihood_metrics import Loss, Perplexity
from tunesmith.evaluation.metrics import Accuracy, ExactMatch, FloatArray, MacroF1, RowMetric, statistics
from tunesmith.evaluation.paired import (
    ALIKE,
    RANKED_TOGETHER,
    Effect,
    compare,
    holm,
    hypothesis,
    mcnemar,
    side_by_side,
)
from tunesmith.evaluation.paired import effect as effect_of
from tunesmith.evaluation.run import measure
from tunesmith.types import Prediction


def answered(outputs: str, references: str) -> list[Prediction]:
    return [Prediction(o, r, f"row {i}") for i, (o, r) in enumerate(zip(outputs, references, strict=True))]


def compare_tables(metric: RowMetric, before_NK: FloatArray, after_NK: FloatArray) -> Effect:
    return effect_of(side_by_side(metric, before_NK, after_NK), metric, 0)


def scored(nll: Sequence[float], tokens: Sequence[float]) -> list[Prediction]:
    pairs = zip(nll, tokens, strict=True)
    return [Prediction("", None, f"row {i}", {"nll": float(x), "tokens": float(t)}) for i, (x, t) in enumerate(pairs)]


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
    for metric in (Loss(), Perplexity()):
        effect = compare(rows, rows, metric, 0)
        assert (effect.difference, effect.tested, effect.reason) == (0.0, False, ALIKE)
        pairing = side_by_side(metric, statistics(metric, rows), statistics(metric, rows))
        assert (pairing.units_needed(0.05), pairing.detectable(0.05)) == (None, None)
    labels = answered("ab" * 30, "aab" * 20)
    # 60 rows that did not change do not prove that none ever will.
    parts = np.column_stack([rng.random(60), np.ones(60)])
    for metric, table in ((FieldAccuracy(), parts), (Brier(), parts)):
        span = metric.bounds[1] - metric.bounds[0]
        limits = side_by_side(metric, table, table).limits(0, 100)
        assert limits == pytest.approx(np.array(paired_rate(0, 0, 60)) * span)
    for metric in (Accuracy(), MacroF1("ab")):
        effect = compare(labels, labels, metric, 0)
        assert effect.low < effect.difference == 0 < effect.high
        assert effect.p == 1.0
    worth = int(4 / (1 / 40 + 1 / 20))
    assert (effect.low, effect.high) == pytest.approx(paired_rate(0, 0, worth))


def test_what_ranks_nothing_is_certain_to() -> None:
    """A model that gives all rows the same scores: one half, and a difference as uncertain as the other's area."""
    rng = np.random.default_rng(3)
    actual, metric = (np.arange(60) % 3 == 0).astype(np.int64), RocAuc("ab")
    truths, apart_N = np.column_stack([actual == 0, actual == 1]), actual == 1
    scores = rng.normal(size=60) + actual
    constant, able = (areas(truths, np.column_stack([-s, s]), apart_N) for s in (np.full(60, 0.3), scores))
    perfect = areas(truths, np.column_stack([-actual, actual]).astype(np.float64), apart_N)
    assert interval(metric, constant, 0) == (0.5, 0.5, 0.5)
    assert interval(metric, perfect, 0)[1] < 1.0 == interval(metric, perfect, 0)[2]
    found = compare_tables(metric, constant, able)
    together = RANKED_TOGETHER * degrees_of_freedom(influence(metric, able)[0])
    value, low, high = interval(metric, able, 0, freedom=together)
    assert (found.low, found.high) == pytest.approx((low - 0.5, high - 0.5))
    assert found.difference == pytest.approx(value - 0.5)
    assert (found.p < 0.05) == (found.low > 0)
    assert compare_tables(metric, constant, constant) == Effect(0.0, 0.0, 0.0, 1.0)
    itself = compare_tables(metric, able, able)
    assert (itself.low, itself.high) == pytest.approx(paired_rate(0, 0, 20))  # as many as are of the smaller class
    assert itself.p == 1.0


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
        assert effect.p == pytest.approx(1 / 10_001)
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


# ---------------------------------------------------------------- oracles


@pytest.mark.parametrize("count", [5, 8, 12])
def test_random_signs_come_near_all_signs(count: int) -> None:
    """The randomisation test enumerated: every way to swap the models' answers once."""
    rng = np.random.default_rng(count)
    before, after = scored(rng.gamma(2, 20, count), np.full(count, 40)), scored(rng.gamma(2, 20, count), [40] * count)
    change = np.array([b.scores["nll"] - a.scores["nll"] for a, b in zip(before, after, strict=True)])
    signs = np.array(list(itertools.product((-1, 1), repeat=count)))
    exact = np.mean(np.abs(signs @ change) >= abs(change.sum()) - 1e-9)
    assert compare(before, after, Loss(), 0).p == pytest.approx(exact, abs=0.02)


def test_a_smooth_metric_is_tested_by_two_jackknives() -> None:
    """Against leaving out each row, and giving it another weight, by hand."""
    rng = np.random.default_rng(4)
    references = "".join(rng.choice(["a", "b", "c"], 60))
    outputs = ["".join(r if rng.random() < 0.7 else "a" for r in references) for _ in range(2)]

    def f1(outputs: str, references: str) -> float:
        return float(f1_score(list(references), list(outputs), average="macro"))

    def difference(keep: list[int]) -> float:
        chosen = ["".join(text[i] for i in keep) for text in (references, *outputs)]
        return f1(chosen[2], chosen[0]) - f1(chosen[1], chosen[0])

    def weighed(weights: FloatArray) -> float:
        first, second = (f1_score(list(references), list(o), average="macro", sample_weight=weights) for o in outputs)
        return float(second - first)

    every = list(range(60))
    left = np.array([difference(every[:i] + every[i + 1 :]) for i in every])
    jackknife = 59 / 60 * np.sum((left - left.mean()) ** 2)
    # The infinitesimal one: each row weighs a little more or less.
    fine = []
    for i in every:
        more, less = (weighed(np.where(np.arange(60) == i, 1 + step, 1.0)) for step in (1e-5, -1e-5))
        fine.append((more - less) / 2e-5)
    error = math.sqrt((jackknife + 60 / 59 * np.sum(np.square(fine))) / 2)
    effect = compare(*(answered(o, references) for o in outputs), MacroF1("abc"), 0)
    assert effect.difference == pytest.approx(difference(every))
    half = (effect.high - effect.low) / 2
    freedom = min(59, 2 * 60 / (kurtosis(left, fisher=False) - 1))
    assert half == pytest.approx(t_distribution.ppf(0.975, freedom) * error)
    assert effect.p == pytest.approx(2 * t_distribution.sf(abs(effect.difference) / error, freedom))


def test_ranks_are_compared_by_limits_as_certain_as_their_difference() -> None:
    """The limits of each area have the degrees of freedom that both models' rows have together."""
    rng = np.random.default_rng(6)
    actual, metric = (np.arange(60) % 3 == 0).astype(np.int64), RocAuc("ab")
    scores = [rng.normal(size=60) + 1.5 * actual for _ in range(2)]
    truths = np.column_stack([actual == 0, actual == 1])
    before, after = (areas(truths, np.column_stack([-s, s]), actual == 1) for s in scores)
    pulls = [influence(metric, table)[0] for table in (before, after)]
    own, squares = [degrees_of_freedom(pull) for pull in pulls], [float(pull @ pull) for pull in pulls]
    freedom = sum(squares) ** 2 / sum(s**2 / f for s, f in zip(squares, own, strict=True))
    assert freedom > max(own)
    quantile = t_distribution.ppf(0.975, 0.7 * freedom) / 1.959964
    given = []
    for table, pull in zip((before, after), pulls, strict=True):
        value = float(table[:, 0].mean())
        worth = value * (1 - value) / (pull @ pull / (60 * 59)) / quantile**2
        given.append((value, *wilson(value * worth, worth)))
    expected = square_and_add(*given, float(np.corrcoef(*pulls)[0, 1]))
    assert side_by_side(metric, before, after).limits(0, 0) == pytest.approx(expected, abs=1e-6)


def calibrated(count: int, rng: np.random.Generator, gap: float = 0.0) -> FloatArray:
    confidence = rng.uniform(0.5, 1.0, count)
    right = rng.random(count) < confidence - gap
    place = np.ceil(confidence * BINS).astype(int) - 1
    return np.column_stack([np.eye(BINS)[place] * (confidence - right)[:, None], np.ones(count)])


def test_the_error_of_a_difference_of_ece_is_that_of_many_samples() -> None:
    rng = np.random.default_rng(7)
    found = np.array([Ece().contrast(calibrated(1000, rng), calibrated(1000, rng)) for _ in range(200)])
    assert np.sqrt(np.mean(found[:, 1] ** 2)) == pytest.approx(found[:, 0].std(), rel=0.1)


def test_the_limit_gives_way_where_one_error_is_near_the_end_of_its_scale() -> None:
    rng = np.random.default_rng(8)
    off, near = calibrated(1000, rng, gap=0.15), calibrated(1000, rng, gap=0.01)
    drift = Ece().contrast(off, near)[2]
    assert drift > 0
    lower, raised = side_by_side(Ece(), off, near), side_by_side(Ece(), near, off)
    difference, error, _ = Ece().contrast(off, near)
    assert lower.limits(0, 0) == pytest.approx((difference - drift - 1.96 * error, difference + 1.96 * error), abs=1e-5)
    assert raised.limits(0, 0)[1] > -difference + 1.96 * error
    assert raised.p(0) == pytest.approx(2 * t_distribution.sf(abs(difference) / raised.error, math.inf))
    near_by = dataclasses.replace(lower, corrected=2.5 * error, drift=error)  # a difference that the drift is part of
    assert near_by.p(0) == pytest.approx(2 * t_distribution.sf(1.5, math.inf))


def test_perplexity_is_tested_as_the_loss_is() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 80, 60)
    before, after = (
        scored(tokens * rng.lognormal(0, 0.5, 60), tokens),
        scored(tokens * rng.lognormal(0, 0.5, 60), tokens),
    )
    loss, perplexity = (compare(before, after, metric, 3) for metric in (Loss(), Perplexity()))
    assert loss.p == perplexity.p
    assert hypothesis(Loss()) == hypothesis(Perplexity()) != hypothesis(Accuracy())


def test_rows_of_one_source_are_swapped_together() -> None:
    """Every row four times over says no more than once."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 80, 15)
    nll = [tokens * rng.lognormal(0, 0.5, 15) for _ in range(2)]
    once = compare(scored(nll[0], tokens), scored(nll[1], tokens), Loss(), 0)
    four = [scored(np.repeat(n, 4), np.repeat(tokens, 4)) for n in nll]
    clustered = compare(*four, Loss(), 0, clusters_N=np.repeat(np.arange(15), 4))
    assert clustered.p == once.p
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert compare(*four, Loss(), 0).p < once.p


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_holm_is_closed_testing_by_bonferroni(count: int) -> None:
    """A hypothesis is rejected where each set of hypotheses that holds it is: Holm's steps are a short cut to that."""
    p = np.random.default_rng(count).beta(0.4, 3, count).tolist()
    adjusted = holm(p)
    for i in range(count):
        sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size) if i in s]
        assert adjusted[i] == pytest.approx(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))
    assert holm([]) == []


@pytest.mark.parametrize(("sources", "carry"), [(1, False), (4, False), (5, True)])
def test_few_sources_carry_no_interval_and_no_test(sources: int, carry: bool) -> None:
    """Of any metric, however many rows each has, by itself and compared."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 80, 60)
    before, after = (scored(tokens * rng.lognormal(0, 0.5, 60), tokens) for _ in range(2))
    clusters_N = np.arange(60) % sources
    (record,) = measure("tuned", "test", after, [Loss()], 0, clusters_N)
    effect = compare(before, after, Loss(), 0, clusters_N=clusters_N)
    assert math.isfinite(record.low) == math.isfinite(effect.low) == effect.tested == carry
    why = None if carry else f"no interval: {sources} source{'s' * (sources > 1)}, and it takes 5"
    assert (record.reason, effect.reason) == (why, why)
