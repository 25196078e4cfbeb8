"""Softmax of logits as a Triton kernel: a target's log-probability and its gradient in two reads of each row."""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def logprob_and_slope(logits_RV: Tensor, target_R: Tensor, logprob_R: Tensor, slope_RV: Tensor | None) -> None:
    """Writes log softmax(z)[target] and, unless None, d logprob / d z = onehot - softmax(z) in slope's dtype.

    The target's own slope, the small rest 1 - p of a confident token, is rounded only at the end.
    """
    rows, vocabulary = logits_RV.shape
    _softmax[(rows,)](
        logits_RV,
        target_R,
        logprob_R,
        logits_RV if slope_RV is None else slope_RV,
        logits_RV.stride(0),
        0 if slope_RV is None else slope_RV.stride(0),
        vocabulary,
        SLOPE=slope_RV is not None,
        BLOCK=min(8192, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )


@triton.jit
def _softmax(
    logits_ptr,
    target_ptr,
    logprob_ptr,
    slope_ptr,
    stride,
    slope_stride,
    width: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    at = logits_ptr + row * stride
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(at + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, z)
        # A lane that has seen nothing but -inf keeps a total of 0.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - safe) + tl.exp(z - safe)
        maximum = higher
    top = tl.max(maximum, 0)
    total = tl.sum(total * tl.exp(maximum - top), 0)
    z_target = tl.load(at + target).to(tl.float32)
    tl.store(logprob_ptr + row, z_target - top - tl.log(total))
    if SLOPE:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            z = tl.load(at + column, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(column == target, 1.0, 0.0) - tl.exp(z - top) / total
            tl.store(slope_ptr + row * slope_stride + column, slope.to(slope_ptr.dtype.element_ty), mask=inside)
