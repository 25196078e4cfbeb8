"""Attention over many short segments on a GPU: laid out as one padded batch, so that a layer is one call.

A call for each segment costs launches and not arithmetic. On an H100 (bfloat16, forward and backward of one layer,
benchmarks/gpu/short_segments.py): 32 messages of 8 to 60 tokens through 12 heads of 32 took 1.36 ms, each alone 10.2,
in FlexAttention 1.63 after 15.9 s of compiling; 8 chats of 100 to 300 through 9 heads of 64 took 1.54, 3.5 and 1.61 ms.
Large ones waste: 28 chats of 180 to 400 through 32 heads of 128 took 3.3 ms where FlexAttention took 1.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.transfer import sent

if TYPE_CHECKING:
    from tunesmith.kernels.attention import Bounds
    from tunesmith.kernels.cuda_attention import Look

WASTE = 4  # more padded positions than this many times the true ones, and each segment is called alone
EIGHT = 8  # a mask's rows begin where the kernels can load them


@dataclass(frozen=True, slots=True)
class Places:
    """Where segments lie: S of them, the longest L long (rounded up). `row`, `padded` [N]: from and to, flat."""

    segments: int
    longest: int
    row: Tensor
    padded: Tensor
    length_S: Tensor


def serves(bounds: Bounds) -> bool:
    """Whether one padded batch is worth it. Shared beginnings would be added up by several segments at once."""
    sizes = _sizes(bounds)
    return not bounds.shared and len(sizes) > 1 and positions(bounds) <= WASTE * (sum(sizes) + EIGHT)


def positions(bounds: Bounds) -> int:
    """How many the padded batch of these rows has."""
    sizes = _sizes(bounds)
    return len(sizes) * _rounded(max(sizes, default=0))


def attend(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, look: Look, dropout: float) -> Tensor:
    """[B, T, H, D], 0 outside every segment; for as many key heads as query heads, and rows that `serves` names.

    Every position has one place in the batch, so gradients are sums in one order.
    """
    batch, _, length, _ = query_BHTD.shape
    places = _places(look.bounds, length, query_BHTD.device)
    q, k, v = (_laid_out(x, places) for x in (query_BHTD, key_BHTD, value_BHTD))
    seen = _seen(places, look)
    if look.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, seen, dropout, seen is None, scale=look.scaling)
    else:
        out = softcapped(q, k, v, seen, look.softcap, look.scaling, dropout)
    taken = out.transpose(1, 2).reshape(-1, *out.shape[1::2]).index_select(0, places.padded)
    back = taken.new_zeros(batch * length, *taken.shape[1:]).index_copy(0, places.row, taken)
    return back.unflatten(0, (batch, length))


def softcapped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, softcap: float, scaling: float | None, dropout: float
) -> Tensor:
    """Attention with scores c * tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2); without `seen`, causal."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probabilities, dropout, training=dropout > 0) @ v


def _places(bounds: Bounds, length: int, device: torch.device) -> Places:
    """Made once for all layers."""
    made: dict[Any, Any] = bounds.made
    key = ("padded", length, device)
    if key not in made:
        spans = [(row * length + start, stop - start) for row, spans in enumerate(bounds.rows) for start, stop in spans]
        longest = _rounded(max(size for _, size in spans))
        row = torch.cat([torch.arange(start, start + size) for start, size in spans])
        padded = torch.cat([torch.arange(size) + longest * i for i, (_, size) in enumerate(spans)])
        sizes = torch.tensor([size for _, size in spans])
        made[key] = Places(len(spans), longest, *(sent(x, device) for x in (row, padded, sizes)))
    return made[key]


def _laid_out(x_BHTD: Tensor, places: Places) -> Tensor:
    """[S, H, L, D], zeros behind each segment."""
    x_NHD = x_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, places.row)
    padded = x_NHD.new_zeros(places.segments * places.longest, *x_NHD.shape[1:]).index_copy(0, places.padded, x_NHD)
    return padded.unflatten(0, (places.segments, places.longest)).transpose(1, 2)


def _seen(places: Places, look: Look) -> Tensor | None:
    """Which keys each position sees, [S or 1, 1, L, L]; None for all before it, as padding stands behind.

    Padding sees itself, so that no softmax is empty.
    """
    if look.causal and look.window is None:
        return None
    made: dict[Any, Any] = look.bounds.made
    key = ("padded mask", look.causal, look.window, places.padded.device)
    if key not in made:
        t = torch.arange(places.longest, device=places.padded.device)
        distance = t[:, None] - t[None, :]
        reach = places.longest if look.window is None else look.window
        near = ((distance >= 0) if look.causal else (distance > -reach)) & (distance < reach)
        there = t < places.length_S[:, None, None, None]
        made[key] = near[None, None] if look.causal else (near & there) | (distance == 0)
    return made[key]


def _sizes(bounds: Bounds) -> list[int]:
    return [stop - start for spans in bounds.rows for start, stop in spans]


def _rounded(size: int) -> int:
    return -(-size // EIGHT) * EIGHT
