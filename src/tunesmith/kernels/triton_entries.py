"""Adapters into their borders: every entry of a decoder layer in one Triton kernel, in place of three launches each.

A Llama-3.1-8B layer has 14 entries; see `bordered.Entry` for what one is. On an H100 they take 12 us a layer in this
kernel (33 with the casts of fp8), and 740 launches a step are spared.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.bordered import Entry
from tunesmith.kernels.triton_rows import to_e4m3

BLOCK = 1024


class Entering:
    """Copies all `entries`, whose addresses and strides lie on the device; asked for again when a parameter moves."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._sources: list[int] = []
        self._table_EK: Tensor | None = None
        self._factor_E2: Tensor | None = None

    def __call__(self) -> None:
        if not self._entries:
            return
        sources = [entry.source.data_ptr() for entry in self._entries]
        if sources != self._sources:
            self._write(sources)
        first = self._entries[0].source
        largest = max(entry.source.numel() for entry in self._entries)
        _enter[(triton.cdiv(largest, BLOCK), len(sources))](
            self._table_EK,
            self._factor_E2,
            HALF=first.dtype != torch.float32,
            FP8=self._entries[0].cast is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )

    def _write(self, sources: list[int]) -> None:
        rows = []
        for entry in self._entries:
            cast, scale = (entry.target if x is None else x for x in (entry.cast, entry.scale))
            laid = [(x.data_ptr(), *x.stride()) for x in (entry.target, cast, scale)]
            rows.append([entry.source.data_ptr(), *entry.source.shape, *(value for x in laid for value in x)])
        device = self._entries[0].source.device
        self._table_EK = torch.tensor(rows, device=device)
        self._factor_E2 = torch.tensor([[e.factor, e.fold] for e in self._entries], device=device)
        self._sources = sources


def serves(entries: Sequence[Entry]) -> bool:
    """Sources in one dtype, row after row."""
    dtypes = {entry.source.dtype for entry in entries}
    one = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}
    return one and all(entry.source.is_contiguous() for entry in entries)


@triton.jit
def _enter(table_ptr, factor_ptr, HALF: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    entry = table_ptr + tl.program_id(1) * 12
    rows, columns = tl.load(entry + 1), tl.load(entry + 2)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * columns
    row, column = at // columns, at % columns
    source = tl.load(entry).to(tl.pointer_type(tl.bfloat16 if HALF else tl.float32))
    factor = factor_ptr + tl.program_id(1) * 2
    # A factor in the source's own precision, as torch multiplies.
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    rounded = value.to(tl.bfloat16)
    target = tl.load(entry + 3).to(tl.pointer_type(tl.bfloat16))
    tl.store(target + row * tl.load(entry + 4) + column * tl.load(entry + 5), rounded, mask=inside)
    if FP8:
        cast = tl.load(entry + 6).to(tl.pointer_type(tl.float8e4nv))
        scale = tl.load(entry + 9).to(tl.pointer_type(tl.float32))
        scale = tl.load(scale + row * tl.load(entry + 10) + column * tl.load(entry + 11), mask=inside, other=1.0)
        folded = rounded.to(tl.float32) * tl.load(factor + 1)
        place = row * tl.load(entry + 7) + column * tl.load(entry + 8)
        tl.store(cast + place, to_e4m3(folded, scale), mask=inside)
