"""LoRA's narrow products, each row read once, against products in float64, on CUDA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels.bordered import Adapter
from tunesmith.kernels.rows import Rows

pytestmark = pytest.mark.gpu

INPUTS, BORDER = 208, 64
CASES = {
    "three projections": (700, [(320, 16), (64, 16), (64, 16)]),
    "the first and the last of three": (65, [(96, 8), (48, 0), (592, 8)]),
    "one, of many ranks": (1000, [(1040, 64)]),
    "few rows": (3, [(64, 24), (64, 24)]),
}


def _adapters(projections: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """Of projections below each other, by outputs and ranks; none where there are no ranks."""
    found: list[Adapter] = []
    output = first = 0
    for width, ranks in projections:
        down, up = (nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((ranks, INPUTS), (width, ranks)))
        if ranks:
            slices = slice(output, output + width), slice(first, first + ranks)
            found.append(Adapter(down, up, 0.5 + len(found), *slices))
        output, first = output + width, first + ranks
    return found


def _rows(count: int, width: int) -> Tensor:
    """Rows with a border of zeros."""
    wide = torch.zeros(count, width + BORDER, device="cuda", dtype=torch.bfloat16)
    wide[:, :width].normal_()
    return wide


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fp8", [False, True])
def test_borders_and_gradients_are_those_of_the_products(case: str, fp8: bool) -> None:
    from tunesmith.kernels.triton_low_rank import LowRank, serves

    count, projections = CASES[case]
    adapters = _adapters(projections)
    assert serves(adapters)
    outputs, ranks = sum(width for width, _ in projections), sum(a.down_RI.shape[0] for a in adapters)
    x, grad = _rows(count, INPUTS), _rows(count, outputs)
    x[:, INPUTS : INPUTS + ranks].normal_()
    cast = torch.zeros(grad.shape, device="cuda", dtype=torch.float8_e4m3fn)
    scale = torch.rand(count, 1, device="cuda") + 0.5
    up_OP = torch.zeros(outputs, BORDER, device="cuda", dtype=torch.bfloat16)
    for a in adapters:
        up_OP[a.outputs, a.ranks].normal_()
    grad_low = grad[:, :outputs].double() @ up_OP[:, :ranks].double()

    once = LowRank(adapters, outputs, INPUTS)
    found = once.gradients(Rows(grad, cast, scale) if fp8 else Rows(grad), Rows(x), up_OP)
    assert _error(grad[:, outputs : outputs + ranks], grad_low) < 0.004  # of rounding to bfloat16
    assert not grad[:, outputs + ranks :].any()
    for at, a in enumerate(adapters):
        of_down = a.scaling * grad[:, outputs:][:, a.ranks].double().T @ x[:, :INPUTS].double()
        of_up = grad[:, a.outputs].double().T @ x[:, INPUTS:][:, a.ranks].double()
        for learnt, expected in ((found[2 * at], of_down), (found[2 * at + 1], of_up)):
            assert learnt.is_contiguous(), "what `.grad` takes as it is"
            assert _error(learnt, expected) < 1e-5
    if fp8:
        wanted = (grad[:, outputs:].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(cast[:, outputs : outputs + ranks].float(), wanted[:, :ranks].float())
        assert not cast[:, :outputs].float().any()


def test_the_same_twice() -> None:
    """Shares are added in one order: a layer that runs again gives the same bits."""
    from tunesmith.kernels.triton_low_rank import LowRank

    adapters = _adapters([(1024, 16), (1024, 16)])
    x, grad = _rows(5000, INPUTS), _rows(5000, 2048)
    up_OP = torch.randn(2048, BORDER, device="cuda", dtype=torch.bfloat16)
    once = LowRank(adapters, 2048, INPUTS)
    first, second = (once.gradients(Rows(grad.clone()), Rows(x), up_OP) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("projections", [[(64, 4)], [(64, 16), (64, 8)], [(72, 16)], [(64, 48), (64, 48)], []], ids=str)
def test_what_is_not_thin_or_even_is_left_to_cublas(projections: list[tuple[int, int]]) -> None:
    from tunesmith.kernels.triton_low_rank import serves

    assert not serves(_adapters(projections))


def test_two_adapters_of_one_projection_are_left_to_cublas() -> None:
    from tunesmith.kernels.triton_low_rank import serves

    (one,) = _adapters([(64, 16)])
    assert serves([one])
    assert not serves([one, dataclasses.replace(one, ranks=slice(16, 32))])
