"""Metrics that have no test of their own against another library: against one here, or what the reference publishes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score

from tunesmith.evaluation.calibration import BINS
from tunesmith.evaluation.intervals import value_of
from tunesmith.evaluation.metrics import build, statistics
from tunesmith.types import Prediction

SEEDS = st.integers(0, 2**31 - 1)


def _value(name: str, predictions: list[Prediction]) -> float:
    (metric,) = build([name], predictions)
    return value_of(metric, statistics(metric, predictions))


@given(SEEDS, st.sampled_from([15, 60, 300]))
def test_calibration_errors_are_of_the_bins_of_scikit_learn(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    sure_N, right_N = rng.uniform(0.5, 1, count), rng.random(count) < 0.8
    predictions = [
        Prediction("a", "a" if right else "b", f"f:{i}", {}, {"a": float(sure), "b": float(1 - sure)})
        for i, (sure, right) in enumerate(zip(sure_N, right_N, strict=True))
    ]
    weight_B = np.histogram(-sure_N, -np.linspace(0, 1, BINS + 1)[::-1])[0][::-1] / count  # closed above, as theirs are
    for name, strategy, weights in (
        ("ece", "uniform", weight_B[weight_B > 0]),
        ("adaptive_ece", "quantile", np.full(BINS, 1 / BINS)),
    ):
        true_B, said_B = calibration_curve(right_N, sure_N, n_bins=BINS, strategy=strategy)
        assert _value(name, predictions) == pytest.approx(float(weights @ np.abs(true_B - said_B)), abs=1e-9)


@given(SEEDS)
def test_the_share_of_right_tags_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [rng.choice(["O", "B-X", "I-X"], (2, rng.integers(1, 9))) for _ in range(5)]
    predictions = [Prediction(" ".join(said), " ".join(true), f"f:{i}") for i, (said, true) in enumerate(texts)]
    said, true = (np.concatenate([pair[side] for pair in texts]) for side in (0, 1))
    assert _value("tag_accuracy", predictions) == pytest.approx(accuracy_score(true, said))


def test_entities_of_the_example_that_seqeval_publishes() -> None:
    """Its README: an entity found a word too early, and another found: 1 of 2 right, of 2 true ones."""
    true = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    said = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    predictions = [Prediction(a, b, f"f:{i}") for i, (a, b) in enumerate(zip(said, true, strict=True))]
    for name in ("entity_f1", "entity_precision", "entity_recall"):
        assert _value(name, predictions) == 0.5


@given(SEEDS)
def test_perplexity_and_bits_are_those_of_lm_evaluation_harness(seed: int) -> None:
    library = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(seed)
    nll_N, tokens_N, bytes_N = rng.gamma(2, 20, 6), rng.integers(1, 40, 6), rng.integers(1, 200, 6)
    predictions = [
        Prediction("", None, f"f:{i}", {"nll": float(n), "tokens": float(t), "bytes": float(b)})
        for i, (n, t, b) in enumerate(zip(nll_N, tokens_N, bytes_N, strict=True))
    ]
    perplexity = library.weighted_perplexity(list(zip(-nll_N, tokens_N, strict=True)))
    assert _value("perplexity", predictions) == pytest.approx(perplexity)
    assert _value("loss", predictions) == pytest.approx(math.log(perplexity))
    assert _value("bits_per_byte", predictions) == pytest.approx(
        library.bits_per_byte(list(zip(-nll_N, bytes_N, strict=True)))
    )


@pytest.mark.parametrize(
    ("said", "true", "exact", "f1"),
    [
        # The first is SQuAD's own, as its script's page has it; the others follow its rules: articles, case, marks.
        ("1976", ["1976"], 1.0, 1.0),
        ("the Denver Broncos!", ["Denver Broncos", "Broncos"], 1.0, 1.0),
        ("in gold", ["gold", "golden"], 0.0, 2 / 3),
    ],
)
def test_answers_are_judged_as_squads_script_does(said: str, true: list[str], exact: float, f1: float) -> None:
    predictions = [Prediction(said, true[0], "f:1", other_references=tuple(true[1:]))]
    assert (_value("span_exact_match", predictions), _value("span_f1", predictions)) == (exact, pytest.approx(f1))
