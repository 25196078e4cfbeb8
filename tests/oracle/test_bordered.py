"""Bordered weights against base and update apart: results, gradients, and adapters that an optimizer has moved."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels import bordered
from tunesmith.kernels.bordered import LARGEST, Bordered, BorderedNf4, base_of
from tunesmith.kernels.nf4 import Nf4Linear
from tunesmith.kernels.rows import Rows

N, INPUTS, OUTPUTS = 24, 48, (32, 16)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(INPUTS, width, bias=False, dtype=torch.bfloat16) for width in OUTPUTS)


def _linears(targets: list[str], in_4_bits: bool = False) -> list[Any]:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=12, target_modules=targets), Projections())
    if in_4_bits:
        for name in ("first", "second"):
            linear = getattr(model, name)
            if hasattr(linear, "base_layer"):
                linear.base_layer = Nf4Linear(linear.base_layer, "cpu")
            else:
                setattr(model, name, Nf4Linear(linear, "cpu"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.2
    return [model.first, model.second]


def _wide(x: Tensor, border: int) -> Rows:
    return Rows(torch.cat([x, x.new_zeros(len(x), border)], dim=1).bfloat16())


def _apart(linear: Any, x_NI: Tensor) -> Tensor:
    out = x_NI @ base_of(linear).weight.float().T
    if hasattr(linear, "lora_A"):
        out = out + 3.0 * (x_NI @ linear.lora_A["default"].weight.T) @ linear.lora_B["default"].weight.T
    return out


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("kind", [Bordered, BorderedNf4])
@pytest.mark.parametrize("targets", [["first", "second"], ["second"]])
def test_results_and_gradients_are_those_of_base_and_update(targets: list[str], kind: type[Bordered]) -> None:
    linears = _linears(targets, in_4_bits=kind is BorderedNf4)
    x = torch.randn(N, INPUTS).bfloat16().float().requires_grad_()
    grad = torch.randn(N, sum(OUTPUTS)).bfloat16().float()
    expected = torch.cat([_apart(linear, x) for linear in linears], dim=1)
    weight = kind(linears)
    expected_grads = torch.autograd.grad(expected, [x, *weight.parameters], grad)
    weight.refresh()
    rows, grads = _wide(x.detach(), weight.border), _wide(grad, weight.border)
    out = torch.empty(N, sum(OUTPUTS), dtype=torch.bfloat16)
    weight.project(rows, out=out)
    learnt = weight.gradients(grads, rows)
    found = [weight.back(grads), *learnt]
    assert _error(out, expected.detach()) < 0.01
    base = torch.randn(N, sum(OUTPUTS)).bfloat16()
    added = base.clone()
    weight.project_onto(added, rows)
    assert _error(added.float() - base.float(), expected.detach()) < 0.02
    assert len(found) == 1 + 2 * len(targets)
    for ours, theirs in zip(found, expected_grads, strict=True):
        assert ours.shape == theirs.shape
        assert _error(ours, theirs) < 0.015


def test_a_weight_without_adapters_learns_nothing_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Bordered(list(Projections().children()))
    monkeypatch.setattr(bordered, "_wide_product", lambda *_: pytest.fail("multiplied"))
    rows = _wide(torch.randn(N, INPUTS), weight.border)
    grads = _wide(torch.randn(N, sum(OUTPUTS)), weight.border)
    assert weight.gradients(grads, rows) == []


def test_two_adapters_of_a_layer_lie_beside_each_other() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = Projections()
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["second"]))
    peft.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["second"]))
    peft.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        parameter.data = (torch.randn_like(parameter, dtype=torch.float32) * 0.2).to(parameter.dtype)
    weight = Bordered([model.first, model.second])
    weight.refresh()
    x, linear = torch.randn(N, INPUTS).bfloat16().float(), model.second
    second = _apart(linear, x) + 4.0 * (x @ linear.lora_A["other"].weight.T) @ linear.lora_B["other"].weight.T
    out = torch.empty(N, sum(OUTPUTS), dtype=torch.bfloat16)
    weight.project(_wide(x, weight.border), out=out)
    assert len(weight.parameters) == 4
    assert _error(out, torch.cat([_apart(model.first, x), second], dim=1)) < 0.01


def test_the_border_follows_a_fused_optimizer() -> None:
    """Version counters do not tell: fused AdamW moves parameters and leaves their versions as they were."""
    linears = _linears(["first", "second"])
    weight = Bordered(linears)
    optimizer = torch.optim.AdamW(weight.parameters, lr=0.1, fused=True)
    weight.refresh()
    for parameter in weight.parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weight.refresh()
    rows = _wide(torch.randn(N, INPUTS), weight.border)
    expected = torch.cat([_apart(linear, rows.wide_NW[:, :INPUTS].float()) for linear in linears], dim=1)
    assert _error(weight.project(rows), expected) < 0.01


def test_the_modules_own_weights_stay_what_they_were() -> None:
    linears = _linears(["first"])
    before = [base_of(linear).weight.clone() for linear in linears]
    Bordered(linears)
    for linear, kept in zip(linears, before, strict=True):
        assert torch.equal(base_of(linear).weight, kept)


def test_e4m3_holds_a_weight_and_four_times_its_largest_value() -> None:
    from tunesmith.kernels.bordered import HEADROOM, _quantise

    weight = torch.randn(8, 200).bfloat16()
    cast, scale = _quantise(weight, 16)
    assert cast.shape == (8, 216)
    assert not cast[:, 200:].float().any()
    assert _error(cast[:, :200].float() * scale.T, weight) < 0.03
    torch.testing.assert_close(scale[0] * LARGEST, HEADROOM * weight.float().abs().amax(1))


def test_the_buffer_of_weights_in_4_bits_is_shared_and_goes_with_the_last() -> None:
    one, other = (BorderedNf4(_linears(["first"], in_4_bits=True)) for _ in range(2))
    assert one._made().data_ptr() == other._made().data_ptr()
    device = torch.device("cpu")
    assert device in bordered._buffers
    del one
    gc.collect()
    assert device in bordered._buffers
    del other
    gc.collect()
    assert device not in bordered._buffers
