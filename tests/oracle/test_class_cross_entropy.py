"""Losses of classes that do not count alike, against sums written out term by term; and what is balanced, as counted.

Weights, focus and smoothing without each other are also those of torch and of the focal paper's own formula.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import Emphasis, any_of, one_of
from tunesmith.objectives.classify import UNKNOWN, Classify
from tunesmith.objectives.imbalance import Imbalance
from tunesmith.objectives.tag import Tag
from tunesmith.types import Row

WEIGHTS = st.none() | st.lists(st.floats(0.1, 9), min_size=7, max_size=7)
GAMMAS = st.sampled_from((0.0, 0.5, 1.0, 2.0, 3.7))
SMOOTHINGS = st.sampled_from((0.0, 0.1, 0.6))
SHAPES = st.tuples(st.integers(0, 999), st.integers(1, 5), st.integers(2, 7))


def logits_of(seed: int, rows: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).requires_grad_()


def emphasis_of(weights: list[float] | None, classes: int, gamma: float, smoothing: float) -> Emphasis:
    return Emphasis(None if weights is None else tuple(weights[:classes]), gamma, smoothing)


@settings(deadline=None)
@given(SHAPES, WEIGHTS, GAMMAS, SMOOTHINGS)
def test_the_loss_of_one_class_is_its_sum(
    shape: tuple[int, int, int], weights: list[float] | None, gamma: float, smoothing: float
) -> None:
    logits, classes = logits_of(*shape), shape[2]
    class_N = torch.arange(shape[1]) % classes
    class_N[0] = UNKNOWN if shape[0] % 3 == 0 else class_N[0]
    found = one_of(logits, class_N, emphasis_of(weights, classes, gamma, smoothing), ignore=UNKNOWN)
    slow: list[float] = []
    for row, own in zip(logits.tolist(), class_N.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        loss = 0.0
        for v, x in enumerate(row):
            p, w = math.exp(x) / total, weights[v] if weights else 1.0
            q = (1 - smoothing) * (v == own) + smoothing / classes
            loss -= w * q * (1 - p) ** gamma * math.log(p)
        slow.append(0.0 if own == UNKNOWN else loss)
    assert found.tolist() == pytest.approx(slow, rel=1e-8, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: one_of(x, class_N, emphasis_of(weights, classes, gamma, smoothing), ignore=UNKNOWN), (logits,)
    )


@settings(deadline=None)
@given(SHAPES, WEIGHTS, GAMMAS, SMOOTHINGS)
def test_the_loss_of_any_classes_is_its_mean(
    shape: tuple[int, int, int], weights: list[float] | None, gamma: float, smoothing: float
) -> None:
    logits, (seed, rows, classes) = logits_of(*shape), shape
    actual = torch.from_numpy(np.random.default_rng(seed).random((rows, classes)) < 0.4)
    found = any_of(logits, actual, emphasis_of(weights, classes, gamma, smoothing))
    slow: list[float] = []
    for row, has in zip(logits.tolist(), actual.tolist(), strict=True):
        loss = 0.0
        for v, x in enumerate(row):
            p, w = 1 / (1 + math.exp(-x)), weights[v] if weights else 1.0
            y = (1 - smoothing) * has[v] + smoothing / 2
            loss -= w * y * (1 - p) ** gamma * math.log(p) + (1 - y) * p**gamma * math.log(1 - p)
        slow.append(loss / classes)
    assert found.tolist() == pytest.approx(slow, rel=1e-8)
    assert torch.autograd.gradcheck(
        lambda x: any_of(x, actual, emphasis_of(weights, classes, gamma, smoothing)), (logits,)
    )


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_what_is_certain_has_a_finite_slope(gamma: float) -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    loss = one_of(logits, torch.tensor([0, 0]), Emphasis(None, gamma, 0.1)).sum()
    loss = loss + any_of(logits, torch.tensor([[True, False], [True, False]]), Emphasis(None, gamma)).sum()
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=30).filter(lambda labels: len(set(labels)) > 1))
def test_balanced_is_that_of_scikit_learn(labels: list[str]) -> None:
    objective = Classify(Classify.Options.model_validate({"class_weights": "balanced"}))
    objective.fit(Row({"text": "x", "label": label}, "here") for label in labels)
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert objective.emphasis.weight_V == pytest.approx(tuple(expected))
    assert sum(expected[objective.labels.index(label)] for label in labels) == pytest.approx(len(labels))


def test_balanced_of_label_sets_is_rows_without_by_rows_with() -> None:
    objective = Classify(Classify.Options.model_validate({"class_weights": "balanced"}))
    sets = [["all"], ["all", "some"], ["all"], ["all", "some", "rare"], ["all"]]
    objective.fit(Row({"text": "x", "labels": own}, "here") for own in sets)
    assert dict(zip(objective.labels, objective.emphasis.weight_V or (), strict=True)) == {
        "all": 1.0,
        "some": pytest.approx(3 / 2),
        "rare": pytest.approx(4 / 1),
    }


def test_tags_are_weighted_by_words() -> None:
    objective = Tag(Tag.Options.model_validate({"class_weights": "balanced"}))
    objective.fit([Row({"tokens": list("abcd"), "tags": ["O", "O", "O", "B"]}, "here")])
    assert objective._emphasis.weight_V == pytest.approx((4 / 2, 4 / 6))  # pyright: ignore[reportPrivateUsage]


def test_weights_by_hand_leave_the_other_classes_as_they_are() -> None:
    options = Imbalance.model_validate({"class_weights": {"b": 5}, "focal_gamma": 2, "label_smoothing": 0.1})
    assert options.emphasis(["a", "b"], {"a": 9, "b": 1}) == Emphasis((1.0, 5.0), 2.0, 0.1)
    with pytest.raises(InputError, match="names 'fruad', which no training row has") as caught:
        Imbalance.model_validate({"class_weights": {"fruad": 5}}).emphasis(["fraud", "ham"], {})
    assert "write 'fraud'" in caught.value.remedy
