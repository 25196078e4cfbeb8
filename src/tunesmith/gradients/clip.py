"""Clipping of the whole gradient by its norm, and the norm's column in the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunesmith.errors import RefusedError
from tunesmith.protocols import Engine
from tunesmith.types import GradientMode

# torch's operations over lists have no public names; its own optimizers and clipping are written with these.
foreach: Any = torch


class Clip:
    """Scales all gradients so that their joint L2 norm is at most `max_norm`; None only measures.

    The norm is summed in float64 over `engine.trainable` in its fixed order, so it neither overflows
    nor depends on how gradients were grouped. A gradient with a NaN or an infinity raises RefusedError before the
    optimizer can spread it. Source: Pascanu et al. 2013, arXiv 1211.5063, algorithm 1.
    """

    mode: ClassVar[GradientMode] = "plain"

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def before_step(self, engine: Engine, number: int) -> dict[str, float]:
        """The norm before clipping, as `grad_norm`."""
        named = {name: p.grad for name, p in engine.trainable.items() if p.grad is not None}
        norm = _norm(list(named.values()))
        if not math.isfinite(norm):
            raise _non_finite(named, number)
        if self.max_norm is not None and norm > self.max_norm:
            foreach._foreach_mul_(list(named.values()), self.max_norm / norm)  # one launch, not one a tensor
        return {"grad_norm": norm}

    def after_step(self, engine: Engine, number: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def _norm(gradients: list[Tensor]) -> float:
    """Joint L2 norm; one transfer from the device, however many tensors there are."""
    if not gradients:
        return 0.0
    # Norms are float64 in the reduction, without a float64 copy of any gradient; on CUDA in one launch.
    device = gradients[0].device
    if device.type == "cuda" and all(g.device == device for g in gradients):
        norms: list[Tensor] = list(foreach._foreach_norm(gradients, 2, dtype=torch.float64))
    else:
        norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).to(device) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


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
