"""Clipping of the whole gradient by its norm, and the norm's column in the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tunesmith.errors import RefusedError
from tunesmith.protocols import Engine
from tunesmith.types import GradientMode


class Clip:
    """Has the engine scale all gradients so that their joint L2 norm is at most `max_norm`; None only measures.

    The norm is summed in float64 over `engine.trainable` in its fixed order, so it neither overflows
    nor depends on how gradients were grouped. A gradient with a NaN or an infinity holds the step, so that the
    optimizer does not spread it, and raises RefusedError behind it. Source: Pascanu et al. 2013, arXiv 1211.5063,
    algorithm 1.
    """

    mode: ClassVar[GradientMode] = "plain"

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm
        self._norm: Tensor | None = None

    def before_step(self, engine: Engine, number: int) -> dict[str, Tensor | float]:
        """The norm before clipping, as `grad_norm`."""
        gradients = [p.grad for p in engine.trainable.values() if p.grad is not None]
        if not gradients:
            return {"grad_norm": 0.0}
        self._norm = norm = _norm(gradients)
        finite = norm.isfinite()
        engine.hold(~finite)
        if self.max_norm is not None:
            # Times 1 where nothing is to be clipped, and where the norm is not finite: bits stay as they are.
            factor = torch.where(finite & (norm > self.max_norm), self.max_norm / norm, 1.0).float()
            engine.scale(factor.clamp(min=torch.finfo(torch.float32).tiny))  # whose inverse is finite too
        return {"grad_norm": norm}

    def after_step(self, engine: Engine, number: int) -> None:
        if self._norm is not None and not math.isfinite(float(self._norm)):
            raise _non_finite({name: p.grad for name, p in engine.trainable.items() if p.grad is not None}, number)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def _norm(gradients: list[Tensor]) -> Tensor:
    """Joint L2 norm, on the gradients' device."""
    # Norms are float64 in the reduction, without a float64 copy of any gradient; on CUDA in one launch.
    device = gradients[0].device
    if device.type == "cuda" and all(g.device == device for g in gradients):
        norms: list[Tensor] = list(cast(Any, torch)._foreach_norm(gradients, 2, dtype=torch.float64))
    else:
        norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).to(device) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def _wide(gradient: Tensor) -> torch.dtype:
    """float64, except on MPS, which has none."""
    return torch.float32 if gradient.device.type == "mps" else torch.float64


def _non_finite(named: Mapping[str, Tensor], number: int) -> RefusedError:
    for name, gradient in named.items():
        bad = int((~torch.isfinite(gradient)).sum())
        if bad:
            return RefusedError(
                f"step {number}: the gradient of {name} holds {bad} non-finite of {gradient.numel()} values",
                "resume from the last checkpoint with a lower train.learning_rate, or with precision=fp32",
            )
    return RefusedError(
        f"step {number}: the gradient's norm overflows though every value is finite",
        "resume from the last checkpoint with a lower train.learning_rate, or with precision=fp32",
    )
