"""The joint norm, its clipping, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.errors import RefusedError
from tunesmith.gradients.clip import Clip


def engine_of(*gradients: torch.Tensor | None) -> Any:
    trainable: dict[str, nn.Parameter] = {}
    held: list[torch.Tensor] = []
    for i, gradient in enumerate(gradients):
        shape = (1,) if gradient is None else gradient.shape
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32 if gradient is None else gradient.dtype))
        parameter.grad = gradient
        trainable[f"layer.{i}"] = parameter

    def scale(factor: torch.Tensor) -> None:
        for parameter in trainable.values():
            if parameter.grad is not None:
                parameter.grad *= float(factor)

    return SimpleNamespace(trainable=trainable, held=held, hold=held.append, scale=scale)


def _norm(clip: Clip, engine: Any, number: int = 1) -> float:
    (norm,) = clip.before_step(engine, number).values()
    return float(norm)


def test_gradients_above_the_norm_are_scaled_to_it() -> None:
    engine = engine_of(torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]))
    assert _norm(Clip(1.0), engine) == 5.0
    torch.testing.assert_close(engine.trainable["layer.0"].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(engine.trainable["layer.2"].grad, torch.tensor([[0.8]]))
    assert _norm(Clip(1.0), engine) == pytest.approx(1.0)


@pytest.mark.parametrize("max_norm", [None, 5.0, 100.0])
def test_gradients_within_the_norm_keep_their_bits(max_norm: float | None) -> None:
    engine = engine_of(torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]))
    assert _norm(Clip(max_norm), engine) == 5.0
    assert engine.trainable["layer.0"].grad.tolist() == [3.0, 0.0]
    assert engine.trainable["layer.1"].grad.tolist() == [[4.0]]


def test_agrees_with_torch() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(7, 5), torch.randn(3), torch.randn(2, 2, 2)]
    ours, theirs = engine_of(*[g.clone() for g in gradients]), engine_of(*[g.clone() for g in gradients])
    norm = _norm(Clip(0.5), ours)
    expected = nn.utils.clip_grad_norm_(theirs.trainable.values(), 0.5)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in ours.trainable.items():
        torch.testing.assert_close(parameter.grad, theirs.trainable[name].grad, rtol=1e-5, atol=1e-7)


def test_values_whose_squares_overflow_are_clipped_not_refused() -> None:
    engine = engine_of(torch.full((4,), 1e25), torch.full((4,), 1e25, dtype=torch.bfloat16))
    assert _norm(Clip(1.0), engine) == pytest.approx(8**0.5 * 1e25, rel=1e-2)
    assert float(engine.trainable["layer.0"].grad.norm()) == pytest.approx(0.5**0.5, rel=1e-2)


def test_a_norm_beyond_float32_is_scaled_by_what_can_be_inverted() -> None:
    engine = engine_of(*[torch.full((4,), 3e38) for _ in range(400)])
    asked: list[torch.Tensor] = []
    engine.scale = asked.append
    assert _norm(Clip(1.0), engine) > torch.finfo(torch.float32).max
    assert torch.isfinite(1 / asked[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_non_finite_gradient_is_refused_and_left_alone(bad: float, max_norm: float | None) -> None:
    engine = engine_of(torch.ones(2), torch.tensor([1.0, bad]), torch.tensor([bad]))
    clip = Clip(max_norm)
    norm = clip.before_step(engine, 12)["grad_norm"]
    assert any(engine.held)
    told = r"^step 12: the gradient of layer\.1 is not finite, nor those of 1 more of 3 parameters"
    with pytest.raises(RefusedError, match=told):
        float(norm)
    assert engine.trainable["layer.0"].grad.tolist() == [1.0, 1.0]


def test_a_norm_that_overflows_is_told_as_such() -> None:
    with pytest.raises(RefusedError, match=r"^step 3: the gradient's norm overflows though every value is finite"):
        _norm(Clip(1.0), engine_of(*[torch.full((1,), 1.3e154, dtype=torch.float64)] * 2), 3)


def test_nothing_to_clip() -> None:
    assert Clip(1.0).before_step(engine_of(None), 1) == {"grad_norm": 0.0}
    assert Clip(1.0).state() == {}
    Clip(1.0).restore({})
