"""Two models on the same rows: effects, their intervals and p-values, families of tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, kurtosis
from scipy.stats import t as t_distribution
from sklearn.metrics import f1_score

from tunesmith.errors import InputError
from tunesmith.evaluation.json_metrics import FieldAccuracy
from tunesmith.evaluation.metrics import Accuracy, ExactMatch, Loss, MacroF1, Perplexity
from tunesmith.evaluation.paired import Effect, compare, holm, hypothesis, mcnemar
from tunesmith.evaluation.run import measure
from tunesmith.types import Prediction


def answered(outputs: str, references: str) -> list[Prediction]:
    return [Prediction(o, r, f"row {i}") for i, (o, r) in enumerate(zip(outputs, references, strict=True))]


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


@pytest.mark.parametrize("count", [3, 8, 12])
def test_random_signs_come_near_all_signs(count: int) -> None:
    """The randomisation test enumerated: every way to swap the models' answers once."""
    rng = np.random.default_rng(count)
    before, after = scored(rng.gamma(2, 20, count), np.full(count, 40)), scored(rng.gamma(2, 20, count), [40] * count)
    change = np.array([b.scores["nll"] - a.scores["nll"] for a, b in zip(before, after, strict=True)])
    signs = np.array(list(itertools.product((-1, 1), repeat=count)))
    exact = np.mean(np.abs(signs @ change) >= abs(change.sum()) - 1e-9)
    assert compare(before, after, Loss(), 0).p == pytest.approx(exact, abs=0.02)


def test_a_smooth_metric_is_tested_by_the_jackknife() -> None:
    """Against leaving out each row by hand."""
    rng = np.random.default_rng(4)
    references = "".join(rng.choice(["a", "b", "c"], 60))
    outputs = ["".join(r if rng.random() < 0.7 else "a" for r in references) for _ in range(2)]

    def f1(outputs: str, references: str) -> float:
        return float(f1_score(list(references), list(outputs), average="macro"))

    def difference(keep: list[int]) -> float:
        chosen = ["".join(text[i] for i in keep) for text in (references, *outputs)]
        return f1(chosen[2], chosen[0]) - f1(chosen[1], chosen[0])

    every = list(range(60))
    left = np.array([difference(every[:i] + every[i + 1 :]) for i in every])
    error = math.sqrt(59 / 60 * np.sum((left - left.mean()) ** 2))
    effect = compare(*(answered(o, references) for o in outputs), MacroF1("abc"), 0)
    assert effect.difference == pytest.approx(difference(every))
    half = (effect.high - effect.low) / 2
    freedom = min(59, 2 * 60 / (kurtosis(left, fisher=False) - 1))
    assert half == pytest.approx(t_distribution.ppf(0.975, freedom) * error)
    assert effect.p == pytest.approx(2 * t_distribution.sf(abs(effect.difference) / error, freedom))


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
