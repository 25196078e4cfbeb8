"""Which examples make which step: permutations, weights, spans, exact counts, and resuming at every position."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.source import Batching, DataSource, EasyFirst, ExampleList, batches, epoch_order
from tunesmith.errors import InputError
from tunesmith.types import Batch, Example, Piece, Step

NOBODY: Any = None  # the policy of a source that annotates nothing


def examples_of(lengths: Sequence[int]) -> ExampleList:
    """Example n is n, n, n, ... so that a batch tells what stands in it."""
    made = [Example((Piece(np.full(k, n, np.int32), np.ones(k, np.float32)),)) for n, k in enumerate(lengths)]
    return ExampleList(made)


def source_of(lengths: Sequence[int], *, seed: int = 0, workers: int = 1, **given: Any) -> DataSource:
    batching: dict[str, Any] = {"epochs": 1.0, "max_steps": None, "batch_size": 4, "batch_tokens": None}
    batching |= {"micro_batch_size": None, "micro_batch_tokens": 10**9}
    batching |= {key: given.pop(key) for key in list(given) if key in batching}
    return DataSource(
        examples_of(lengths), Batching(**batching), seed=seed, packed=True, pad_id=0, workers=workers, **given
    )


def numbers(step: Step) -> list[int]:
    return [n for batch in step.batches for n in batch.examples]


def content(step: Step) -> tuple[Any, ...]:
    """All that training sees of a step."""
    rows = [(batch.examples, batch.streams["input"].input_ids_BT.tolist()) for batch in step.batches]
    return step.number, step.epoch, step.state, rows


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=25)
BATCHING = st.fixed_dictionaries(
    {
        "epochs": st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 2.75, 3.0]),
        "max_steps": st.none() | st.integers(1, 30),
        "micro_batch_size": st.none() | st.integers(1, 5),
        "micro_batch_tokens": st.integers(1, 40),
    }
).flatmap(
    lambda drawn: st.one_of(
        st.integers(1, 9).map(lambda n: {**drawn, "batch_size": n}),
        st.integers(1, 50).map(lambda n: {**drawn, "batch_size": None, "batch_tokens": n}),
    )
)


# ---------------------------------------------------------------- order and weights


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation(count: int, seed: int, epochs: int) -> None:
    steps = list(source_of([1] * count, seed=seed, epochs=float(epochs)).steps(NOBODY))
    order = [n for step in steps for n in numbers(step)]
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(np.ones(50), epoch, seed).tolist()) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


@given(hardness=st.lists(st.integers(0, 5), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_easy_examples_come_first_in_the_first_epochs(hardness: list[int], seed: int) -> None:
    count = len(hardness)
    first = EasyFirst(np.array(hardness, dtype=np.float64), 2)
    source = source_of([1] * count, seed=seed, epochs=3.0, easy_first=first)
    order = [n for step in source.steps(NOBODY) for n in numbers(step)]
    epochs = [order[i * count : (i + 1) * count] for i in range(3)]
    assert [[hardness[n] for n in epoch] for epoch in epochs[:2]] == [sorted(hardness)] * 2
    assert epochs[2] == epoch_order(np.ones(count), 2, seed).tolist()
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


@given(
    weights=st.lists(st.floats(0, 4) | st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_a_weight_is_how_often_an_example_comes(weights: list[float], seed: int) -> None:
    repeats = np.array(weights)
    counts = np.zeros(len(weights))
    for epoch in range(8):
        own = np.bincount(epoch_order(repeats, epoch, seed), minlength=len(weights))
        assert ((own == np.floor(repeats)) | (own == np.ceil(repeats))).all()
        counts += own
        assert (np.abs(counts - repeats * (epoch + 1)) < 1 + 1e-9).all()


def test_fractions_are_spread_over_examples_and_epochs() -> None:
    """Of 1000 examples of weight 0.3, about 300 come in each epoch, and others in the next."""
    chosen = [set(epoch_order(np.full(1000, 0.3), epoch, 0).tolist()) for epoch in range(3)]
    assert [abs(len(c) - 300) < 50 for c in chosen] == [True] * 3  # three and a half deviations of a fair draw
    assert not chosen[0] & chosen[1]
    assert len(chosen[0] | chosen[1] | chosen[2]) == sum(len(c) for c in chosen)


# ---------------------------------------------------------------- steps and micro-batches


@given(lengths=LENGTHS, batching=BATCHING, seed=st.integers(0, 100))
def test_the_number_of_steps_is_known_exactly(lengths: list[int], batching: dict[str, Any], seed: int) -> None:
    source = source_of(lengths, seed=seed, **batching)
    steps = list(source.steps(NOBODY))
    assert [step.number for step in steps] == list(range(1, source.total_steps + 1))
    if batching["max_steps"] is not None:
        assert source.total_steps == batching["max_steps"]
    elif batching["batch_size"]:
        each = math.ceil(len(lengths) / batching["batch_size"])
        whole, part = divmod(batching["epochs"], 1)
        assert source.total_steps == whole * each + math.ceil(part * each - 1e-6)
    if batching["max_steps"] is None:  # the fewest steps that reach the epochs asked for
        assert steps[-1].epoch >= batching["epochs"] - 1e-6
        assert all(step.epoch < batching["epochs"] for step in steps[:-1])
    assert all(a.epoch < b.epoch for a, b in pairwise(steps))


@given(lengths=LENGTHS, tokens=st.integers(1, 50), seed=st.integers(0, 100))
def test_a_step_of_tokens_is_as_large_as_it_may_be(lengths: list[int], tokens: int, seed: int) -> None:
    steps = list(source_of(lengths, seed=seed, batch_size=None, batch_tokens=tokens).steps(NOBODY))
    assert sorted(n for step in steps for n in numbers(step)) == list(range(len(lengths)))
    for step in steps:
        assert step.tokens == sum(lengths[n] for n in numbers(step))
        assert step.tokens <= tokens or step.examples == 1
    for step, following in pairwise(steps):
        assert step.tokens + lengths[numbers(following)[0]] > tokens


@given(lengths=LENGTHS, size=st.none() | st.integers(1, 5), tokens=st.integers(1, 40))
def test_micro_batches_only_arrange_the_step(lengths: list[int], size: int | None, tokens: int) -> None:
    whole = source_of(lengths, batch_size=7)
    arranged = source_of(lengths, batch_size=7, micro_batch_size=size, micro_batch_tokens=tokens)
    for one, step in zip(whole.steps(NOBODY), arranged.steps(NOBODY), strict=True):
        assert len(one.batches) == 1
        assert numbers(step) == numbers(one)
        for batch in step.batches:
            assert len(batch.examples) == 1 or (batch.tokens <= tokens and len(batch.examples) <= (size or 99))
        for batch, following in pairwise(step.batches):
            full = len(batch.examples) == size
            assert full or batch.tokens + lengths[following.examples[0]] > tokens


def test_steps_by_hand() -> None:
    """10 examples by 4 make steps of 4, 4 and 2; a quarter of the second epoch's three is one."""
    source = source_of([1] * 10, epochs=1.25)
    steps = list(source.steps(NOBODY))
    assert source.total_steps == 4
    assert [step.examples for step in steps] == [4, 4, 2, 4]
    assert [step.epoch for step in steps] == pytest.approx([1 / 3, 2 / 3, 1.0, 4 / 3])
    assert steps[-1].state == {"step": 4, "epoch": 1, "position": 1}


# ---------------------------------------------------------------- resuming, threads, columns


@settings(max_examples=40)
@given(lengths=LENGTHS, batching=BATCHING, workers=st.sampled_from([1, 4]))
def test_restored_at_any_position_it_goes_on_with_the_same_steps(
    lengths: list[int], batching: dict[str, Any], workers: int
) -> None:
    expected = [content(step) for step in source_of(lengths, workers=1, **batching).steps(NOBODY)]
    assert [content(step) for step in source_of(lengths, workers=workers, **batching).steps(NOBODY)] == expected
    for position in range(0, len(expected), max(1, len(expected) // 5)):
        resumed = source_of(lengths, workers=workers, **batching)
        resumed.restore(json.loads(json.dumps(expected[position][2])))
        assert [content(step) for step in resumed.steps(NOBODY)] == expected[position + 1 :]


def test_columns_go_with_their_examples_and_pooled_vectors_replace_tokens() -> None:
    columns = {"pooled": np.arange(18, dtype=np.float32).reshape(9, 2), "row": np.arange(9)}
    for step in source_of([3] * 9, micro_batch_size=2, columns=columns).steps(NOBODY):
        for batch in step.batches:
            assert batch.columns["row"].tolist() == batch.examples
            assert batch.columns["pooled"][:, 0].tolist() == [2 * n for n in batch.examples]
            assert batch.tokens == 0


def test_batches_are_annotated_when_they_are_taken_not_ahead() -> None:
    """What the policy says of a batch must come from the policy of that step."""
    seen: list[list[int]] = []

    class Noting:
        def annotate(self, policy: Any, batch: Batch) -> Batch:
            seen.append(batch.examples)
            return batch

    steps = source_of([1] * 20, batch_size=2, micro_batch_size=1, annotator=Noting(), workers=4).steps(NOBODY)
    first = next(steps)
    assert seen == [batch.examples for batch in first.batches]
    second = next(steps)
    assert seen == [batch.examples for step in (first, second) for batch in step.batches]
    steps.close()


def test_an_example_that_cannot_be_read_ends_the_run_where_it_stands() -> None:
    class Torn(ExampleList):
        def example(self, index: int) -> Example:
            if index == broken:
                raise OSError("torn")
            return super().example(index)

    order = epoch_order(np.ones(12), 0, 0)
    broken = int(order[5])
    batching = Batching(1.0, None, 2, None, None, 100)
    torn = Torn([examples_of([1] * 12).example(n) for n in range(12)])
    source = DataSource(torn, batching, seed=0, packed=True, pad_id=0, workers=4)
    taken: list[list[int]] = []
    with pytest.raises(OSError, match="torn"):
        taken.extend(numbers(step) for step in source.steps(NOBODY))
    assert taken == [order[0:2].tolist(), order[2:4].tolist()]


@given(lengths=LENGTHS, tokens=st.integers(1, 40))
def test_passes_without_gradient_take_every_example_once(lengths: list[int], tokens: int) -> None:
    column = {"row": np.arange(len(lengths))}
    made = list(batches(examples_of(lengths), tokens, packed=False, pad_id=0, columns=column))
    found = [n for batch in made for n in batch.examples]
    assert sorted(found) == list(range(len(lengths)))
    assert [lengths[n] for n in found] == sorted(lengths, reverse=True)
    assert [n for batch in made for n in batch.columns["row"].tolist()] == found
    assert all(batch.tokens <= tokens or len(batch.examples) == 1 for batch in made)


@pytest.mark.parametrize("stop", [{"max_steps": 3, "epochs": None}, {"epochs": 2.0}])
@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_nothing_to_train_on_is_refused_and_not_looked_for_for_ever(weights: list[float], stop: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no training row"):
        source_of([2] * len(weights), repeats_N=np.array(weights), **stop)


def test_steps_of_very_many_epochs_are_counted_without_drawing_them() -> None:
    assert source_of([2] * 1000, epochs=10_000.5).total_steps == 10_000 * 250 + 125
    assert source_of([2] * 1000, epochs=10_000.0, repeats_N=np.full(1000, 3.0)).total_steps == 10_000 * 750
    with pytest.raises(InputError, match="20,000 epochs of weighted rows"):
        source_of([2] * 1000, epochs=20_000.0, repeats_N=np.full(1000, 0.5))


def test_epochs_without_a_row_are_passed_over() -> None:
    source = source_of([2], repeats_N=np.array([0.1]), max_steps=3, epochs=None)
    assert [numbers(step) for step in source.steps(NOBODY)] == [[0]] * 3
