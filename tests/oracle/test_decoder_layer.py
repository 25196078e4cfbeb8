"""A decoder layer on bordered weights and row kernels against PEFT's own layers in float32, on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.accelerate import COMPILED, LAYERS, accelerate
from tunesmith.kernels.attention import KEYWORD, Bounds
from tunesmith.kernels.bordered import base_of
from tunesmith.kernels.nf4 import Nf4Linear, hold_in_nf4
from tunesmith.methods.lora import Lora
from tunesmith.models.policy import Policy, Tokens
from tunesmith.models.recompute import Again, recompute

pytestmark = pytest.mark.gpu

SHAPES = {
    "llama": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
}
ROWS = {"one": [600], "alike": [256, 256, 256], "mixed": [300, 37, 411, 160], "short": [40, 60, 20]}


def _policy(family: str, targets: Any = "all-linear", over: Callable[[Any], Any] = lambda model: model) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(time.time_ns() % 2**31)
    config = LlamaConfig(num_hidden_layers=2, vocab_size=512, **SHAPES[family])  # type: ignore[arg-type]
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.05)
        else:
            parameter.data.uniform_(0.5, 1.5)
    over(model)
    policy = Policy(model, "decoder", Tokens((), 0), packed=True, autocast=torch.bfloat16)
    Lora(Lora.Options(rank=8, targets=targets), 0.0).attach(policy)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return policy


def _through(policy: Policy, lengths: list[int], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Result and gradients of all layers, given the gradient of the result."""
    spans = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
    x = x.clone().requires_grad_()
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    core = policy.model.model
    angles = core.rotary_emb(x, positions)
    hidden, bounds = x, Bounds([spans])
    for layer in core.layers:
        hidden = layer(hidden, position_embeddings=angles, **{KEYWORD: bounds})
    policy.zero_grad()
    hidden.backward(grad.to(hidden.dtype))
    found = {n: p.grad.float() for n, p in policy.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"result": hidden.detach().float(), "x": x.grad.float(), **found}


def _errors(policy: Policy, lengths: list[int], fp8: bool) -> dict[str, float]:
    policy.train()
    width = policy.width
    x = torch.randn(1, sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    policy.float()
    expected = _through(policy, lengths, x.float(), grad.float())
    for name, parameter in policy.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    assert accelerate(policy, fp8=fp8)[LAYERS] == 2
    found = _through(policy, lengths, x, grad)
    assert found.keys() == expected.keys()
    return {k: float((found[k] - expected[k]).norm() / expected[k].norm().clamp_min(1e-9)) for k in expected}


@pytest.fixture(params=[False, True], ids=["cublas", "once"])
def thin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thin products by cuBLAS, as where rows are few, and by kernels that read each row once."""
    if request.param:
        monkeypatch.setattr("tunesmith.kernels.triton_low_rank.WORTH", 0)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_fast_layer_is_the_layer(family: str, rows: str) -> None:
    errors = _errors(_policy(family), ROWS[rows], fp8=False)
    assert max(errors.values()) < 0.05, errors


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("rows", ["alike", "mixed"])
def test_in_fp8_it_is_the_layer_within_the_cast(rows: str) -> None:
    errors = _errors(_policy("llama"), ROWS[rows], fp8=True)
    # e4m3 has 3 bits of mantissa: about 2.6% for each of the two factors of a product.
    assert max(errors["result"], errors["x"]) < 0.2, errors
    assert max(errors.values()) < 0.3, errors  # adapters of the first layer, behind four casts


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("rows", ["alike", "mixed"])
def test_in_4_bits_it_is_the_layer_over_the_dequantised_base(rows: str) -> None:
    policy = _policy("llama", over=lambda model: hold_in_nf4(model, "cuda"))
    assert all(type(base_of(layer.mlp.up_proj)) is Nf4Linear for layer in policy.model.model.layers)
    lengths, width = ROWS[rows], policy.width
    x = torch.randn(1, sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    policy.train()
    with torch.autocast("cuda", torch.bfloat16):
        expected = _through(policy, lengths, x, grad)
    assert accelerate(policy)[LAYERS] == 2
    found = _through(policy, lengths, x, grad)
    assert found.keys() == expected.keys()
    errors = {k: float((found[k] - expected[k]).norm() / expected[k].norm().clamp_min(1e-9)) for k in expected}
    assert max(errors.values()) < 0.05, errors


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("again", ["feed", "whole", "away"])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("rows", ["alike", "mixed"])
def test_layers_that_run_again_keep_less_and_give_the_same_bits(again: Again, precision: str, rows: str) -> None:
    policy = _policy("llama", over=(lambda m: hold_in_nf4(m, "cuda")) if precision == "int4" else lambda m: m)
    assert accelerate(policy, fp8=precision == "fp8")[LAYERS] == 2
    policy.train()
    # FlashAttention-2 adds up a key block's share of a gradient in any order, which is one order for two blocks of 128.
    lengths = [min(length, 256) for length in ROWS[rows]]
    x = torch.randn(1, sum(lengths), policy.width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    found: list[dict[str, Tensor]] = []
    kept: list[int] = []
    for way in ("none", again):
        recompute(policy.model, way, 2)
        found.append(_through(policy, lengths, x, grad))
        kept.append(_kept(policy, lengths, x))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert kept[1] < {"feed": 0.6, "whole": 0.3, "away": 0.2}[again] * kept[0]


def _kept(policy: Policy, lengths: list[int], x: Tensor) -> int:
    """Bytes that a forward leaves for its backward."""
    spans = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
    core = policy.model.model
    angles = core.rotary_emb(x, torch.arange(sum(lengths), device="cuda")[None])
    bounds = Bounds([spans])
    before = torch.cuda.memory_allocated()
    hidden = x.clone().requires_grad_()
    for layer in core.layers:
        hidden = layer(hidden, position_embeddings=angles, **{KEYWORD: bounds})
    return torch.cuda.memory_allocated() - before


@pytest.mark.usefixtures("thin")
def test_layers_without_adapters_pass_the_gradient_on() -> None:
    errors = _errors(_policy("llama", targets=["q_proj", "down_proj"]), [512, 512], fp8=False)
    assert len(errors) == 2 + 2 * 4
    assert max(errors.values()) < 0.05, errors


def test_switched_off_adapters_are_left_to_the_layer_itself() -> None:
    policy = _policy("llama")
    accelerate(policy)
    x = torch.randn(1, 256, policy.width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    tuned = _through(policy, [256], x, grad)["result"]
    for module in policy.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    base = _through(policy, [256], x, grad)["result"]
    assert float((tuned - base).norm() / base.norm()) > 0.01


@pytest.mark.parametrize("fp8", [False, True])
def test_adapters_that_drop_out_in_training_count_when_they_are_measured(fp8: bool) -> None:
    policy = _policy("llama")
    for module in policy.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    x = torch.randn(1, 256, policy.width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    with torch.autocast("cuda", torch.bfloat16):
        expected = _through(policy.eval(), [256], x, grad)["result"]
    policy.train()
    assert accelerate(policy, fp8=fp8)[LAYERS] == 2
    assert all(m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    dropped = _through(policy, [256], x, grad)
    found = _through(policy.eval(), [256], x, grad)["result"]
    assert float((found - expected).norm() / expected.norm()) < (0.2 if fp8 else 0.05)
    assert float((dropped["result"] - found).norm()) > 0
    assert len(dropped) == 2 + 2 * 2 * 7, "gradients of all adapters by the layer's own forward"


@pytest.mark.parametrize(("dropout", "compiled"), [(0.0, 0), (0.1, 2)])
def test_what_drops_out_is_compiled_where_layers_are_to_be(dropout: float, compiled: int) -> None:
    policy = _policy("llama")
    for module in policy.modules():
        if hasattr(module, "lora_dropout") and dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    taken = accelerate(policy, compiled=policy.model.model.layers)
    assert (taken[LAYERS], taken[COMPILED]) == (2 - compiled, compiled)
