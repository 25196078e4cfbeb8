"""Splits and draws: shares by class within one row, the same whatever the order of the rows."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.checks import Keys, as_keys
from tunesmith.data.split import draw, split


def keys_of(names: list[str]) -> Keys:
    return as_keys(b"".join(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names))


def distinct(n: int) -> Keys:
    return keys_of([str(i) for i in range(n)])


_LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=120)
_FRACTION = st.floats(0.01, 0.99)


@given(_LABELS, _FRACTION, st.integers(0, 2**31 - 1))
def test_each_class_has_its_share_within_one_row(labels: list[int], fraction: float, seed: int) -> None:
    label_N = np.array(labels)
    kept, held = split(distinct(len(labels)), fraction, seed, label_N)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label in set(labels):
        n, taken = labels.count(label), int((label_N[held] == label).sum())
        assert n - taken >= 1
        assert abs(taken - fraction * n) < 1 or taken == n - 1 or (fraction * len(labels) < 1 and taken == 1)
    if max(labels.count(label) for label in labels) > 1:
        assert len(held) >= 1


def test_the_total_is_the_fraction_too() -> None:
    label_N = np.repeat(np.arange(77), 13)
    kept, held = split(distinct(1001), 0.1, 17, label_N)
    assert (len(kept), len(held)) == (901, 100)
    assert set(np.bincount(label_N[held]).tolist()) == {1, 2}


@given(st.permutations(range(40)), st.integers(0, 99))
def test_order_of_rows_does_not_matter(order: list[int], seed: int) -> None:
    names, label_N = [f"row {i % 35}" for i in range(40)], np.arange(40) % 35 % 3
    shuffled = [names[i] for i in order]
    _, held = split(keys_of(names), 0.25, seed, label_N)
    _, moved = split(keys_of(shuffled), 0.25, seed, label_N[order])
    assert sorted(names[i] for i in held) == sorted(shuffled[i] for i in moved)
    drawn, again = draw(9, keys_of(names), seed, label_N), draw(9, keys_of(shuffled), seed, label_N[order])
    assert sorted(names[i] for i in drawn) == sorted(shuffled[i] for i in again)


def test_rows_of_one_key_stay_on_one_side() -> None:
    names = [f"row {i % 50}" for i in range(200)]
    kept, held = split(keys_of(names), 0.2, 3)
    assert not {names[i] for i in kept} & {names[i] for i in held}
    assert len({names[i] for i in held}) == 10


def test_seeds_differ_and_repeat() -> None:
    keys = distinct(1000)
    found = [split(keys, 0.1, seed)[1].tolist() for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found[0]) & set(found[2])) < 30  # 10 by chance


def test_the_choice_is_even() -> None:
    """Over 400 seeds each of 50 rows is held out about 40 times (binomial, sd 6)."""
    counts = np.zeros(50)
    for seed in range(400):
        counts[split(distinct(50), 0.1, seed)[1]] += 1
    assert counts.sum() == 2000
    assert counts.min() > 15
    assert counts.max() < 70


def test_one_row_cannot_be_split() -> None:
    assert [len(part) for part in split(distinct(1), 0.5, 0)] == [1, 0]
    assert [len(part) for part in split(keys_of(["a", "a"]), 0.5, 0)] == [2, 0]


@pytest.mark.parametrize(("n", "expected"), [(10, [5, 3, 2]), (20, [10, 6, 4]), (1, [1, 0, 0])])
def test_draw_is_stratified(n: int, expected: list[int]) -> None:
    label_N = np.repeat([0, 1, 2], [50, 30, 20])
    drawn = draw(n, distinct(100), 17, label_N)
    assert np.bincount(label_N[drawn], minlength=3).tolist() == expected
    assert drawn.tolist() == sorted(set(drawn.tolist()))


@given(_LABELS, st.integers(1, 150), st.integers(0, 9))
def test_draw_gives_n_and_shares_within_one(labels: list[int], n: int, seed: int) -> None:
    label_N = np.array(labels)
    drawn = draw(n, distinct(len(labels)), seed, label_N)
    assert len(drawn) == min(n, len(labels))
    for label in set(labels):
        assert abs(int((label_N[drawn] == label).sum()) - min(1, n / len(labels)) * labels.count(label)) < 1
