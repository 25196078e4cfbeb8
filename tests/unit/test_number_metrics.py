"""Metrics of numbers against scipy and scikit-learn, their intervals, and rows without numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import interval, value_of
from tunesmith.evaluation.metrics import statistics
from tunesmith.evaluation.paired import compare
from tunesmith.types import Prediction

PAIRS = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=3, max_size=40)


def _predictions(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[Prediction]:
    return [
        Prediction(f"{a:g}", f"{b:g}", f"rows:{i}", {"predicted": float(a), "expected": float(b)})
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def _value(name: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    metric = METRICS.get(name)([])
    return value_of(metric, statistics(metric, _predictions(x, y)))


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_values_are_those_of_scipy_and_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import mean_absolute_error, root_mean_squared_error

    x, y = np.array(pairs, dtype=np.float64).T / 4
    assert _value("mae", x, y) == pytest.approx(mean_absolute_error(y, x))
    assert _value("rmse", x, y) == pytest.approx(root_mean_squared_error(y, x))
    varies = np.ptp(x) > 0 and np.ptp(y) > 0
    assert _value("pearson", x, y) == pytest.approx(stats.pearsonr(x, y)[0] if varies else 0.0, abs=1e-9)
    assert _value("spearman", x, y) == pytest.approx(stats.spearmanr(x, y)[0] if varies else 0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_intervals_of_a_correlation_hold_it(name: str, strength: float) -> None:
    """95% intervals of 400 samples of 100 rows of a normal population hold its value in 92% to 98%."""
    rng = np.random.default_rng(5)
    true = strength if name == "pearson" else 6 / np.pi * np.arcsin(strength / 2)
    metric, held = METRICS.get(name)([]), 0
    for _ in range(400):
        x = rng.normal(size=100)
        y = strength * x + np.sqrt(1 - strength**2) * rng.normal(size=100)
        _, low, high = interval(metric, statistics(metric, _predictions(x, y)), seed=1)
        held += low <= true <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("name", ["mae", "rmse", "pearson", "spearman"])
def test_a_row_without_a_number_is_named(name: str) -> None:
    metric = METRICS.get(name)([])
    with pytest.raises(InputError, match=f"{name} needs numbers, and f:3 has none expected"):
        statistics(metric, [Prediction("1", None, "f:3", {"predicted": 1.0})])


@pytest.mark.parametrize("name", ["mae", "rmse", "pearson", "spearman"])
def test_a_number_whose_square_is_none_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"{name} cannot be computed with numbers beyond 1e\+100, .* rows:1 is -1e\+308"
    ):
        statistics(METRICS.get(name)([]), _predictions(np.zeros(2), np.array([1.0, -1e308])))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("rows", [2, 19, 20])
def test_of_few_rows_a_correlation_has_no_interval_and_no_test(name: str, rows: int) -> None:
    rng = np.random.default_rng(3)
    y, x, z = rng.normal(size=(3, rows))
    metric = METRICS.get(name)([])
    found = compare(_predictions(x, y), _predictions(z, y), metric, seed=1)
    limits = interval(metric, statistics(metric, _predictions(x, y)), seed=1)[1:]
    assert found.tested == bool(np.isfinite(limits).all()) == (rows >= 20)
    if rows < 20:
        assert found.reason == f"no interval: of {rows} rows a correlation tells little, and it takes 20"
