"""How many rows a comparison takes, against enumeration of all outcomes and against repeated tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tunesmith.evaluation import power
from tunesmith.evaluation.paired import mcnemar


def enumerated(gained: float, lost: float, count: int, level: float) -> float:
    """The chance of all outcomes that McNemar's test rejects, one by one."""
    found = 0.0
    for up, down in itertools.product(range(count + 1), repeat=2):
        if up + down <= count and mcnemar(up, down) <= level:
            same = count - up - down
            ways = math.factorial(count) // (math.factorial(up) * math.factorial(down) * math.factorial(same))
            found += ways * gained**up * lost**down * (1 - gained - lost) ** same
    return found


@pytest.mark.parametrize("level", [0.05, 0.01])
@pytest.mark.parametrize(
    ("gained", "lost", "count"), [(0.3, 0.05, 12), (0.3, 0.05, 40), (0.02, 0.2, 30), (0.25, 0.25, 20), (0.4, 0.0, 15)]
)
def test_the_power_of_mcnemar_is_that_of_all_outcomes(gained: float, lost: float, count: int, level: float) -> None:
    expected = enumerated(gained, lost, count, level)
    assert power.mcnemar_power(gained, lost, count, level) == pytest.approx(expected, abs=1e-9)


def test_the_rows_for_a_rate_are_the_least_that_do() -> None:
    rows = power.rows_for_rate(0.2, 0.05)
    assert rows is not None
    assert enumerated(0.2, 0.05, rows, 0.05) >= power.POWER > enumerated(0.2, 0.05, rows - 1, 0.05)
    assert power.rows_for_rate(0.1, 0.1) is None


def test_the_detectable_rate_is_found_with_the_power_that_is_planned_for() -> None:
    difference = power.detectable_rate(0.3, 40)
    assert difference is not None
    assert enumerated((0.3 + difference) / 2, (0.3 - difference) / 2, 40, 0.05) == pytest.approx(power.POWER, abs=1e-4)
    assert power.detectable_rate(0.5, 5) is None  # of 32 ways to swap five rows two are as extreme: p is 0.06 at least


def test_the_power_of_a_mean_is_that_of_students_t() -> None:
    """Normal differences: the textbook's paired t test, by its noncentral distribution and by repetition."""
    spread = power.Spread(deviation=2.0, kurtosis=3.0)
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(20_000, 42))
    repeated = float((stats.ttest_1samp(draws, 0.0, axis=1).pvalue <= 0.05).mean())
    assert power.mean_power(1.0, spread, 42) == pytest.approx(repeated, abs=0.01)
    assert power.rows_for_mean(1.0, spread) == 42
    assert power.detectable_mean(spread, 42) == pytest.approx(1.0, abs=0.02)


def test_few_rows_that_carry_a_difference_make_it_harder_to_show() -> None:
    heavy = power.Spread(deviation=2.0, kurtosis=30.0)
    assert power.mean_power(1.0, heavy, 34) < power.mean_power(1.0, power.Spread(2.0, 3.0), 34) - 0.1


def test_no_number_of_rows_settles_what_does_not_differ() -> None:
    assert power.rows_for_mean(0.0, power.Spread(1.0, 3.0)) is None
    assert power.Spread.of(np.full(9, 0.1)) == power.Spread(0.0, 3.0)
    assert power.detectable_mean(power.Spread(0.0, 3.0), 100) is None
    assert power.mean_power(0.1, power.Spread(0.0, 3.0), power.least_rows(0.05)) == 1.0
    assert power.mean_power(0.1, power.Spread(0.0, 3.0), power.least_rows(0.05) - 1) == 0.0
