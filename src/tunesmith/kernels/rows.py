"""Bordered rows, as kernels write and products read them (see `bordered`), and how a layer hands them to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class Rows:
    """N rows of D values and a border of P: `wide_NW` in bfloat16; in fp8 `cast_NW` and `scale_N1`, or None."""

    wide_NW: Tensor
    cast_NW: Tensor | None = None
    scale_N1: Tensor | None = None

    @staticmethod
    def empty(count: int, width: int, like: Tensor, fp8: bool) -> Rows:
        wide_NW = torch.empty(count, width, dtype=torch.bfloat16, device=like.device)
        if not fp8:
            return Rows(wide_NW)
        cast_NW = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=like.device)
        return Rows(wide_NW, cast_NW, torch.empty(count, 1, dtype=torch.float32, device=like.device))

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of a kernel; where there is no cast, the first stands in and is not touched."""
        if self.cast_NW is None or self.scale_N1 is None:
            return self.wide_NW, self.wide_NW, self.wide_NW
        return self.wide_NW, self.cast_NW, self.scale_N1


_handed_on: list[StorageWeakRef] = []  # no other storage can have its address while this refers to it


def in_rows(x_ND: Tensor) -> Tensor:
    """`x` with the values of a row beside each other, as every kernel reads them."""
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def hand_on(rows: Rows, width: int) -> Tensor:
    """The first `width` values of each row, for whoever may find the border behind them again by `taken_over`."""
    _handed_on[:] = [StorageWeakRef(rows.wide_NW.untyped_storage())]
    return rows.wide_NW[:, :width]


def taken_over(x_ND: Tensor, border: int) -> Rows | None:
    """The rows of which `x` is the part that was last handed on, if their border is as wide; else None."""
    count, width = x_ND.shape
    whole = count, width + border
    laid = x_ND.stride() == (whole[1], 1) and x_ND.storage_offset() == 0 and x_ND.dtype == torch.bfloat16
    if not laid or [StorageWeakRef(x_ND.untyped_storage())] != _handed_on:
        return None
    return Rows(x_ND.as_strided(whole, (whole[1], 1)))
