"""The norm behind the last layer in bfloat16 on CUDA against the family's own, and its gradient against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels import rms_norm

pytestmark = pytest.mark.gpu

WIDTH = 576


def _norm(family: str) -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm: Any = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm}[family](WIDTH, eps=1e-5)
    norm = norm.to("cuda", torch.bfloat16).requires_grad_(False)
    norm.weight.normal_(1.0, 0.3)
    return norm


def _both(norm: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(grad.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_it_is_the_norm_of_the_family(family: str) -> None:
    norm = _norm(family)
    x = torch.randn(2, 37, WIDTH, device="cuda", dtype=torch.bfloat16)
    x[0, 0] *= 0.003  # where epsilon counts
    grad = torch.randn_like(x)
    exact = _both(_as_double(norm, family), x.double(), grad.double())
    theirs, _ = _both(norm, x, grad)
    assert rms_norm.fuse(norm)
    ours = _both(norm, x, grad)
    torch.testing.assert_close(ours[0], theirs, rtol=0.016, atol=1e-3)  # one rounding of bfloat16 apart
    for found, expected in zip(ours, exact, strict=True):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm() / expected.norm()) < 0.006


def _as_double(norm: nn.Module, family: str) -> nn.Module:
    wide = _norm(family).double()
    wide.load_state_dict(norm.state_dict())
    return wide


def test_a_gradient_whose_rows_are_all_one_value() -> None:
    """As of a sum: torch hands on one value, expanded."""
    norm = _norm("llama")
    x = torch.randn(37, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    norm(x).float().sum().backward()
    expected, x.grad = x.grad, None
    assert rms_norm.fuse(norm)
    norm(x).sum().backward()
    assert expected is not None
    assert x.grad is not None
    assert float((x.grad - expected).float().norm() / expected.float().norm()) < 0.01


def test_a_weight_that_trains_is_left_to_the_module_itself() -> None:
    norm: Any = _norm("llama")
    assert rms_norm.fuse(norm)
    norm.weight.requires_grad_()
    norm(torch.randn(5, WIDTH, device="cuda", dtype=torch.bfloat16)).float().sum().backward()
    assert norm.weight.grad is not None


def test_what_only_looks_like_one_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16), requires_grad=False)
            self.eps = 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    assert not rms_norm.fuse(OddRMSNorm())
