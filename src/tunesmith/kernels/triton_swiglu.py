"""SwiGLU by row as Triton kernels: both passes, casts for products in fp8 included; see `triton_rows`."""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.rows import Rows
from tunesmith.kernels.triton_rows import ROW_TOP, TINY, to_e4m3


def swiglu(gate_up_NX: Tensor, out: Rows) -> None:
    """silu(gate) * up into `out` (Shazeer 2020, arXiv 2002.05202); gate and up lie side by side."""
    count, width = gate_up_NX.shape[0], gate_up_NX.shape[1] // 2
    _swiglu[(count,)](
        gate_up_NX,
        *out.pointers(),
        gate_up_NX.stride(0),
        out.wide_NW.shape[1],
        width,
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - width,
        BLOCK=min(4096, triton.next_power_of_2(width)),
        num_warps=16 if out.cast_NW is not None else 8,
    )


def swiglu_backward(grad_NF: Tensor, gate_up_NX: Tensor, out: Rows) -> None:
    """Gradients of gate and up, side by side in `out`."""
    count, width = grad_NF.shape
    _swiglu_backward[(count,)](
        grad_NF,
        gate_up_NX,
        *out.pointers(),
        grad_NF.stride(0),
        gate_up_NX.stride(0),
        out.wide_NW.shape[1],
        width,
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - 2 * width,
        BLOCK=min(4096 if out.cast_NW is not None else 2048, triton.next_power_of_2(width)),
        num_warps=16 if out.cast_NW is not None else 8,
    )


@triton.jit
def _cast_row(
    wide_ptr, cast_ptr, scale_ptr, row, stride, width: tl.constexpr, top, BORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """Casts a row that this program has just written, block by block as it wrote it."""
    scale = tl.maximum(top, TINY) / ROW_TOP
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(wide_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(cast_ptr + row * stride + column, to_e4m3(value, scale), mask=inside)
    edge = row * stride + width + tl.arange(0, BORDER)
    tl.store(cast_ptr + edge, tl.zeros((BORDER,), tl.float32).to(tl.float8e4nv))


@triton.jit
def _swiglu(
    x_ptr, wide_ptr, cast_ptr, scale_ptr, x_stride, stride, width: tl.constexpr,
    FP8: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0).to(tl.float32)
        value = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32) * up
        rounded = value.to(tl.bfloat16)
        tl.store(wide_ptr + row * stride + column, rounded, mask=inside)
        top = tl.maximum(top, tl.abs(rounded.to(tl.float32)))
    tl.store(wide_ptr + row * stride + width + tl.arange(0, BORDER), tl.zeros((BORDER,), tl.bfloat16))
    if FP8:
        _cast_row(wide_ptr, cast_ptr, scale_ptr, row, stride, width, tl.max(top, 0), BORDER, BLOCK)


@triton.jit
def _swiglu_backward(
    grad_ptr, x_ptr, wide_ptr, cast_ptr, scale_ptr, grad_stride, x_stride, stride, width: tl.constexpr,
    FP8: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        d_up = (grad * gate * share).to(tl.bfloat16)
        d_gate = (grad * up * share * (1.0 + gate * (1.0 - share))).to(tl.bfloat16)
        tl.store(wide_ptr + row * stride + column, d_gate, mask=inside)
        tl.store(wide_ptr + row * stride + width + column, d_up, mask=inside)
        top = tl.maximum(top, tl.maximum(tl.abs(d_gate.to(tl.float32)), tl.abs(d_up.to(tl.float32))))
    tl.store(wide_ptr + row * stride + 2 * width + tl.arange(0, BORDER), tl.zeros((BORDER,), tl.bfloat16))
    if FP8:
        # The two halves are cast apart, so that each thread reads what it wrote itself.
        scale = tl.maximum(tl.max(top, 0), TINY) / ROW_TOP
        tl.store(scale_ptr + row, scale)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * stride + column
            first = tl.load(wide_ptr + at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(wide_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
            tl.store(cast_ptr + at, to_e4m3(first, scale), mask=inside)
            tl.store(cast_ptr + at + width, to_e4m3(second, scale), mask=inside)
        edge = row * stride + 2 * width + tl.arange(0, BORDER)
        tl.store(cast_ptr + edge, tl.zeros((BORDER,), tl.float32).to(tl.float8e4nv))
