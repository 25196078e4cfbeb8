"""Adapters entered into their borders by one kernel against one entry after the other, on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.kernels.bordered import Entry

pytestmark = pytest.mark.gpu

LONG, PLACES = 700, 96


def _entries(dtype: torch.dtype, cast: bool) -> list[Entry]:
    """Two parameters of unlike shape; the first's places are transposed, as a weight for the backward is."""
    found: list[Entry] = []
    for shape, factor in (((16, LONG), 2.0), ((LONG, 8), 0.3)):
        lies = shape[1] == LONG
        source = nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype))
        whole = torch.zeros(LONG, PLACES, device="cuda", dtype=torch.bfloat16)
        eighth = torch.zeros(LONG, PLACES, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.rand(LONG, 1, device="cuda") + 0.001
        target, place = (whole[:, 3:19].T, eighth[:, 32:48].T) if lies else (whole[:, 40:48], eighth[:, 8:16])
        laid = (scale.T if lies else scale).expand(shape)
        found.append(Entry(source, factor, target, place, laid, 4.0) if cast else Entry(source, factor, target))
    return found


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_enters_what_entries_enter_one_by_one(dtype: torch.dtype, cast: bool) -> None:
    from tunesmith.kernels.triton_entries import Entering, serves

    entries = _entries(dtype, cast)
    assert serves(entries)
    enter = Entering(entries)
    for _ in range(2):
        enter()
        found = [(e.target.clone(), None if e.cast is None else e.cast.float()) for e in entries]
        with torch.no_grad():
            for entry in entries:
                entry.target.zero_()
                entry.enter()
        for entry, (target, eighth) in zip(entries, found, strict=True):
            assert torch.equal(entry.target, target)
            if entry.cast is not None and eighth is not None:
                assert torch.equal(entry.cast.float(), eighth)
        entries[0].source.data = torch.randn_like(entries[0].source)  # moved: the table is written again
        entries[1].source.data.normal_()


def test_sources_of_two_dtypes_are_not_served() -> None:
    from tunesmith.kernels.triton_entries import serves

    assert not serves([*_entries(torch.float32, False), *_entries(torch.bfloat16, False)])
