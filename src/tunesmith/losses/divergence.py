"""How far a student's distribution over the vocabulary is from its teacher's, unit by unit.

Shape letters: R units, V vocabulary, K the teacher's most probable tokens. Log-probabilities are natural.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
LEAST = 1e-7  # of the probability outside the most probable tokens, below which float32 cannot tell it from 0


def divergence(teacher_RV: Tensor, student_RV: Tensor, kind: Kind, beta: float = 0.5) -> Tensor:
    """[R], in nats, between two tables of log-probabilities.

    forward_kl: sum p (log p - log q), p the teacher's (Hinton et al. 2015, arXiv 1503.02531); reverse_kl: the same with
    p and q exchanged (Gu et al. 2024, arXiv 2306.08543); jsd: beta KL(p | m) + (1 - beta) KL(q | m) with
    m = beta p + (1 - beta) q (Agarwal et al. 2024, arXiv 2306.13649, equation 1).
    """
    if kind == "forward_kl":
        return _kl(teacher_RV, student_RV)
    if kind == "reverse_kl":
        return _kl(student_RV, teacher_RV)
    mixed_RV = torch.logaddexp(teacher_RV + math.log(beta), student_RV + math.log1p(-beta))
    return beta * _kl(teacher_RV, mixed_RV) + (1 - beta) * _kl(student_RV, mixed_RV)


def most_probable(logprob_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens of each unit and their log-probabilities: [R, K] each."""
    top = logprob_RV.topk(min(count, logprob_RV.shape[-1]), dim=-1)
    return top.indices, top.values


def coarse(logprob_RV: Tensor, token_RK: Tensor) -> Tensor:
    """Log-probabilities of these tokens, and of all others together: [R, K + 1]."""
    return with_rest(logprob_RV.gather(-1, token_RK))


def with_rest(logprob_RK: Tensor) -> Tensor:
    """The same table with one more column, which makes the probabilities of a row add up to 1."""
    inside_R1 = logprob_RK.logsumexp(-1, keepdim=True).exp()
    return torch.cat([logprob_RK, (1 - inside_R1).clamp_min(LEAST).log()], dim=-1)


def _kl(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    return F.kl_div(q_RV, p_RV, reduction="none", log_target=True).sum(-1)
