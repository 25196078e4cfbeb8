"""Frozen weights with their adapters in the border: base and low-rank update are one matrix product.

Projections of the same input stand below each other in one weight W [O, I]. Beside it, in P more columns,
stands B (block by block), and below it, in P more rows, scaling * A:

    W' = [ W      B ]        x' = [x, x (sA)']         y  = x' (first O rows of W')'
         [ sA     . ]        g' = [dy, dy B]           dx = g' (first I columns of W')

which is y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685, equation 3) and its gradient, with no tensor of
the width of y or x read and written once more to add the update. Letters: N rows, O outputs, I inputs, P border.
On an H100, 8,192 rows of a Llama-3.1-8B layer: all eight products took 10.32 ms with the border and 10.23
without, where adding the update afterwards moves 2.8 GB, 0.9 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tunesmith.kernels.nf4 import Nf4Linear
    from tunesmith.kernels.rows import Rows
    from tunesmith.kernels.triton_low_rank import LowRank

# The border may be this many times larger than the weight's own largest value of a row before e4m3 saturates.
HEADROOM = 4.0
# In fp8 the low-rank rows are this much smaller and B as much larger: both then keep clear of e4m3's ends.
FOLD = 4.0
LARGEST = 448.0
BORDER = 64  # columns at least: 128 bytes, so that rows stay aligned for the copy engine


@dataclass(frozen=True, slots=True)
class Adapter:
    """One projection's low-rank update: its parameters, where they lie in the border, and its scaling."""

    down_RI: nn.Parameter
    up_OR: nn.Parameter
    scaling: float
    outputs: slice
    ranks: slice


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter [R, C] and its place in the border: as bfloat16(factor * source), and in fp8 once more as a cast.

    cast = e4m3(fold * target / scale), saturating; `scale` is laid out as [R, C] by strides of 0.
    """

    source: nn.Parameter
    factor: float
    target: Tensor
    cast: Tensor | None = None
    scale: Tensor | None = None
    fold: float = 1.0

    def enter(self) -> None:
        self.target.copy_(self.source * self.factor)
        if self.cast is not None and self.scale is not None:
            _into(self.cast, self.target.float() * self.fold / self.scale)


class Bordered:
    """Frozen projections of one input, as one bordered bfloat16 weight; see the module.

    `linears` are PEFT's LoRA layers over nn.Linear, or plain frozen nn.Linear. Their own weights become
    views of the bordered one: every other use of the modules goes on as before.
    """

    def __init__(self, linears: list[Any]) -> None:
        bases = [base_of(linear) for linear in linears]
        self.linears = linears
        self.outputs = sum(base.out_features for base in bases)
        self.inputs = int(bases[0].in_features)
        self.adapters = _adapters(linears)
        self.rank = _up_to(sum(a.down_RI.shape[0] for a in self.adapters), 16)
        self.border = max(self._least_border(), 1 << (self.rank - 1).bit_length())
        with torch.no_grad():
            self._place(bases)
        self.entries = [entry for a in self.adapters for entry in self._entries(a)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters, in the order of `gradients`."""
        return [p for a in self.adapters for p in (a.down_RI, a.up_OR)]

    @property
    def fp8(self) -> bool:
        return False

    def refresh(self) -> None:
        """Copies the adapters into the border; fused optimizers move them without a trace in their versions."""
        with torch.no_grad():
            for entry in self.entries:
                entry.enter()

    def project(self, x: Rows, out: Tensor | None = None) -> Tensor:
        """[N, O], in `out` if given; fills the border of x."""
        self.border_in(x)
        return self._product(x, forward=True, out=out)

    def project_onto(self, base_NO: Tensor, x: Rows) -> None:
        """Adds [N, O] to `base`, in place; not in fp8, whose products do not add."""
        self.border_in(x)
        torch.addmm(base_NO, x.wide_NW, self._made()[: self.outputs].T, out=base_NO)

    def border_in(self, x: Rows) -> None:
        """Fills the border of x, of which `project` is asked."""
        self._thin(x, self.inputs, self._down_PI[: self.rank].T, 1.0 / FOLD)

    def back(self, grad: Rows, out: Tensor | None = None) -> Tensor:
        """The gradient of x [N, I]; `gradients` must have filled the border of grad."""
        return self._product(grad, forward=False, out=out)

    def gradients(self, grad: Rows, x: Rows) -> list[Tensor]:
        """Gradients of `parameters`, from x as `project` left it; fills the border of grad, of its result."""
        if not self.adapters:
            return []
        if self._once is not None and self._once.is_worth(grad):
            found = self._once.gradients(grad, x, self._up_OP)
            return [g.to(p.dtype) for g, p in zip(found, self.parameters, strict=True)]
        self._thin(grad, self.outputs, self._up_OP[:, : self.rank], 1.0)
        low_NR = x.wide_NW[:, self.inputs : self.inputs + self.rank]
        grad_low_NR = grad.wide_NW[:, self.outputs : self.outputs + self.rank]
        down_RI = _wide_product(grad_low_NR.T, x.wide_NW[:, : self.inputs])
        up_OR = _wide_product(grad.wide_NW[:, : self.outputs].T, low_NR)
        found: list[Tensor] = []
        for a in self.adapters:
            found.append((down_RI[a.ranks] * a.scaling).to(a.down_RI.dtype))
            found.append(up_OR[a.outputs, a.ranks].to(a.up_OR.dtype))
        return found

    def _least_border(self) -> int:
        return BORDER

    def _place(self, bases: list[nn.Linear]) -> None:
        weights = [base.weight for base in bases]
        first = weights[0]
        self._whole = first.new_zeros(self.outputs + self.border, self.inputs + self.border)
        self._down_PI = self._whole[self.outputs :, : self.inputs]
        self._up_OP = self._whole[: self.outputs, self.inputs :]
        start = 0
        for weight in weights:
            view = self._whole[start : start + weight.shape[0], : self.inputs]
            view.copy_(weight)
            weight.data = view
            start += weight.shape[0]

    def _entries(self, a: Adapter) -> tuple[Entry, Entry]:
        return (
            Entry(a.down_RI, a.scaling, self._down_PI[a.ranks]),
            Entry(a.up_OR, 1.0, self._up_OP[a.outputs, a.ranks]),
        )

    @cached_property
    def _once(self) -> LowRank | None:
        """The same thin products by kernels that read each row once, where they serve these adapters."""
        if not (self.adapters and self.adapters[0].down_RI.is_cuda):
            return None
        from tunesmith.kernels import triton_low_rank as kernels

        return kernels.LowRank(self.adapters, self.outputs, self.inputs) if kernels.serves(self.adapters) else None

    def _thin(self, rows: Rows, width: int, weight_WR: Tensor, factor: float) -> None:
        if not self.adapters:
            return
        torch.mm(rows.wide_NW[:, :width], weight_WR, out=rows.wide_NW[:, width : width + self.rank])
        if self.fp8:
            from tunesmith.kernels.triton_rows import cast_border

            cast_border(rows, width, self.rank, factor)

    def _product(self, rows: Rows, *, forward: bool, out: Tensor | None = None) -> Tensor:
        whole = self._made()
        weight = whole[: self.outputs].T if forward else whole[:, : self.inputs]
        return torch.mm(rows.wide_NW, weight, out=out)

    def _made(self) -> Tensor:
        """W', whole."""
        return self._whole


class BorderedNf4(Bordered):
    """The same with W in 4 bits (see `nf4`), made anew in bfloat16 for each product.

    All weights of a device are made in one buffer, one after the other: only one of them is there at a time.
    """

    def _place(self, bases: list[nn.Linear]) -> None:
        self._layers = cast("list[Nf4Linear]", bases)
        like = self._layers[0].scales
        self._buffer = _buffers.setdefault(like.device, _Buffer(like.device))
        self._down_PI = torch.zeros(self.border, self.inputs, dtype=torch.bfloat16, device=like.device)
        self._up_OP = torch.zeros(self.outputs, self.border, dtype=torch.bfloat16, device=like.device)

    def _made(self) -> Tensor:
        shape = (self.outputs + self.border, self.inputs + self.border)
        whole = self._buffer.of(shape[0] * shape[1]).view(shape)
        whole[self.outputs :, : self.inputs] = self._down_PI
        whole[: self.outputs, self.inputs :] = self._up_OP
        start = 0
        for layer in self._layers:
            layer.dequantise_into(whole[start : start + layer.out_features, : self.inputs])
            start += layer.out_features
        return whole


class BorderedFp8(Bordered):
    """The same with W in e4m3, one scale per output for the forward and per input, transposed, for the backward.

    Tensor cores take e4m3 only along the contracted dimension, so each pass has its copy, together as
    large as bfloat16. The bfloat16 weights are given up; the modules' own forward dequantises. Border values
    beyond HEADROOM saturate. On an H100 a layer's products of a Llama-3.1-8B took 5.53 ms, in bfloat16 10.32.
    """

    @property
    def fp8(self) -> bool:
        return True

    def _least_border(self) -> int:
        return 2 * BORDER

    def _place(self, bases: list[nn.Linear]) -> None:
        weights = [base.weight for base in bases]
        first = weights[0]
        self._down_PI = first.new_zeros(self.border, self.inputs)
        self._up_OP = first.new_zeros(self.outputs, self.border)
        joined_OI = torch.cat([weight.data for weight in weights])
        self._forward_OW, self._forward_scale_1O = _quantise(joined_OI, self.border)
        self._backward_IW, self._backward_scale_1I = _quantise(joined_OI.T.contiguous(), self.border)
        start = 0
        for linear, weight in zip(self.linears, weights, strict=True):
            span = slice(start, start + weight.shape[0])
            _give_up(base_of(linear), self._forward_OW[span, : self.inputs], self._forward_scale_1O[0, span])
            start = span.stop

    def _entries(self, a: Adapter) -> tuple[Entry, Entry]:
        down, up = super()._entries(a)
        cast_RI = self._backward_IW.T[self.outputs :][a.ranks]
        cast_OR = self._forward_OW[a.outputs, self.inputs :][:, a.ranks]
        scale_RI = self._backward_scale_1I.expand(cast_RI.shape)
        scale_OR = self._forward_scale_1O.T[a.outputs].expand(cast_OR.shape)
        return (
            replace(down, cast=cast_RI, scale=scale_RI),
            replace(up, cast=cast_OR, scale=scale_OR, fold=FOLD),
        )

    def _product(self, rows: Rows, *, forward: bool, out: Tensor | None = None) -> Tensor:
        weight_KW = self._forward_OW if forward else self._backward_IW
        scale_1K = self._forward_scale_1O if forward else self._backward_scale_1I
        assert rows.cast_NW is not None
        assert rows.scale_N1 is not None
        return torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            rows.cast_NW,
            weight_KW.t(),
            scale_a=rows.scale_N1,
            scale_b=scale_1K,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=out,
        )


class _Buffer:
    """What weights in 4 bits are made in, as large as the largest of them; goes with the last that uses it."""

    def __init__(self, device: torch.device) -> None:
        self._held = torch.empty(0, dtype=torch.bfloat16, device=device)

    def of(self, size: int) -> Tensor:
        """So many bfloat16."""
        if len(self._held) < size:
            self._held = torch.empty(size, dtype=torch.bfloat16, device=self._held.device)
        return self._held[:size]


_buffers: WeakValueDictionary[torch.device, _Buffer] = WeakValueDictionary()


def base_of(linear: Any) -> nn.Linear:
    """The nn.Linear that a LoRA layer of PEFT wraps, or the layer itself."""
    return linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear


def adapters_in_use(linear: Any) -> list[str]:
    """The adapters that a layer of PEFT adds now; none of any other layer, or where one is no plain LoRA."""
    if not hasattr(linear, "lora_A") or linear.disable_adapters or linear.merged:
        return []
    active: list[str] = linear.active_adapters
    return list(active) if all(is_plain(linear, name) for name in active) else []


def is_plain(linear: Any, name: str) -> bool:
    """Whether an adapter of a PEFT layer is an update s B A and nothing more."""
    return name in linear.lora_A and name not in linear.lora_variant and not linear.lora_bias[name]


def drops(dropout: Any) -> bool:
    """Whether PEFT's dropout of an adapter changes what it is given now."""
    return dropout.training and getattr(dropout, "p", 0.0) > 0


def _adapters(linears: list[Any]) -> list[Adapter]:
    found: list[Adapter] = []
    output = rank = 0
    for linear in linears:
        outputs = slice(output, output + base_of(linear).out_features)
        output = outputs.stop
        for name in adapters_in_use(linear):
            down, up = linear.lora_A[name].weight, linear.lora_B[name].weight
            ranks = slice(rank, rank + down.shape[0])
            rank = ranks.stop
            found.append(Adapter(down, up, float(linear.scaling[name]), outputs, ranks))
    return found


def _up_to(value: int, multiple: int) -> int:
    return -(-max(value, 1) // multiple) * multiple


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b with the result in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _quantise(weight_KW: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """e4m3 [K, W + border] with a zero border, and the scale of each row as [1, K]."""
    scale_K = weight_KW.abs().amax(1).float().clamp_min_(1e-12).mul_(HEADROOM / LARGEST)
    cast_KW = weight_KW.new_zeros(weight_KW.shape[0], weight_KW.shape[1] + border, dtype=torch.float8_e4m3fn)
    _into(cast_KW[:, : weight_KW.shape[1]], weight_KW.float() / scale_K[:, None])
    return cast_KW, scale_K[None]


def _into(target: Tensor, value: Tensor) -> None:
    target.copy_(value.clamp_(-LARGEST, LARGEST).to(target.dtype))


def _give_up(linear: nn.Linear, cast_OI: Tensor, scale_O: Tensor) -> None:
    """Frees the layer's weight; its own forward, where nothing faster serves, makes it again each time."""

    def forward(x: Tensor) -> Tensor:
        weight_OI = (cast_OI.float() * scale_O[:, None]).to(torch.bfloat16)
        return nn.functional.linear(x, weight_OI.to(x.dtype), linear.bias)

    linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    cast(Any, linear).forward = forward
