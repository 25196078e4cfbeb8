"""Row-wise Triton kernels of a decoder layer: each writes what the next matrix product reads, cast included.

Products read "bordered" rows: the D values of a row and P more, where a layer's low-rank part goes
(see `bordered`). Every kernel here writes bfloat16 rows with a zero border, and for products in fp8 also
the row in e4m3 with its own scale, so that no tensor is read again only to be cast.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.rows import Rows, in_rows

# The largest value of a row is cast to this: e4m3 goes to 448, and the border may be twice as large as the row.
ROW_TOP = tl.constexpr(224.0)
LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)


def normalise(
    x_ND: Tensor,
    weight_D: Tensor,
    epsilon: float,
    out: Rows,
    added_ND: Tensor | None = None,
    copy_ND: Tensor | None = None,
) -> Tensor | None:
    """RMS norm of x (+ added) into `out` (Zhang and Sennrich 2019, arXiv 1910.07467); returns x + added.

    Rounded as transformers rounds: x / rms to bfloat16, then times w. `copy`, where given, gets x + added too.
    """
    count, width = x_ND.shape
    sum_ND = None if added_ND is None else torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    _normalise[(count,)](
        x_ND,
        x_ND if added_ND is None else added_ND,
        x_ND if sum_ND is None else sum_ND,
        x_ND if copy_ND is None else copy_ND,
        weight_D,
        *out.pointers(),
        x_ND.stride(0),
        0 if added_ND is None else added_ND.stride(0),
        out.wide_NW.shape[1],
        width,
        epsilon,
        ADD=added_ND is not None,
        COPY=copy_ND is not None,
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width >= 2048 else 4,
    )
    return sum_ND


def normalise_backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, epsilon: float, residual_ND: Tensor | None, out: Rows
) -> None:
    """(residual +) dx into `out`: dx = r (g - x r^2 mean(g x)) with g = w dy and r = 1 / rms."""
    count, width = x_ND.shape
    _normalise_backward[(count,)](
        grad_ND,
        x_ND,
        weight_D,
        x_ND if residual_ND is None else residual_ND,
        *out.pointers(),
        grad_ND.stride(0),
        x_ND.stride(0),
        0 if residual_ND is None else residual_ND.stride(0),
        out.wide_NW.shape[1],
        width,
        epsilon,
        ADD=residual_ND is not None,
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width >= 2048 else 4,
    )


def lay(x_ND: Tensor, out: Rows) -> None:
    """Rows of x into `out` as they are."""
    count, width = x_ND.shape
    _lay[(count,)](
        x_ND,
        *out.pointers(),
        x_ND.stride(0),
        out.wide_NW.shape[1],
        width,
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width >= 2048 else 4,
    )


def cast_border(rows: Rows, width: int, used: int, factor: float) -> None:
    """The border's first `used` values times `factor` into e4m3, by their row's scale; saturating."""
    assert rows.cast_NW is not None
    count, whole = rows.wide_NW.shape
    block = 64
    _cast_border[(triton.cdiv(count, block),)](
        *rows.pointers(), whole, width, used, count, factor, ROWS=block, BLOCK=triton.next_power_of_2(used), num_warps=4
    )


def rotate(qkv_NX: Tensor, cos_ND: Tensor, sin_ND: Tensor, heads: int, width: int) -> None:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) onto the first `heads` heads of each row, in place."""
    count = cos_ND.shape[0]
    _rotate[(count,)](
        qkv_NX,
        cos_ND,
        sin_ND,
        qkv_NX.stride(0),
        cos_ND.stride(0),
        heads,
        HALF=width // 2,
        HEADS=triton.next_power_of_2(heads),
        num_warps=4,
    )


def rotate_backward(
    grads: tuple[Tensor, Tensor, Tensor], cos_ND: Tensor, sin_ND: Tensor, out: Rows, width: int
) -> None:
    """Gradients of queries, keys and values [heads, N, width] -> those of their projections, side by side in `out`."""
    q, k, v = map(in_rows, grads)
    count = cos_ND.shape[0]
    _rotate_backward[(count,)](
        q,
        k,
        v,
        cos_ND,
        sin_ND,
        *out.pointers(),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos_ND.stride(0),
        out.wide_NW.shape[1],
        q.shape[0],
        k.shape[0],
        HALF=width // 2,
        Q_HEADS=triton.next_power_of_2(q.shape[0]),
        K_HEADS=triton.next_power_of_2(k.shape[0]),
        FP8=out.cast_NW is not None,
        BORDER=out.wide_NW.shape[1] - (q.shape[0] + 2 * k.shape[0]) * width,
        num_warps=8,
    )


@triton.jit
def to_e4m3(value, scale):
    return tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST).to(tl.float8e4nv)


@triton.jit
def _store_row(
    wide_ptr,
    cast_ptr,
    scale_ptr,
    row,
    stride,
    width,
    value,
    FP8: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole row held by one program: bfloat16, a zero border, and e4m3 by the row's largest value."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * stride + column
    rounded = value.to(tl.bfloat16)
    tl.store(wide_ptr + at, rounded, mask=inside)
    if BORDER:
        edge = row * stride + width + tl.arange(0, BORDER)
        tl.store(wide_ptr + edge, tl.zeros((BORDER,), tl.bfloat16))
    if FP8:
        exact = rounded.to(tl.float32)
        scale = tl.maximum(tl.max(tl.where(inside, tl.abs(exact), 0.0), 0), TINY) / ROW_TOP
        tl.store(scale_ptr + row, scale)
        tl.store(cast_ptr + at, to_e4m3(exact, scale), mask=inside)
        tl.store(cast_ptr + edge, tl.zeros((BORDER,), tl.float32).to(tl.float8e4nv))


@triton.jit
def _normalise(
    x_ptr, added_ptr, sum_ptr, copy_ptr, weight_ptr, wide_ptr, cast_ptr, scale_ptr,
    x_stride, added_stride, stride, width, epsilon,
    ADD: tl.constexpr, COPY: tl.constexpr, FP8: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(added_ptr + row * added_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(tl.bfloat16).to(tl.float32)
        tl.store(sum_ptr + row * width + column, x.to(tl.bfloat16), mask=inside)
        if COPY:
            tl.store(copy_ptr + row * width + column, x.to(tl.bfloat16), mask=inside)
    rate = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    value = (x * rate).to(tl.bfloat16).to(tl.float32) * weight
    _store_row(wide_ptr, cast_ptr, scale_ptr, row, stride, width, value, FP8, BORDER, BLOCK)


@triton.jit
def _normalise_backward(
    grad_ptr, x_ptr, weight_ptr, residual_ptr, wide_ptr, cast_ptr, scale_ptr,
    grad_stride, x_stride, residual_stride, stride, width, epsilon,
    ADD: tl.constexpr, FP8: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) * weight
    rate = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
    along = tl.sum(grad * x, 0) / width * rate * rate
    value = rate * (grad - x * along)
    if ADD:
        value += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(wide_ptr, cast_ptr, scale_ptr, row, stride, width, value, FP8, BORDER, BLOCK)


@triton.jit
def _lay(
    x_ptr, wide_ptr, cast_ptr, scale_ptr, x_stride, stride, width,
    FP8: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    _store_row(wide_ptr, cast_ptr, scale_ptr, row, stride, width, value, FP8, BORDER, BLOCK)


@triton.jit
def _cast_border(
    wide_ptr, cast_ptr, scale_ptr, stride, width, used, count, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < used)[None, :]
    at = row[:, None] * stride + width + column[None, :]
    scale = tl.load(scale_ptr + row, mask=row < count, other=1.0)
    value = tl.load(wide_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(cast_ptr + at, to_e4m3(value, scale[:, None]), mask=inside)


@triton.jit
def _rotate(qkv_ptr, cos_ptr, sin_ptr, stride, angle_stride, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + row * angle_stride + column).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * angle_stride + column).to(tl.float32)[None, :]
    at = qkv_ptr + row * stride + head[:, None] * (2 * HALF) + column[None, :]
    inside = (head < heads)[:, None]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(tl.bfloat16), mask=inside)
    tl.store(at + HALF, (second * cos + first * sin).to(tl.bfloat16), mask=inside)


@triton.jit
def _largest(first, second):
    return tl.max(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1), 0)


@triton.jit
def _load_halves(ptr, head_stride, row_stride, row, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    head = tl.arange(0, HEADS)
    at = ptr + head[:, None].to(tl.int64) * head_stride + row * row_stride + tl.arange(0, HALF)[None, :]
    inside = (head < heads)[:, None]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(ptr, first, second, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    head = tl.arange(0, HEADS)
    at = ptr + head[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    inside = (head < heads)[:, None]
    tl.store(at, first, mask=inside)
    tl.store(at + HALF, second, mask=inside)


@triton.jit
def _rotate_backward(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, wide_ptr, cast_ptr, scale_ptr,
    q_head, q_row, k_head, k_row, v_head, v_row, angle_stride, stride, q_heads, k_heads,
    HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, FP8: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + row * angle_stride + column).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * angle_stride + column).to(tl.float32)[None, :]
    q1, q2 = _load_halves(q_ptr, q_head, q_row, row, q_heads, HALF, Q_HEADS)
    k1, k2 = _load_halves(k_ptr, k_head, k_row, row, k_heads, HALF, K_HEADS)
    v1, v2 = _load_halves(v_ptr, v_head, v_row, row, k_heads, HALF, K_HEADS)
    a1 = (q1 * cos + q2 * sin).to(tl.bfloat16)
    a2 = (q2 * cos - q1 * sin).to(tl.bfloat16)
    b1 = (k1 * cos + k2 * sin).to(tl.bfloat16)
    b2 = (k2 * cos - k1 * sin).to(tl.bfloat16)
    k_at = q_heads * 2 * HALF
    v_at = k_at + k_heads * 2 * HALF
    end = v_at + k_heads * 2 * HALF
    out = wide_ptr + row * stride
    _store_halves(out, a1, a2, q_heads, HALF, Q_HEADS)
    _store_halves(out + k_at, b1, b2, k_heads, HALF, K_HEADS)
    _store_halves(out + v_at, v1.to(tl.bfloat16), v2.to(tl.bfloat16), k_heads, HALF, K_HEADS)
    edge = tl.arange(0, BORDER)
    tl.store(out + end + edge, tl.zeros((BORDER,), tl.bfloat16))
    if FP8:
        a1, a2, b1, b2 = a1.to(tl.float32), a2.to(tl.float32), b1.to(tl.float32), b2.to(tl.float32)
        top = tl.maximum(tl.maximum(_largest(a1, a2), _largest(b1, b2)), _largest(v1, v2))
        scale = tl.maximum(top, TINY) / ROW_TOP
        tl.store(scale_ptr + row, scale)
        cast = cast_ptr + row * stride
        _store_halves(cast, to_e4m3(a1, scale), to_e4m3(a2, scale), q_heads, HALF, Q_HEADS)
        _store_halves(cast + k_at, to_e4m3(b1, scale), to_e4m3(b2, scale), k_heads, HALF, K_HEADS)
        _store_halves(cast + v_at, to_e4m3(v1, scale), to_e4m3(v2, scale), k_heads, HALF, K_HEADS)
        tl.store(cast + end + edge, tl.zeros((BORDER,), tl.float32).to(tl.float8e4nv))
