"""Cross-entropy of classes that do not count alike: weights, focus on what is hard, smoothed labels.

Shape letters: N examples, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Emphasis:
    """How much each class counts, gamma of the focal loss, and epsilon of label smoothing; as it stands, none of it."""

    weight_V: tuple[float, ...] | None = None
    gamma: float = 0.0
    smoothing: float = 0.0


PLAIN = Emphasis()


def one_of(logits_NV: Tensor, class_N: Tensor, emphasis: Emphasis = PLAIN, ignore: int = -100) -> Tensor:
    """[N]: - sum_v w_v q_v (1 - p_v)^gamma log p_v, p = softmax(logits), q_v = (1 - epsilon) [v = class] + epsilon / V.

    Gamma: Lin et al. 2017 (arXiv 1708.02002), equation 4, whose (1 - p_t) is here of each class that q has a part of.
    Epsilon: Szegedy et al. 2016 (arXiv 1512.00567), section 7. 0 where the class is `ignore`.
    """
    weight_V = None if emphasis.weight_V is None else logits_NV.new_tensor(emphasis.weight_V)
    epsilon = emphasis.smoothing
    if not emphasis.gamma:
        return F.cross_entropy(
            logits_NV, class_N, weight_V, reduction="none", ignore_index=ignore, label_smoothing=epsilon
        )
    logp_NV = logits_NV.log_softmax(-1)
    # 1 - p is 0 where p rounds to 1, and a power below 1 has no slope there.
    others_NV = (-torch.expm1(logp_NV)).clamp_min(torch.finfo(logp_NV.dtype).tiny)
    cost_NV = -(others_NV**emphasis.gamma) * logp_NV
    cost_NV = cost_NV if weight_V is None else cost_NV * weight_V
    known_N = class_N != ignore
    own_N = cost_NV.gather(-1, torch.where(known_N, class_N, 0)[:, None])[:, 0]
    return torch.where(known_N, (1 - epsilon) * own_N + epsilon * cost_NV.mean(-1), 0.0)


def any_of(logits_NV: Tensor, actual_NV: Tensor, emphasis: Emphasis = PLAIN) -> Tensor:
    """[N]: the mean over classes of - w_v y_v (1 - p_v)^gamma log p_v - (1 - y_v) p_v^gamma log(1 - p_v).

    p = sigmoid(logits); y = (1 - epsilon) actual + epsilon / 2. A weight is that of having the class.
    """
    wanted_NV = (1 - emphasis.smoothing) * actual_NV.to(logits_NV) + emphasis.smoothing / 2
    weight_V = None if emphasis.weight_V is None else logits_NV.new_tensor(emphasis.weight_V)
    if not emphasis.gamma:
        return F.binary_cross_entropy_with_logits(logits_NV, wanted_NV, reduction="none", pos_weight=weight_V).mean(-1)
    has_NV, lacks_NV = F.logsigmoid(logits_NV), F.logsigmoid(-logits_NV)
    having_NV = wanted_NV * (emphasis.gamma * lacks_NV).exp() * has_NV
    having_NV = having_NV if weight_V is None else having_NV * weight_V
    return -(having_NV + (1 - wanted_NV) * (emphasis.gamma * has_NV).exp() * lacks_NV).mean(-1)
