"""The contrastive loss of vectors: each query's passages against the passages that are not its own.

N queries, M passages, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query_ND: Tensor,
    passage_MD: Tensor,
    own_NM: Tensor,
    known_NM: Tensor,
    temperature: float,
    alone_N: Tensor | None = None,
) -> Tensor:
    """The mean over a query's own passages p of -log(e^s_p / (e^s_p + sum_n e^s_n)), s = q.p / temperature: [N].

    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4). `own_NM`: which passages a query's row gives it;
    `known_NM`: which are known to answer it, own ones among them, so that none of these is an n.
    With `alone_N`, which marks each different query once, the mean of this and of the same the other way round: each
    own passage's query against the marked ones that it is not known to answer (Gao et al. 2021, arXiv 2104.08821,
    section 2, take one direction; Radford et al. 2021, arXiv 2103.00020, figure 3, both).
    """
    score_NM = query_ND @ passage_MD.T / temperature
    count_N = own_NM.sum(1)
    loss_N = (_against(score_NM, known_NM, 1) * own_NM).sum(1) / count_N
    if alone_N is None:
        return loss_N
    back_NM = _against(score_NM, known_NM | ~alone_N[:, None], 0)
    return (loss_N + (back_NM * own_NM).sum(1) / count_N) / 2


def _against(score_NM: Tensor, left_out_NM: Tensor, dim: int) -> Tensor:
    """-log of each score's share among itself and those of its row (or column) that are not left out."""
    # A finite number: with -inf a row of nothing else would have no gradient but NaN.
    others = score_NM.masked_fill(left_out_NM, torch.finfo(score_NM.dtype).min / 2)
    return F.softplus(torch.logsumexp(others, dim, keepdim=True) - score_NM)
