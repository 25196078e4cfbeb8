"""Heads on top of a backbone: pooling over segments, and the linear maps that are trained fresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.declared import HeadSpec
from tunesmith.types import Segment

POOLINGS: dict[str, Callable[[int], int]] = {"first": lambda size: 0, "last": lambda size: size - 1}  # or the mean


def pool(hidden_BTD: Tensor, segments: Sequence[Segment], pooling: str) -> Tensor:
    """One vector for each segment, in order: [S, D]. "first" is the CLS position of an encoder.

    One gather for all segments: a slice of each is a launch each, and in backward a row of zeros each.
    """
    length, device = hidden_BTD.shape[1], hidden_BTD.device
    starts, sizes = [s.row * length + s.start for s in segments], [s.length for s in segments]
    if pooling == "mean":
        place = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        hidden_ND = _taken(hidden_BTD, place).float()
        return torch.segment_reduce(hidden_ND, "mean", lengths=torch.tensor(sizes, device=device), unsafe=True)
    within = POOLINGS[pooling]
    return _taken(hidden_BTD, np.array([start + within(size) for start, size in zip(starts, sizes, strict=True)]))


def joined(pooled_SD: Tensor, segments: Sequence[Segment]) -> Tensor:
    """One vector for each example, in order: [N, D]. Of several segments the mean; vectors alone are as they were."""
    sizes = [len(list(own)) for _, own in groupby(segments, key=lambda segment: segment.example)]
    if len(sizes) == len(segments):
        return pooled_SD
    lengths = torch.tensor(sizes, device=pooled_SD.device)
    return torch.segment_reduce(pooled_SD.float(), "mean", lengths=lengths, unsafe=True)


def _taken(hidden_BTD: Tensor, place: NDArray[np.int64]) -> Tensor:
    return hidden_BTD.flatten(0, 1).index_select(0, torch.from_numpy(place).to(hidden_BTD.device, non_blocking=True))


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
        inputs = width * spec.vectors or 1
        self.hidden = nn.Linear(inputs, spec.hidden) if spec.hidden else None
        self.linear = nn.Linear(spec.hidden or inputs, spec.outputs)
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("mean_D", torch.zeros(inputs))
        self.register_buffer("scale_D", torch.ones(inputs))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if spec.fitted:
            for name, value in list(self.linear.named_parameters()):
                delattr(self.linear, name)
                self.linear.register_buffer(name, value.data)

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
