"""Root-mean-square normalisation by a frozen weight as one autograd function, on CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.kernels.bordered import BORDER
from tunesmith.kernels.rows import Rows, hand_on, in_rows


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * w over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    x [..., D]. The weight has no gradient. Second derivatives are not available. On one CPU core,
    1,271 x 576: 0.7 ms for both passes against 2.8 ms for transformers' own chain of operations.
    """
    apply = cast(Callable[..., Tensor], _RmsNorm.apply)
    return apply(x, weight_D, epsilon)


class _RmsNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, rate)
        return (x * rate).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = r (g - x r^2 mean(g x)) with g = w dy and r = 1 / rms."""
        x, weight_D, rate = ctx.saved_tensors
        grad = grad_outputs[0] * weight_D
        along = (grad * x).sum(-1, keepdim=True).mul_(rate).mul_(rate).div_(x.shape[-1])
        return grad.addcmul_(x, along, value=-1).mul_(rate), None, None


def rms_norm_on_cuda(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """The same in bfloat16 on CUDA by the kernels of decoder layers, rounded as transformers rounds.

    On an H200, 8,192 x 4,096: 0.42 ms for both passes, where transformers' own chain of operations takes 1.32.
    """
    apply = cast(Callable[..., Tensor], _OnRows.apply)
    return apply(x, weight_D, epsilon)


class _OnRows(torch.autograd.Function):
    """See `rms_norm_on_cuda`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        from tunesmith.kernels import triton_rows as rows

        x_ND = in_rows(x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x_ND, weight_D)
        ctx.epsilon = epsilon
        out = Rows.empty(len(x_ND), x_ND.shape[1], x_ND, False)
        rows.normalise(x_ND, weight_D, epsilon, out)
        return out.wide_NW.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from tunesmith.kernels import triton_rows as rows

        x_ND, weight_D = ctx.saved_tensors
        grad_ND = in_rows(grad_outputs[0].reshape(x_ND.shape))
        out = Rows.empty(len(x_ND), x_ND.shape[1] + BORDER, x_ND, False)
        rows.normalise_backward(grad_ND, x_ND, weight_D, ctx.epsilon, None, out)
        return hand_on(out, x_ND.shape[1]).view(grad_outputs[0].shape), None, None


def fuse(module: nn.Module) -> bool:
    """Puts a function of these in place of the forward of a norm that is one, whatever its family calls it.

    A class named *RMSNorm with one weight is tried on random input; it is left alone unless the result is that of
    x / rms * w, or of x / rms * (1 + w) (Gemma): to 1e-6 in float32 on the CPU, to its own rounding in bfloat16 on
    CUDA. A weight that trains, other dtypes and devices, and autocast on the CPU are seen at each call and left to the
    module's own forward.
    """
    weight: Any = getattr(module, "weight", None)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm") and [n for n, _ in module.named_parameters()] == ["weight"]
    if not named or not isinstance(epsilon, float) or (run := _function(weight, weight)) is None:
        return False
    noise = torch.Generator().manual_seed(0)
    sample = torch.randn(3, len(weight), generator=noise).to(weight.device, weight.dtype)
    sample[0] *= epsilon**0.5  # a row so small that a wrong epsilon shows
    relative, absolute = (1e-5, 1e-6) if weight.dtype == torch.float32 else (0.01, 1e-3)
    with torch.no_grad():
        expected = module(sample)
        for offset in (0.0, 1.0):
            if torch.allclose(run(sample, weight.float() + offset, epsilon), expected, relative, absolute):
                module.forward = MethodType(partial(_forward, offset=offset), module)  # type: ignore[method-assign]
                module.rms_epsilon = epsilon  # type: ignore[assignment]
                return True
    return False


def _forward(self: Any, x: Tensor, *, offset: float) -> Tensor:
    run = None if self.weight.requires_grad else _function(x, self.weight)
    if run is None:
        return type(self).forward(self, x)
    return run(x, self.weight.float() + offset if offset else self.weight, self.rms_epsilon)


def _function(x: Any, weight_D: Any) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """What norms such input by such a weight."""
    if not isinstance(x, Tensor) or x.device != weight_D.device or x.dtype != weight_D.dtype:
        return None
    if x.is_cuda and x.dtype == torch.bfloat16:
        return rms_norm_on_cuda
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return rms_norm if plain else None
