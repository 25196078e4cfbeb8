"""Frozen linear layers in 4 bits: NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3).

Of each 64 weights the largest magnitude is their scale, and each is the nearest of 16 levels of it. Of each 256
scales, less their mean, the largest magnitude is again a scale, and each is one of 256 dynamic levels (Dettmers et al.
2022, arXiv 2110.02861, section 1.3): 4.127 bits a weight. The codes are those of bitsandbytes (version 0.50.2; of 1,536
scales 2 were a level apart), so an adapter meets the same base there. Own code, because bitsandbytes holds its state
in a Parameter of another shape, which every part that looks at weights would have to know, and because this runs
wherever torch does.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK, GROUP = 64, 256
BYTES = 0.5 + (1 + 4 / GROUP) / BLOCK  # of one weight
# Appendix E: quantiles of a standard normal distribution, with a level at 0 and both ends at 1.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4Linear(nn.Linear):
    """A linear layer whose weight [O, I] is in 4 bits; `weight` makes it anew, in `dtype`, each time it is asked for.

    Neither pass keeps it: the backward makes it once more. Nothing of the layer trains.
    """

    codes: Tensor
    scale_codes: Tensor
    scales: Tensor
    mean: Tensor

    def __init__(self, linear: nn.Linear, device: torch.device | str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        bias: Any = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        for name, value in quantise(linear.weight.detach().to(device)).items():
            self.register_buffer(name, value)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantise(self.dtype)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[O, I], computed in fp32."""
        weights = dequantise(self.codes, self.scale_codes, self.scales, self.mean)
        return weights[: self.out_features * self.in_features].view(self.out_features, self.in_features).to(dtype)

    def dequantise_into(self, out_OI: Tensor) -> None:
        """The same in bfloat16, into rows that may lie apart."""
        if out_OI.is_cuda and _triton_is_there():
            from tunesmith.kernels import triton_nf4

            triton_nf4.dequantise(self.codes, self.scale_codes, self.scales, self.mean, out_OI)
        else:
            out_OI.copy_(self.dequantise(torch.bfloat16))

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return cast(Any, _Product).apply(input.to(dtype), self)


class _Product(torch.autograd.Function):
    """x W' + b with W made anew in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        bias: Any = layer.bias
        return F.linear(x, _made(layer, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_outputs[0]
        return grad @ _made(ctx.layer, grad), None


def _made(layer: Nf4Linear, like: Tensor) -> Tensor:
    """The weights in the dtype of `like`."""
    if like.dtype != torch.bfloat16:
        return layer.dequantise(like.dtype)
    made_OI = like.new_empty(layer.out_features, layer.in_features)
    layer.dequantise_into(made_OI)
    return made_OI


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


def quantise(weight: Tensor) -> dict[str, Tensor]:
    """Weights of any shape -> two codes a byte, a code for each block's scale, and scales and mean of those."""
    blocks_NB = _in_blocks(weight.flatten().float(), BLOCK)
    scale_N = blocks_NB.abs().amax(1)
    codes = _nearest(blocks_NB / scale_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None], _levels()).flatten()
    mean = scale_N.mean()
    groups_MG = _in_blocks(scale_N - mean, GROUP)
    scales_M = groups_MG.abs().amax(1)
    relative_MG = groups_MG / scales_M.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return {
        "codes": (codes[0::2] << 4) | codes[1::2],
        "scale_codes": _nearest(relative_MG, dynamic_levels()).flatten()[: len(scale_N)],
        "scales": scales_M,
        "mean": mean,
    }


def dequantise(codes: Tensor, scale_codes: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
    """What `quantise` made, flat and in fp32; the last block is whole."""
    levels = tables(str(codes.device))[1]
    scale_N = levels[scale_codes.int()] * scales.repeat_interleave(GROUP)[: len(scale_codes)] + mean
    pairs = F.embedding(codes.int(), _pairs(str(codes.device)))  # two weights for each byte
    return (pairs.view(-1, BLOCK) * scale_N[:, None]).flatten()


def hold_in_nf4(model: nn.Module, device: torch.device | str) -> int:
    """Puts Nf4Linear in place of every linear layer below the output projection; returns how many those are."""
    served = list(served_linears(model))
    for name, linear in served:
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, Nf4Linear(linear, device))
    return len(served)


def served_linears(model: Any) -> list[tuple[str, nn.Linear]]:
    """The layers that `hold_in_nf4` replaces."""
    output = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not output]


def give_back(model: nn.Module) -> None:
    """Plain linear layers again, with the dequantised weights in fp32: what an adapter can be merged into."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Nf4Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.dequantise(torch.float32), requires_grad=False)
            plain.bias = cast(Any, layer.bias)
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, plain)


def dynamic_levels() -> Tensor:
    """The 256 dynamic levels in order: 0, 1, and for each power of ten down to 1e-6 evenly spaced values of both signs.

    The power 10^(e - 6) has 2^e of them, each in the middle of its share of a tenth to one.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        for value in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist():
            found += [value, -value]
    return torch.tensor(sorted(found))


def _levels() -> Tensor:
    return torch.tensor(LEVELS)


@cache
def tables(device: str) -> tuple[Tensor, Tensor]:
    """The 16 levels of a weight and the 256 of a scale, on the device."""
    return _levels().to(device), dynamic_levels().to(device)


@cache
def _pairs(device: str) -> Tensor:
    """The two levels of each byte: [256, 2]."""
    byte = torch.arange(256)
    return torch.stack([_levels()[byte >> 4], _levels()[byte & 15]], dim=1).to(device)


def _nearest(value: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest level."""
    between = ((levels[1:] + levels[:-1]) / 2).to(value.device)
    return torch.bucketize(value, between, out_int32=True).to(torch.uint8)


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)
