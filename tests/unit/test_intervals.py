"""Coverage of the intervals, and what happens at their edges."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial

from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation.calibration import Brier, Ece
from tunesmith.evaluation.class_metrics import RocAuc
from tunesmith.evaluation.intervals import influence, interval, paired_rate, square_and_add, wilson
from tunesmith.evaluation.json_metrics import FieldAccuracy
from tunesmith.evaluation.likelihood_metrics import Loss, Perplexity
from tunesmith.evaluation.metrics import Accuracy, FloatArray, MacroF1, RowMetric, lacking
from tunesmith.evaluation.text_metrics import TokenF1

LETTERS = "abcdefghijklmnopqrst"
Draw = Callable[[int, np.random.Generator], FloatArray]

# Five classes, 35% to 10% of the rows, found in 90% to 60% of the cases; errors fall on the others alike.
SHARES = np.array([0.35, 0.25, 0.18, 0.12, 0.10])
FOUND = np.array([0.90, 0.85, 0.75, 0.70, 0.60])
JOINT = SHARES[:, None] * (np.diag(FOUND) + (1 - FOUND)[:, None] * (1 - np.eye(5)) / 4)
TRUE_F1 = float(np.mean(2 * np.diag(JOINT) / (JOINT.sum(axis=0) + JOINT.sum(axis=1))))
FIELDS = np.array([0.03, 0.02, 0.05, 0.1, 0.2, 0.6])


def classes(count: int, rng: np.random.Generator) -> FloatArray:
    cell_N = rng.choice(25, count, p=JOINT.ravel())
    actual_N, predicted_N = cell_N // 5, cell_N % 5
    one_hot = np.eye(5)
    hits = one_hot[predicted_N] * (actual_N == predicted_N)[:, None]
    return np.concatenate([hits, one_hot[predicted_N], one_hot[actual_N]], axis=1)


def answers(count: int, rng: np.random.Generator) -> FloatArray:
    """Answers of about 55 tokens, some of hundreds, whose nats per token are skewed: mean 1.35, median 1.13."""
    tokens_N = np.maximum(1, np.round(rng.lognormal(4, 0.8, count)))
    return np.column_stack([tokens_N * rng.lognormal(0.3 - 0.18, 0.6, count), tokens_N])


def labels(count: int, rng: np.random.Generator) -> FloatArray:
    """A classifier that is right in 9 cases of 10, and sure of it: a tenth of the rows carry most of the loss."""
    right_N = rng.random(count) < 0.9
    nll_N = np.where(right_N, rng.exponential(0.12, count), 0.7 + rng.exponential(1.2, count))
    return np.column_stack([nll_N, np.ones(count)])


def fields(count: int, rng: np.random.Generator) -> FloatArray:
    return np.column_stack([rng.choice(6, count, p=FIELDS) / 5, np.ones(count)])


def hits(count: int, rng: np.random.Generator) -> FloatArray:
    return np.column_stack([rng.random(count) < 0.8, np.ones(count)]).astype(np.float64)


@pytest.mark.parametrize("count", [50, 200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("metric", "draw", "truth"),
    [
        (MacroF1("abcde"), classes, TRUE_F1),
        (Loss(), answers, math.exp(0.3)),
        (Loss(), labels, 0.9 * 0.12 + 0.1 * 1.9),
        (FieldAccuracy(), fields, float(FIELDS @ np.arange(6)) / 5),
        (Accuracy(), hits, 0.8),
    ],
    ids=["macro_f1", "loss", "label_loss", "field_accuracy", "accuracy"],
)
def test_nineteen_of_twenty_intervals_hold_the_truth(metric: RowMetric, draw: Draw, truth: float, count: int) -> None:
    trials, resamples = {50: (1000, 1000), 200: (800, 500), 1000: (1000, 500)}[count]
    rng = np.random.default_rng(17)
    held = 0
    for trial in range(trials):
        _, low, high = interval(metric, draw(count, rng), seed=trial, resamples=resamples)
        held += low <= truth <= high
    assert 0.93 <= held / trials <= 0.97


@pytest.mark.parametrize(("up", "down", "count"), [(0.042, 0.012, 50), (0.034, 0.034, 50), (0.123, 0.063, 50)])
def test_paired_rates_cover_where_few_rows_change(up: float, down: float, count: int) -> None:
    """All outcomes, by their probabilities: what Bonett and Price's interval holds in 99.6% of cases, Wald's in 88%."""
    held = 0.0
    for gained, lost in itertools.product(range(20), repeat=2):
        chance = multinomial.pmf([gained, lost, count - gained - lost], count, [up, down, 1 - up - down])
        if chance > 1e-6:
            low, high = paired_rate(gained, lost, count)
            held += chance * (low <= up - down <= high)
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 50), (3, 1, 50), (20, 31, 200)])
def test_limits_of_a_paired_rate_are_those_of_its_posterior(gained: int, lost: int, count: int) -> None:
    prior = [gained + 0.5, lost + 0.5, count - gained - lost + 1]
    draws = np.random.default_rng(0).dirichlet(prior, 400_000)
    assert paired_rate(gained, lost, count) == pytest.approx(
        np.quantile(draws[:, 0] - draws[:, 1], [0.025, 0.975]), abs=1.5e-3
    )


def test_limits_squared_and_added_are_newcombes() -> None:
    """His example of independent shares, 56 of 70 and 48 of 80, method 10 (Stat. Med. 17, 1998, table II)."""
    before, after = ((k / n, *wilson(k, n)) for k, n in ((48, 80), (56, 70)))
    assert square_and_add(before, after, 0.0) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = square_and_add(before, after, 0.5)
    assert 0.0524 < low < high < 0.3339


def f1_table(*rows: int) -> FloatArray:
    """All rows right, so many of each class."""
    actual = np.repeat(np.eye(len(rows)), rows, axis=0)
    return np.hstack([actual] * 3)


@pytest.mark.parametrize(
    ("metric", "table", "why"),
    [
        (MacroF1("ab"), f1_table(48, 2), "class 'b' has 2 rows, so all rows are worth 7.7; 10 are needed"),
        (MacroF1("ab"), f1_table(47, 3), None),
        (MacroF1("abc"), f1_table(30, 20, 0), "class 'c' without a row to judge by"),
        (MacroF1(LETTERS), f1_table(*[20] * 18, 0, 0), "class 's' and 1 more of 20 without a row to judge by"),
        (MacroF1(LETTERS), f1_table(*[20] * 19, 0), None),
        (RocAuc("ab"), np.column_stack([np.ones(50), np.ones(50), np.arange(50) < 9]), "9 rows outside the largest "
         "class; 10 are needed"),
        (RocAuc("ab"), np.column_stack([np.ones(50), np.ones(50), np.arange(50) < 10]), None),
        (Ece(), np.tile(np.eye(16)[15], (199, 1)), "199 rows in 15 bins of confidence; 200 are needed"),
        (Ece(), np.tile(np.eye(16)[15], (200, 1)), None),
        (Accuracy(), np.ones((1, 2)), None),
    ],
)  # fmt: skip
def test_rows_that_cannot_carry_an_interval_get_none(metric: RowMetric, table: FloatArray, why: str | None) -> None:
    table = table.astype(np.float64)
    assert lacking(metric, table) == (why and f"no interval: {why}")
    value, low, high = interval(metric, table, 0)
    assert math.isfinite(value)
    assert math.isnan(low) == math.isnan(high) == (why is not None)


def test_a_comparison_of_macro_f1_takes_more_rows_of_a_class_than_its_interval() -> None:
    assert lacking(MacroF1("ab"), f1_table(47, 3)) is None
    assert lacking(MacroF1("ab"), f1_table(47, 3), compared=True) == (
        "no interval: class 'b' has 3 rows, so all rows are worth 11.3; 12 are needed to compare"
    )
    assert lacking(MacroF1("ab"), f1_table(46, 4), compared=True) is None


def test_a_comparison_of_ece_takes_more_rows_than_its_interval() -> None:
    table = np.tile(np.eye(16)[15], (999, 1))
    assert lacking(Ece(), table) is None
    assert lacking(Ece(), table, compared=True) == (
        "no interval: 999 rows in 15 bins of confidence; 1,000 are needed to compare"
    )
    assert lacking(Ece(), np.vstack([table, table[:1]]), compared=True) is None


@pytest.mark.parametrize(("up", "down", "count"), [(0.3, 0.05, 50), (0.1, 0.02, 200), (0.03, 0.01, 1000)])
def test_paired_rates_cover_their_difference(up: float, down: float, count: int) -> None:
    rng = np.random.default_rng(5)
    held = 0
    drawn = rng.multinomial(count, [up, down, 1 - up - down], size=4000)
    for (gained, lost, _), times in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True):
        low, high = paired_rate(int(gained), int(lost), count)
        held += int(times) * (low <= up - down <= high)
    assert 0.93 <= held / 4000 <= 0.97


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (7, 9), (500, 1000)])
def test_wilson_is_that_of_scipy(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_same_seed_gives_the_same_bits() -> None:
    table = answers(120, np.random.default_rng(0))
    assert interval(Loss(), table, 3) == interval(Loss(), table, 3)
    assert interval(Loss(), table, 3) != interval(Loss(), table, 4)


def test_limits_of_perplexity_are_those_of_the_loss() -> None:
    table = answers(80, np.random.default_rng(0))
    assert interval(Perplexity(), table, 1) == pytest.approx([math.exp(x) for x in interval(Loss(), table, 1)])


def test_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {MacroF1("abcde"): classes(100, np.random.default_rng(0)), Loss(): answers(90, np.random.default_rng(0))}
    whole = [interval(metric, table, 3) for metric, table in tables.items()]
    monkeypatch.setattr("tunesmith.evaluation.intervals.BLOCK", 777)
    for (metric, table), limits in zip(tables.items(), whole, strict=True):
        assert interval(metric, table, 3) == pytest.approx(limits)


def test_ten_thousand_rows_of_77_classes_take_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    metric = MacroF1([str(i) for i in range(77)])
    table = np.zeros((10_000, 231))
    table[np.arange(10_000), 77 + rng.integers(0, 77, 10_000)] = 1
    table[np.arange(10_000), 154 + rng.integers(0, 77, 10_000)] = 1
    tracemalloc.start()
    try:
        interval(metric, table, 0)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


ONE = np.array([[2.0, 4.0]])


@pytest.mark.parametrize(
    ("metric", "table", "expected"),
    [
        (Loss(), ONE, (0.5, math.nan, math.nan)),
        (Perplexity(), ONE, (math.exp(0.5), math.nan, math.nan)),
        (Loss(), np.repeat(ONE, 30, axis=0), (0.5, 0.5, 0.5)),
        (Loss(), np.array([[0.0, 9.0], [0.0, 1.0]] * 3), (0.0, 0.0, 0.0)),
        (FieldAccuracy(), np.ones((1, 2)), (1.0, *wilson(1, 1))),
        (FieldAccuracy(), np.ones((50, 2)), (1.0, *wilson(50, 50))),
        (MacroF1("a"), np.ones((50, 3)), (1.0, *wilson(50, 50))),
        (Accuracy(), np.ones((50, 2)), (1.0, *wilson(50, 50))),
        (Accuracy(), np.array([[0.0, 1.0]]), (0.0, *wilson(0, 1))),
    ],
)
def test_one_row_and_rows_all_alike(metric: RowMetric, table: FloatArray, expected: tuple[float, float, float]) -> None:
    assert interval(metric, table, 0) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("count", [2, 4, 5, 8])
def test_few_rows_have_finite_limits_around_the_value_or_none(count: int) -> None:
    for seed in range(20):
        table = answers(count, np.random.default_rng(seed))
        value, low, high = interval(Loss(), table, seed)
        assert 0 <= low <= value <= high < math.inf if count >= 5 else math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    table = np.ones((5, 2))
    table[3, 0] = bad
    with pytest.raises(RefusedError, match="loss: row 3 of 5 has a non-finite statistic"):
        interval(Loss(), table, 0)


def test_no_value_is_refused() -> None:
    with pytest.raises(RefusedError, match="no finite value"):
        interval(Loss(), np.zeros((3, 2)), 0)
    with pytest.raises(RefusedError, match="no finite value"):
        interval(Perplexity(), np.array([[1e6, 1.0]]), 0)
    with pytest.raises(InputError, match="no rows"):
        interval(Loss(), np.zeros((0, 2)), 0)


def test_the_jackknife_is_that_of_leaving_out_each_row() -> None:
    table, metric = classes(60, np.random.default_rng(1)), MacroF1("abcde")
    value = float(metric.aggregate(table.sum(axis=0)))
    left = np.array([float(metric.aggregate(np.delete(table, i, axis=0).sum(axis=0))) for i in range(60)])
    pull, bias = influence(metric, table)
    assert pull == pytest.approx(59 * (left.mean() - left))
    assert bias == pytest.approx(59 * (left.mean() - value))
    mean = fields(60, np.random.default_rng(1))
    pull, bias = influence(FieldAccuracy(), mean)
    assert pull == pytest.approx(mean[:, 0] - mean[:, 0].mean())
    assert bias == pytest.approx(0, abs=1e-12)


def test_a_mean_of_zeros_and_ones_is_worth_its_rows() -> None:
    """Fractions that are all or nothing are a rate, whose interval is Wilson's; the variance's own doubt widens it."""
    table = hits(400, np.random.default_rng(3))
    assert interval(FieldAccuracy(), table, 0) == pytest.approx(interval(Accuracy(), table, 0), abs=2e-3)


def test_rare_classes_are_worth_few_rows() -> None:
    """All of 1,000 rows right, 10 of them of the second class: what is known of its F1 are 10 rows."""
    right = np.zeros((1000, 6))
    right[:990, [0, 2, 4]] = 1
    right[990:, [1, 3, 5]] = 1
    _, low, high = interval(MacroF1("ab"), right, 0)
    assert high == 1.0
    worth = 4 / (1 / 990 + 1 / 10)
    assert low == pytest.approx(wilson(worth, worth)[0])


def test_a_mean_between_any_two_numbers_has_the_interval_of_its_share_of_them() -> None:
    """The Brier score goes to 2: its limits are twice those of half of it, and where all rows agree not the value."""
    halves_N2 = np.column_stack([np.random.default_rng(4).beta(1, 4, 60), np.ones(60)])
    value, low, high = interval(TokenF1(), halves_N2, 0)
    assert interval(Brier(), halves_N2 * [2, 1], 0) == pytest.approx((2 * value, 2 * low, 2 * high))
    same = interval(Brier(), np.tile([0.5, 1.0], (40, 1)), 0)
    assert same == pytest.approx((0.5, *(2 * limit for limit in wilson(0.25 * 40, 40))))
