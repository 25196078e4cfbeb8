"""Attention over segments: examples laid end to end in one row attend to themselves only.

Registered with transformers as the attention implementation "segments", so every family that
goes through `AttentionInterface` works unpatched. Models hand the `bounds` of their forward on to
each attention call; a call without them fails, because a missing mask contaminates silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMPLEMENTATION = "segments"
KEYWORD = "segment_bounds"  # the keyword of the model's forward that carries Bounds to attention


@dataclass(slots=True)
class Bounds:
    """Where the segments of a stream lie: for each row, (start, stop) in ascending order.

    `calls` counts attention calls that used them, so that a model which never asks is found out.
    """

    rows: list[list[tuple[int, int]]]
    calls: int = field(default=0)


def segment_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Self-attention within each segment; positions outside every segment give 0.

    Returns [B, T, H, D] as transformers expects. `sliding_window` keeps pairs at distance
    0 <= d < window (causal) or |d| < window (bidirectional).

    Raises RuntimeError without bounds, or for score biases that it does not know.
    """
    bounds = keywords.get(KEYWORD)
    if not isinstance(bounds, Bounds):
        raise RuntimeError(f"{type(module).__name__} called segment attention without {KEYWORD}")
    unknown = [name for name in ("position_bias", "s_aux") if keywords.get(name) is not None]
    if unknown or attention_mask is not None:
        raise RuntimeError(
            f"{type(module).__name__} needs {unknown or 'a mask'}, which segment attention does not apply"
        )
    bounds.calls += 1
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    if groups > 1:
        key_BKTD, value_BKTD = (x.repeat_interleave(groups, dim=1) for x in (key_BKTD, value_BKTD))

    def attend(row: int, start: int, stop: int) -> Tensor:
        q, k, v = (x[row : row + 1, :, start:stop] for x in (query_BHTD, key_BKTD, value_BKTD))
        window = sliding_window if sliding_window is not None and stop - start > sliding_window else None
        if softcap is not None:
            return _softcapped(q, k, v, causal, window, softcap, scaling, dropout)
        if window is None:
            return F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling)
        mask = _window_mask(stop - start, window, causal, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, False, scale=scaling)

    rows = [
        _lay_out([(a, b, attend(row, a, b)) for a, b in spans], query_BHTD[row : row + 1], value_BKTD.shape[-1])
        for row, spans in enumerate(bounds.rows)
    ]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).transpose(1, 2).contiguous(), None


def _lay_out(spans: list[tuple[int, int, Tensor]], query_1HTD: Tensor, width: int) -> Tensor:
    """Joins the outputs of a row's segments in order, zeros where there is no segment."""
    _, heads, length, _ = query_1HTD.shape
    parts: list[Tensor] = []
    at = 0
    for start, stop, output in spans:
        if start > at:
            parts.append(query_1HTD.new_zeros(1, heads, start - at, width))
        parts.append(output)
        at = stop
    if length > at:
        parts.append(query_1HTD.new_zeros(1, heads, length - at, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _window_mask(length: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Boolean [length, length]: True where query t may look at key s."""
    t = torch.arange(length, device=device)
    distance = t[:, None] - t[None, :]
    reach = length if window is None else window
    return ((distance >= 0) if causal else (distance > -reach)) & (distance < reach)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float, scaling: float | None, p: float
) -> Tensor:
    """Attention with scores c * tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2)."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if causal or window is not None:
        mask = _window_mask(q.shape[2], window, causal, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probabilities, p, training=p > 0) @ v


def register() -> None:
    """Makes "segments" known to transformers; no mask is built for it. Idempotent."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    def no_mask(*args: Any, **kwargs: Any) -> None:
        return None

    AttentionInterface.register(IMPLEMENTATION, segment_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
