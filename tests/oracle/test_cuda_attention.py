"""Blocks of a row that may look at each other, against every pair of positions; on CUDA, the backends' results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.kernels import cuda_attention
from tunesmith.kernels.attention import KEYWORD, Bounds, segment_attention
from tunesmith.kernels.cuda_attention import BLOCK, Look


def _bounds(lengths: list[int], gap: int, shared: int) -> Bounds:
    spans: list[tuple[int, int]] = []
    at = 0
    for index, length in enumerate(lengths):
        spans.append((at, at + length))
        at += length + (gap if index == 0 and not shared else 0)
    return Bounds([spans], shared=min(shared, lengths[0]))


def _may_look(bounds: Bounds, length: int, causal: bool, window: int | None) -> np.ndarray:
    """The definition, pair by pair: [T, T]."""
    seen = np.zeros((length, length), bool)
    for start, stop in bounds.rows[0]:
        own = [*range(bounds.prefix(start)), *range(start, stop)]
        for i, q in enumerate(own):
            if q < start:
                continue
            for j, k in enumerate(own):
                inside = i >= j if causal else True
                seen[q, k] = inside and (window is None or abs(i - j) < window)
    return seen


def _inside(bounds: Bounds, length: int) -> np.ndarray:
    return np.isin(np.arange(length), [p for start, stop in bounds.rows[0] for p in range(start, stop)])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    gap=st.integers(0, 40),
    shared=st.sampled_from([0, 0, 7, 150]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 50, 130]),
)
def test_blocks_and_pairs_are_those_of_the_definition(
    lengths: list[int], gap: int, shared: int, causal: bool, window: int | None
) -> None:
    causal = causal or shared > 0
    bounds = _bounds(lengths, gap, shared)
    last = bounds.rows[0][-1][1]
    length = -(-last // BLOCK) * BLOCK
    owner, place, opened = cuda_attention.positions(bounds, length)
    expected = _may_look(bounds, length, causal, window)
    tensors = [torch.from_numpy(x) for x in (owner, place, opened)]
    seen = cuda_attention._seen(*tensors, causal, window, shared=bool(bounds.shared))
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    zero = torch.tensor(0)
    found = np.broadcast_to(seen(zero, zero, q, k).numpy(), expected.shape)
    inside = _inside(bounds, length)
    assert np.array_equal(found[inside], expected[inside])
    assert found.diagonal().all()  # nothing is ever empty, padding neither
    expected = found
    some, every = cuda_attention.blocks(owner, place, opened, causal, window)
    tiles = expected.reshape(length // BLOCK, BLOCK, length // BLOCK, BLOCK).transpose(0, 2, 1, 3)
    assert (some[0] | ~tiles.any((2, 3))).all()
    assert (~every[0] | tiles.all((2, 3))).all()
    counts, order = cuda_attention._listed(every)
    for row in range(length // BLOCK):
        assert set(order[0, 0, row, : counts[0, 0, row]]) == set(np.flatnonzero(every[0, row]))


def test_the_backend_follows_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "_flex_is_there", lambda: True)

    def look(rows: list[list[tuple[int, int]]], length: int, **keywords: int) -> Look:
        return Look(Bounds(rows, **keywords), length, True, None, None, None)

    half = torch.bfloat16
    assert cuda_attention.backend(look([[(0, 512), (512, 1024)]], 1024), 4096, half) == "dense"
    assert cuda_attention.backend(look([[(0, 512)], [(0, 512)]], 512), 4096, half) == "dense"
    assert cuda_attention.backend(look([[(0, 500), (500, 1024)]], 1024), 4096, half) == "blocks"
    assert cuda_attention.backend(look([[(0, 512), (512, 1024)]], 1024, shared=8), 4096, half) == "blocks"
    assert cuda_attention.backend(look([[(0, 50), (50, 90)]], 90), 4096, half) == "padded"
    assert cuda_attention.backend(look([[(0, 500), (500, 1024)]], 1024), 384, half) == "padded"
    assert cuda_attention.backend(look([[(0, 50), (50, 90)]], 90, shared=8), 4096, half) == "each"
    assert cuda_attention.backend(look([[(0, 500), (500, 1024)]], 1024), 4096, torch.float32) == "padded"
    assert cuda_attention.backend(look([[(0, 512), (512, 1024)]], 1024), 4096, half, 0.1) == "padded"
    assert cuda_attention.backend(look([[(0, 1024)]], 1024), 4096, half, 0.1) == "each"
    with torch.no_grad():
        assert cuda_attention.backend(look([[(0, 500), (500, 1024)]], 1024), 4096, half) == "padded"
    assert cuda_attention.padded_length(look([[(0, 500), (500, 8100)]], 8100), 4096) == 8192
    assert {cuda_attention.padded_length(look([[(0, 5), (5, n)]], n), 4096) for n in range(4097, 8193)} == {
        5120,
        6144,
        7168,
        8192,
    }


def _both(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, **keywords: object) -> tuple[list[Tensor], list[Tensor]]:
    """Result and gradients in bfloat16 on CUDA, and in float32 on the CPU."""
    grad = torch.randn(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    sides: list[list[Tensor]] = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        own = Bounds(bounds.rows, shared=bounds.shared)
        out, _ = segment_attention(torch.nn.Module(), *inputs, None, **{KEYWORD: own}, **keywords)  # type: ignore[arg-type]
        out.backward(grad.to(device, dtype))
        sides.append([x.detach().float().cpu() for x in (out, *(x.grad for x in inputs))])  # type: ignore[union-attr]
    return sides[0], sides[1]


@pytest.mark.parametrize(
    ("length", "planned"), [(2048, True), (4096, True), (1024, False), (3000, False), (2049, False)]
)
def test_cudnn_plans_long_lengths_that_come_again(length: int, planned: bool) -> None:
    from torch.nn.attention import SDPBackend

    order = cuda_attention.order_of(length)
    assert (order[0] == SDPBackend.CUDNN_ATTENTION) is planned
    assert order[-3:] == [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.mark.gpu
@pytest.mark.parametrize("small", [0, cuda_attention.SMALL])
@pytest.mark.parametrize(
    ("lengths", "shared", "keywords"),
    [
        ([300, 300, 300], 0, {}),
        ([300, 37, 411, 160], 0, {}),
        ([300, 37, 411, 160], 20, {}),
        ([300, 37, 411, 160], 0, {"sliding_window": 100}),
        ([300, 37, 411, 160], 0, {"softcap": 3.0}),
        ([300, 37, 411, 160], 0, {"is_causal": False}),
        ([600, 500], 0, {"sliding_window": 64, "is_causal": False, "scaling": 0.2}),
    ],
)
def test_on_cuda_attention_is_that_of_the_segments(
    lengths: list[int], shared: int, keywords: dict[str, object], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, and as one padded batch where a beginning is not shared."""
    monkeypatch.setattr(cuda_attention, "SMALL", small)
    bounds = _bounds(lengths, 0, shared)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64).bfloat16().float() for heads in (4, 2, 2))
    found, expected = _both(q, k, v, bounds, **keywords)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
