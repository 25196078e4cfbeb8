"""Heads on top of a backbone: pooling over segments, and the linear maps that are trained fresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tunesmith.types import HeadSpec, Segment


def _mean(hidden_TD: Tensor) -> Tensor:
    return hidden_TD.mean(0)


def _first(hidden_TD: Tensor) -> Tensor:
    return hidden_TD[0]


def _last(hidden_TD: Tensor) -> Tensor:
    return hidden_TD[-1]


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "first": _first, "last": _last}


def pool(hidden_BTD: Tensor, segments: Sequence[Segment], pooling: str) -> Tensor:
    """One vector for each segment, in order: [S, D]. "first" is the CLS position of an encoder."""
    take = POOLINGS[pooling]
    return torch.stack([take(hidden_BTD[s.row, s.start : s.stop]) for s in segments])


class Head(nn.Module):
    """A linear map over standardised inputs: logits = W z + b with z = (x - mean) / scale, or z = gelu(V z + c).

    `mean_D` and `scale_D` are 0 and 1 until `standardise` is given the training features; then a
    probe learns at one rate whatever the scale of the backbone's outputs.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __init__(self, spec: HeadSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.hidden = nn.Linear(width, spec.hidden) if spec.hidden else None
        self.linear = nn.Linear(spec.hidden or width, spec.outputs)
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("scale_D", torch.ones(width))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def set_dropout(self, rate: float) -> None:
        self.dropout.p = rate

    def standardise(self, features_ND: Tensor) -> None:
        """Takes mean and deviation from features of the training rows."""
        self.mean_D.copy_(features_ND.mean(0))
        self.scale_D.copy_(features_ND.std(0).clamp_min(1e-6) if len(features_ND) > 1 else self.scale_D)

    def forward(self, features: Tensor) -> Tensor:
        standard = (features.float() - self.mean_D) / self.scale_D
        if self.hidden is not None:
            standard = nn.functional.gelu(self.hidden(self.dropout(standard)))
        return self.linear(self.dropout(standard))
