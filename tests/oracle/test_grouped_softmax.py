"""The softmax among members of groups against one group after the other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.losses.grouped_softmax import grouped_logprobs


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3), st.sampled_from([1.0, 100.0]))
def test_it_is_the_softmax_of_each_group(sizes: list[int], columns: int, scale: float) -> None:
    torch.manual_seed(sum(sizes))
    logits = (scale * torch.randn(sum(sizes), columns)).requires_grad_()
    ours = grouped_logprobs(logits, torch.tensor(sizes))
    theirs = torch.cat([part.log_softmax(0) for part in logits.split(sizes)])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    weights = torch.randn_like(logits)
    gradients = [torch.autograd.grad((found * weights).sum(), logits)[0] for found in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_half_precision_is_summed_in_full() -> None:
    found = grouped_logprobs(torch.zeros(5000, 1, dtype=torch.bfloat16), torch.tensor([5000]))
    torch.testing.assert_close(found, torch.full((5000, 1), -8.517193), rtol=1e-5, atol=1e-5)
