"""LoRA's products with a narrow side, as Triton kernels that read each input and each gradient once; see `bordered`.

A layer's gradients dy [N, O] are wanted for two of them: dy B, which goes into the border of dy, and dB = dy' (x A').
One pass gives both: a program takes a chunk of columns and a group of rows, and keeps its share of dB while it writes
its share of dy B. The shares are added afterwards in a fixed order, dB and dA straight into the memory that becomes
the parameters' `.grad`. Letters as in `bordered`, and C chunks, S groups of rows, Q ranks up to a power of two.

On an H200, 8,192 rows of a Llama-3.1-8B layer at rank 16: 490 us by the profiler of a step. By cuBLAS, each weight's
products and what goes around them timed alone, 616: another way to measure, so the gain is no more than about 0.1 ms.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.rows import Rows
from tunesmith.kernels.triton_rows import to_e4m3

if TYPE_CHECKING:
    from tunesmith.kernels.bordered import Adapter

WORTH = 2**24  # values of a gradient: below, launches take longer than the bytes do
LARGEST_RANK = 64  # of all adapters of a weight: beyond, the products are not thin
COLUMNS, ROWS, STAGES, WARPS = 256, 64, 3, 4
PROGRAMS = 2  # of a multiprocessor, that a pass is cut into
ADDED = 4096  # values that a program adds up


def serves(adapters: Sequence[Adapter]) -> bool:
    """Adapters of one rank, one a projection, few ranks in all; all in pieces that a thread loads at once."""
    ranks = [a.down_RI.shape[0] for a in adapters]
    apart = all(a.outputs.stop <= b.outputs.start for a, b in pairwise(adapters))
    even = all(value % 16 == 0 for a in adapters for value in (a.outputs.start, a.outputs.stop, a.down_RI.shape[1]))
    return len(set(ranks)) == 1 and ranks[0] % 8 == 0 and sum(ranks) <= LARGEST_RANK and apart and even


class LowRank:
    """What the adapters of one bordered weight [O, I] learn from a pass; see the module."""

    def __init__(self, adapters: Sequence[Adapter], outputs: int, inputs: int) -> None:
        device = adapters[0].down_RI.device
        self._adapters, self._outputs, self._inputs = adapters, outputs, inputs
        self._rank = adapters[0].down_RI.shape[0]
        chunks: list[tuple[int, int, int]] = []  # first column, the one behind the last, first rank
        joins: list[tuple[int, int, int]] = []  # first chunk, the one behind the last, first rank
        for a in adapters:
            before = len(chunks)
            chunks += _cut(a.outputs, a.ranks.start)
            joins.append((before, len(chunks), a.ranks.start))
        self._chunks_C3, self._joins_A3, self._inputs_C3 = (
            torch.tensor(table, dtype=torch.int32, device=device)
            for table in (chunks, joins, _cut(slice(0, inputs), 0))
        )
        self._scaling_R = torch.tensor([a.scaling for a in adapters for _ in range(self._rank)], device=device)
        self._most = triton.next_power_of_2(max(stop - start for start, stop, _ in joins))  # chunks of an adapter

    def is_worth(self, rows: Rows) -> bool:
        """Whether there are so many rows that the kernels win."""
        return rows.wide_NW.numel() >= WORTH

    def gradients(self, grad: Rows, x: Rows, up_OP: Tensor) -> list[Tensor]:
        """Gradients of A and B, adapter by adapter, in float32; fills the border of grad, in fp8 its cast too."""
        count, ranks = len(grad.wide_NW), len(self._scaling_R)
        low_NR, grad_low_NR = x.wide_NW[:, self._inputs :], grad.wide_NW[:, self._outputs :]
        sums_CNQ = low_NR.new_empty(len(self._chunks_C3), count, _ranks(self._rank), dtype=torch.float32)
        ups_SOQ = _pass(grad.wide_NW, self._outputs, low_NR, self._rank, self._chunks_C3, up_OP, sums_CNQ)
        self._join(sums_CNQ, grad)
        del sums_CNQ  # a tenth of grad
        downs_SIQ = _pass(x.wide_NW, self._inputs, grad_low_NR, ranks, self._inputs_C3)
        up_OR, down_RI = ups_SOQ.new_empty(self._outputs, self._rank), ups_SOQ.new_empty(ranks, self._inputs)
        self._add(ups_SOQ, downs_SIQ, up_OR, down_RI)
        return [part for a in self._adapters for part in (down_RI[a.ranks], up_OR[a.outputs])]

    def _join(self, sums_CNQ: Tensor, grad: Rows) -> None:
        _, count, padded = sums_CNQ.shape
        block = ADDED // self._most
        _join[(triton.cdiv(count * padded, block), len(self._adapters))](
            sums_CNQ,
            *grad.pointers(),
            self._joins_A3,
            grad.wide_NW.stride(0),
            count,
            self._outputs,
            self._rank,
            FP8=grad.cast_NW is not None,
            RANKS=padded,
            CHUNKS=self._most,
            BLOCK=block,
            num_warps=4,
        )

    def _add(self, ups_SOQ: Tensor, downs_SIQ: Tensor, up_OR: Tensor, down_RI: Tensor) -> None:
        shares = ups_SOQ, downs_SIQ
        groups = [triton.next_power_of_2(len(each)) for each in shares]
        programs = [triton.cdiv(each[0].numel(), ADDED // size) for each, size in zip(shares, groups, strict=True)]
        _add[(sum(programs),)](
            *shares,
            up_OR,
            down_RI,
            self._scaling_R,
            programs[0],
            *(len(each) for each in shares),
            self._outputs,
            self._inputs,
            self._rank,
            len(self._scaling_R),
            UP_GROUPS=groups[0],
            DOWN_GROUPS=groups[1],
            UP_RANKS=ups_SOQ.shape[2],
            DOWN_RANKS=downs_SIQ.shape[2],
            SIZE=ADDED,
            num_warps=4,
        )


def _cut(columns: slice, rank: int) -> list[tuple[int, int, int]]:
    return [(at, min(at + COLUMNS, columns.stop), rank) for at in range(columns.start, columns.stop, COLUMNS)]


def _ranks(ranks: int) -> int:
    return max(16, triton.next_power_of_2(ranks))


def _pass(
    rows_NW: Tensor,
    width: int,
    low_NR: Tensor,
    ranks: int,
    chunks_C3: Tensor,
    up_WP: Tensor | None = None,
    sums_CNQ: Tensor | None = None,
) -> Tensor:
    """Shares [S, W, Q] of rows' low, of `ranks` columns of low; with `up`, shares of rows up as well."""
    count, chunks = len(rows_NW), len(chunks_C3)
    slots = PROGRAMS * torch.cuda.get_device_properties(rows_NW.device).multi_processor_count
    each = triton.cdiv(triton.cdiv(count, max(1, slots // chunks)), ROWS) * ROWS
    groups = triton.cdiv(count, each)
    shares_SWQ = rows_NW.new_empty(groups, width, _ranks(ranks), dtype=torch.float32)
    _gather[(chunks, groups)](
        rows_NW,
        low_NR,
        low_NR if up_WP is None else up_WP,
        chunks_C3,
        shares_SWQ if sums_CNQ is None else sums_CNQ,
        shares_SWQ,
        rows_NW.stride(0),
        low_NR.stride(0),
        0 if up_WP is None else up_WP.stride(0),
        count,
        each,
        width,
        ranks,
        SUMS=up_WP is not None,
        RANKS=_ranks(ranks),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return shares_SWQ


@triton.jit(do_not_specialize=["count", "each", "ranks"])
def _gather(
    rows_ptr, low_ptr, up_ptr, chunk_ptr, sums_ptr, shares_ptr, stride, low_stride, up_stride,
    count, each, width, ranks,
    SUMS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk, group = tl.program_id(0), tl.program_id(1)
    entry = chunk_ptr + 3 * chunk
    first = tl.multiple_of(tl.load(entry + 2), 8)
    column = tl.multiple_of(tl.load(entry), 16) + tl.arange(0, COLUMNS)
    inside = column < tl.multiple_of(tl.load(entry + 1), 16)
    rank = tl.arange(0, RANKS)
    used = (rank < ranks)[None, :]
    if SUMS:
        up = tl.load(up_ptr + column[:, None] * up_stride + first + rank[None, :], inside[:, None] & used, other=0.0)
    share = tl.zeros((COLUMNS, RANKS), tl.float32)
    begin = group * each
    for at in tl.range(begin, tl.minimum(begin + each, count), ROWS, num_stages=STAGES):
        row = at + tl.arange(0, ROWS).to(tl.int64)
        here = (row < count)[:, None]
        x = tl.load(rows_ptr + row[:, None] * stride + column[None, :], mask=here & inside[None, :], other=0.0)
        low = tl.load(low_ptr + row[:, None] * low_stride + first + rank[None, :], mask=here & used, other=0.0)
        if SUMS:
            place = (chunk.to(tl.int64) * count + row[:, None]) * RANKS + rank[None, :]
            tl.store(sums_ptr + place, tl.dot(x, up), mask=here)
        share = tl.dot(tl.trans(x), low, share)
    place = (group.to(tl.int64) * width + column[:, None]) * RANKS + rank[None, :]
    tl.store(shares_ptr + place, share, mask=inside[:, None])


@triton.jit(do_not_specialize=["count"])
def _join(
    sums_ptr, wide_ptr, cast_ptr, scale_ptr, join_ptr, stride, count, width, ranks,
    FP8: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    join = join_ptr + 3 * tl.program_id(1)
    begin, end = tl.load(join), tl.load(join + 1)
    low, row, rank, used = _summed(sums_ptr, tl.program_id(0), begin, end, count, ranks, RANKS, CHUNKS, BLOCK)
    at = row * stride + width + tl.load(join + 2) + rank
    rounded = low.to(wide_ptr.dtype.element_ty)
    tl.store(wide_ptr + at, rounded, mask=used)
    if FP8:
        scale = tl.load(scale_ptr + row, mask=used, other=1.0)
        tl.store(cast_ptr + at, to_e4m3(rounded.to(tl.float32), scale), mask=used)


@triton.jit(do_not_specialize=["up_programs", "up_groups", "down_groups"])
def _add(
    ups_ptr, downs_ptr, up_ptr, down_ptr, scaling_ptr, up_programs, up_groups, down_groups,
    outputs, inputs, rank, ranks,
    UP_GROUPS: tl.constexpr, DOWN_GROUPS: tl.constexpr, UP_RANKS: tl.constexpr, DOWN_RANKS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < up_programs:  # a name has one type, so the two have names of their own
        up, output, up_rank, up_used = _summed(
            ups_ptr, program, 0, up_groups, outputs, rank, UP_RANKS, UP_GROUPS, SIZE // UP_GROUPS
        )
        tl.store(up_ptr + output * rank + up_rank, up, mask=up_used)
    else:
        down, input, down_rank, down_used = _summed(
            downs_ptr,
            program - up_programs,
            0,
            down_groups,
            inputs,
            ranks,
            DOWN_RANKS,
            DOWN_GROUPS,
            SIZE // DOWN_GROUPS,
        )
        scaling = tl.load(scaling_ptr + down_rank, mask=down_used, other=0.0)
        tl.store(down_ptr + down_rank * inputs + input, down * scaling, mask=down_used)


@triton.jit
def _summed(
    ptr, program, begin, end, count, ranks, RANKS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of the sum of shares [begin to end, count, RANKS]: values, their rows and ranks, and which are there."""
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = begin + tl.arange(0, SHARES)
    row, rank = at // RANKS, at % RANKS
    used = (row < count) & (rank < ranks)
    place = share[:, None].to(tl.int64) * count * RANKS + at[None, :]
    values = tl.load(ptr + place, mask=(share < end)[:, None] & used[None, :], other=0.0)
    return tl.sum(values, 0), row, rank, used
