"""Softmax among the members of groups that lie one behind the other: positions of a window, choices of a question."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_logprobs(logits_UK: Tensor, sizes_G: Tensor) -> Tensor:
    """x_u - log sum over v of u's group of exp x_v, for each column: [U, K], in fp32.

    The first `sizes_G[0]` rows are the first group, and so on; no group is empty.
    """
    logits_UK = logits_UK.float()
    top_GK = torch.segment_reduce(logits_UK.detach(), "max", lengths=sizes_G)
    shifted_UK = logits_UK - top_GK.repeat_interleave(sizes_G, dim=0)  # exp of what is above 88 is infinite
    total_GK = torch.segment_reduce(shifted_UK.exp(), "sum", lengths=sizes_G)
    return shifted_UK - total_GK.log().repeat_interleave(sizes_G, dim=0)
