"""Numbers of each unit's whole distribution over the vocabulary, from hidden states, a few units' logits at a time.

Shape letters: U units, R units of one chunk, V vocabulary, D width, K numbers of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# One chunk's logits; what is reduced from them holds about six times as much, once for each model.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}

Reduce: TypeAlias = Callable[[Tensor, slice], Tensor]  # logits [R, V] and which units they are of -> [R, K]


def linear_reduce(
    hidden_UD: Tensor,
    reduce: Reduce,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """What `reduce` makes of the logits of each unit: [U, K].

    More units than one chunk holds are computed chunk by chunk, and each chunk's logits again in the backward.
    """
    limit = chunk_bytes or CHUNK_BYTES.get(hidden_UD.device.type, CHUNK_BYTES["cpu"])
    rows = max(1, limit // (4 * len(weight_VD)))
    count = len(hidden_UD)

    def part(hidden_RD: Tensor, span: slice) -> Tensor:
        return reduce(linear_logits(hidden_RD, weight_VD, bias_V, scale, softcap), span)

    if count <= rows:
        return part(hidden_UD, slice(0, count))
    spans = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    if not torch.is_grad_enabled():
        return torch.cat([part(hidden_UD[span], span) for span in spans])
    return torch.cat([checkpoint(part, hidden_UD[span], span, use_reentrant=False) for span in spans])


def linear_logits(
    hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softcap * tanh(scale * (h W' + b) / softcap) in float32: [R, V]."""
    with torch.autocast(hidden_RD.device.type, enabled=False):
        logits_RV = hidden_RD.float() @ weight_VD.float().T
        if bias_V is not None:
            logits_RV = logits_RV + bias_V.float()
        logits_RV = logits_RV if scale == 1.0 else logits_RV * scale
        return logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)
