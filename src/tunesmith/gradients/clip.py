"""Clipping of the whole gradient by its norm, and the norm's column in the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tunesmith.errors import RefusedError
from tunesmith.kernels.transfer import Arriving
from tunesmith.protocols import Engine
from tunesmith.types import GradientMode, Number


class Clip:
    """Has the engine scale all gradients so that their joint L2 norm is at most `max_norm`; None only measures.

    The norm is summed in float64 over `engine.trainable` in its fixed order, so it neither overflows
    nor depends on how gradients were grouped. A gradient with a NaN or an infinity holds the step, so that the
    optimizer does not spread it, and whoever looks at the norm gets RefusedError. Source: Pascanu et al. 2013,
    arXiv 1211.5063, algorithm 1.
    """

    mode: ClassVar[GradientMode] = "plain"

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def before_step(self, engine: Engine, number: int) -> dict[str, Number]:
        """The norm before clipping, as `grad_norm`."""
        gradients = {name: p.grad for name, p in engine.trainable.items() if p.grad is not None}
        if not gradients:
            return {"grad_norm": 0.0}
        norms_P = _norms(list(gradients.values()))
        norm = torch.linalg.vector_norm(norms_P)
        finite = norm.isfinite()
        engine.hold(~finite)
        if self.max_norm is not None:
            # Times 1 where nothing is to be clipped, and where the norm is not finite: bits stay as they are.
            factor = torch.where(finite & (norm > self.max_norm), self.max_norm / norm, 1.0).float()
            engine.scale(factor.clamp(min=torch.finfo(torch.float32).tiny))  # whose inverse is finite too
        return {"grad_norm": Arriving(norm, partial(_not_finite, list(gradients), norms_P, number))}

    def after_step(self, engine: Engine, number: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def _norms(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of each, on the first one's device."""
    # Norms are float64 in the reduction, without a float64 copy of any gradient; on CUDA in one launch.
    device = gradients[0].device
    if device.type == "cuda" and all(g.device == device for g in gradients):
        return torch.stack(list(cast(Any, torch)._foreach_norm(gradients, 2, dtype=torch.float64)))
    return torch.stack([torch.linalg.vector_norm(g, dtype=_wide(g)).to(device) for g in gradients])


def _wide(gradient: Tensor) -> torch.dtype:
    """float64, except on MPS, which has none."""
    return torch.float32 if gradient.device.type == "mps" else torch.float64


def _not_finite(names: Sequence[str], norms_P: Tensor, number: int, norm: float) -> RefusedError:
    """What is told of gradients of these names and norms, whose joint norm is no finite number."""
    remedy = "resume from the last checkpoint with a lower train.learning_rate, or with precision=fp32"
    bad = [name for name, good in zip(names, norms_P.isfinite().tolist(), strict=True) if not good]
    if not bad:
        return RefusedError(f"step {number}: the gradient's norm overflows though every value is finite", remedy)
    others = f", nor those of {len(bad) - 1} more of {len(names)} parameters" if len(bad) > 1 else ""
    return RefusedError(f"step {number}: the gradient of {bad[0]} is not finite{others}", remedy)
