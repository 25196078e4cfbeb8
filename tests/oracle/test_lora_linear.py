"""The fused LoRA linear against PEFT's own layer: outputs, gradients, and every case it must leave to PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tunesmith.kernels import gemm
from tunesmith.kernels.lora_linear import fuse, lora_linear


def layer(bias: bool = True, **options: Any) -> tuple[Any, Any]:
    """A PEFT model of one LoRA layer with a B that is not 0, and the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **{"lora_dropout": 0.0} | options)
    peft: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    lora = peft.base_model.model[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    return peft, lora


def passes(lora: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = lora(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    assert x.grad is not None
    grads = [p.grad.clone() for p in lora.parameters() if p.grad is not None]
    lora.zero_grad(set_to_none=True)
    return [out.detach(), x.grad, *grads]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the rounding of float32, by norm."""
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm())


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_pefts(bias: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: onednn)
    _, lora = layer(bias)
    x = torch.randn(2, 7, 24)
    expected = passes(lora, x)
    assert fuse(lora)
    found = passes(lora, x)
    assert len(found) == 4  # out, x, A, B: nothing frozen has a gradient
    assert_equal(found, expected)


def test_gradients_against_finite_differences() -> None:
    torch.manual_seed(1)
    x, weight, bias, down, up = (torch.randn(s, dtype=torch.float64) for s in ((3, 5), (4, 5), (4,), (2, 5), (4, 2)))
    x, down, up = (t.requires_grad_() for t in (x, down, up))
    dropped = (torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d, u: lora_linear(x, weight, bias, d, u, 3.0), (x, down, up))
    assert torch.autograd.gradcheck(
        lambda x, r, d, u: lora_linear(x, weight, bias, d, u, 3.0, r), (x, dropped, down, up)
    )


def test_dropout_drops_what_peft_drops() -> None:
    _, lora = layer(lora_dropout=0.5)
    lora.train()
    x = torch.randn(2, 7, 24)
    torch.manual_seed(2)
    expected = passes(lora, x)
    assert fuse(lora)
    torch.manual_seed(2)
    assert_equal(passes(lora, x), expected)


def test_disabled_and_merged_adapters_stay_pefts() -> None:
    peft, lora = layer()
    x = torch.randn(3, 24)
    assert fuse(lora)
    with_adapter = lora(x)
    with peft.disable_adapter():
        assert torch.equal(lora(x), lora.base_layer(x))
    lora.merge()
    torch.testing.assert_close(lora(x), with_adapter, rtol=1e-5, atol=1e-5)
    lora.unmerge()
    torch.testing.assert_close(lora(x), with_adapter, rtol=1e-5, atol=1e-5)


def test_two_adapters_of_one_scaling_are_one_update() -> None:
    peft, lora = layer()
    peft.add_adapter("second", LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    peft.base_model.set_adapter(["default", "second"])
    nn.init.normal_(lora.lora_B["second"].weight)
    lora.lora_A["second"].requires_grad_(False)
    x = torch.randn(2, 7, 24)
    expected = passes(lora, x)
    assert fuse(lora)
    found = passes(lora, x)
    assert len(found) == 5  # out, x, both factors of the first and one of the second
    assert_equal(found, expected)


@pytest.mark.parametrize("case", ["dora", "two scalings", "trained base", "autocast"])
def test_what_it_does_not_cover_goes_to_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, lora = layer(use_dora=case == "dora")
    if case == "two scalings":
        peft.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
        peft.base_model.set_adapter(["default", "second"])
    if case == "trained base":
        lora.base_layer.weight.requires_grad_(True)
    assert fuse(lora)

    def never(*_: Any) -> Tensor:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr("tunesmith.kernels.lora_linear.lora_linear", never)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        out = lora(torch.randn(3, 24))
    assert out.shape == (3, 40)


def test_other_modules_are_left_alone() -> None:
    assert not fuse(nn.Linear(2, 2))
    assert not fuse(nn.ReLU())
