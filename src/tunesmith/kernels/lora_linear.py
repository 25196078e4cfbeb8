"""A frozen linear layer with a low-rank update as one autograd function, in place of PEFT's three layers."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.kernels.bordered import drops, is_plain
from tunesmith.kernels.gemm import times, times_transposed


def lora_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_OR: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """W x + b + scaling * B A x with W and b frozen (Hu et al. 2021, arXiv 2106.09685, equation 3).

    x [..., I] -> [..., O]; A is `down_RI`, B `up_OR`; `dropped` is x after dropout, where the update
    reads it. The update is added into the product, and backwards into the gradient of x, so no
    tensor as wide as the layer is written twice; no gradient of W is made. Second derivatives are
    not available.
    """
    apply = cast(Callable[..., Tensor], _LoraLinear.apply)
    return apply(x, dropped, weight_OI, bias_O, down_RI, up_OR, scaling)


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        read = x if dropped is None else dropped
        low_NR = read.reshape(-1, read.shape[-1]) @ down_RI.T
        out = times_transposed(x, weight_OI, bias_O)
        out.view(-1, out.shape[-1]).addmm_(low_NR, up_OR.T, alpha=scaling)
        ctx.save_for_backward(read, weight_OI, down_RI, up_OR, low_NR)
        ctx.scaling, ctx.dropped = scaling, dropped is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        read, weight_OI, down_RI, up_OR, low_NR = ctx.saved_tensors
        need_x, need_dropped, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad = grad_outputs[0]
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_low_NR = (grad_NO @ up_OR).mul_(ctx.scaling)
        grad_up_OR = (grad_NO.T @ low_NR).mul_(ctx.scaling) if need_up else None
        grad_down_RI = grad_low_NR.T @ read.reshape(-1, read.shape[-1]) if need_down else None
        grad_x = grad_dropped = None
        if need_x:
            grad_x = times(grad, weight_OI)
            if not ctx.dropped:
                grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_low_NR, down_RI)
        if need_dropped:
            grad_dropped = (grad_low_NR @ down_RI).view(read.shape)
        return grad_x, grad_dropped, None, None, grad_down_RI, grad_up_OR, None


def fuse(module: nn.Module) -> bool:
    """Puts `lora_linear` in place of the forward of PEFT's LoRA over an nn.Linear; False for any other module.

    What it does not cover (adapters of several scalings, DoRA and other variants, a trained or quantised base,
    merged or disabled adapters, autocast, a device that is not a CPU) is seen at each call and left
    to PEFT's own forward.
    """
    from peft.tuners.lora.layer import Linear as PeftLinear

    if type(module) is not PeftLinear or type(module.get_base_layer()) is not nn.Linear or module.fan_in_fan_out:
        return False
    module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    return True


def _forward(self: Any, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
    base = self.base_layer
    adapters = _adapters(self, x, base.weight) if not args and not keywords else []
    if not adapters:
        return type(self).forward(self, x, *args, **keywords)
    dropout = self.lora_dropout[adapters[0]]
    dropped = dropout(x) if drops(dropout) else None
    down = _beside([self.lora_A[name].weight for name in adapters], 0)
    up = _beside([self.lora_B[name].weight for name in adapters], 1)
    return lora_linear(x, base.weight, base.bias, down, up, self.scaling[adapters[0]], dropped)


def _adapters(module: Any, x: Tensor, weight_OI: Tensor) -> list[str]:
    """The adapters of a vanilla LoRA layer that are in use on this input; none where the kernel does not serve."""
    active: list[str] = module.active_adapters
    if module.disable_adapters or module.merged or not all(is_plain(module, name) for name in active):
        return []
    several = len(active) > 1
    if several and (any(drops(module.lora_dropout[n]) for n in active) or len({module.scaling[n] for n in active}) > 1):
        return []
    bias = module.base_layer.bias
    frozen = not weight_OI.requires_grad and (bias is None or not bias.requires_grad)
    dtypes = {x.dtype, weight_OI.dtype, *(module.lora_A[name].weight.dtype for name in active)}
    plain = x.device.type == "cpu" and len(dtypes) == 1
    return active if frozen and plain and not torch.is_autocast_enabled("cpu") else []


def _beside(factors: list[Tensor], dimension: int) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, dimension)
