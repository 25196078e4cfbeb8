"""Pooled vectors and their gradients against a slice of each segment, by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tunesmith.models.heads import pool
from tunesmith.types import Segment

TAKE = {"mean": lambda x_TD: x_TD.mean(0), "first": lambda x_TD: x_TD[0], "last": lambda x_TD: x_TD[-1]}
LAYOUTS = {
    "packed": [Segment(0, 0, 3, 0), Segment(0, 3, 1, 1), Segment(0, 4, 7, 2)],
    "a padded row each, in another order": [Segment(2, 0, 5, 0), Segment(0, 0, 11, 1), Segment(1, 0, 1, 2)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", TAKE)
def test_pool_is_a_slice_of_each(pooling: str, layout: str) -> None:
    torch.manual_seed(0)
    segments = LAYOUTS[layout]
    hidden_BTD = torch.randn(3, 11, 5, requires_grad=True)
    weight_SD = torch.randn(len(segments), 5)

    def with_gradient(pooled_SD: Tensor) -> tuple[Tensor, Tensor]:
        (gradient_BTD,) = torch.autograd.grad((pooled_SD * weight_SD).sum(), hidden_BTD)
        return pooled_SD, gradient_BTD

    slices = torch.stack([TAKE[pooling](hidden_BTD[s.row, s.start : s.stop]) for s in segments])
    assert_close(with_gradient(pool(hidden_BTD, segments, pooling)), with_gradient(slices))
