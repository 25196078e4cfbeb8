"""Segments as one padded batch, against the dense softmax in float64 of test_attention.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from test_attention import MODULE, Case, cases, compare, segments
from tunesmith.kernels import padded_attention
from tunesmith.kernels.attention import KEYWORD, Bounds, segment_attention
from tunesmith.kernels.cuda_attention import Look, reach


def padded(case: Case, inputs: list[Tensor]) -> Tensor:
    bounds = Bounds(case.rows)
    look = Look(bounds, case.length, case.causal, reach(bounds, case.window), case.softcap, case.scaling)
    query, *others = inputs
    key, value = (x.repeat_interleave(case.groups, dim=1) for x in others)
    return padded_attention.attend(query, key, value, look, 0.0)


@settings(max_examples=120)
@given(case=cases().filter(lambda case: any(case.rows)))
def test_float64_is_the_dense_block_mask(case: Case) -> None:
    compare(case, torch.float64, 1e-10 if case.softcap is None else 3e-5, padded)


def test_what_pads_too_much_or_shares_a_beginning_is_left_alone() -> None:
    assert padded_attention.serves(Bounds([[(0, 9), (9, 30)], [(0, 20)]]))
    assert not padded_attention.serves(Bounds([[(0, 30)]]))
    assert not padded_attention.serves(Bounds([[(0, 9), (9, 30)]], shared=4))
    assert not padded_attention.serves(Bounds([[(0, 900), *((900 + i, 901 + i) for i in range(9))]]))


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_on_cuda_in_float32(case: Case) -> None:
    """float32 never goes through FlexAttention, so these go as one batch, or segment by segment."""

    def there(case: Case, inputs: list[Tensor]) -> Tensor:
        return segments(case, [x.cuda() for x in inputs]).cpu()

    compare(case, torch.float32, 5e-3 if case.loud > 1 else 3e-5, there)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_on_cuda_keeps_the_mean(causal: bool) -> None:
    """Values are ones, so each output's mean over many draws is one, and no draw is."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 4, 3000, 32, device="cuda") for _ in range(2))
    bounds = Bounds([[(100 * i, 100 * i + 100) for i in range(30)]])
    out, _ = segment_attention(
        MODULE, q, k, torch.ones_like(q), None, dropout=0.5, is_causal=causal, **{KEYWORD: bounds}
    )
    assert abs(float(out.mean()) - 1) < 0.02
    assert float(out.std()) > 0.05
