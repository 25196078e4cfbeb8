"""Where LoRA starts, against numpy's decompositions of the weights and of what the layers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tunesmith.data.pack import collate
from tunesmith.data.source import ExampleList, first_batches
from tunesmith.errors import InputError
from tunesmith.methods import METHODS, starts
from tunesmith.models.policy import Policy, Tokens
from tunesmith.types import Example, Piece, Want


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, initializer_range=0.3))


def _attached(**options: Any) -> tuple[Policy, Any]:
    policy = Policy(_llama(), "decoder", Tokens((1,), 0), packed=True)
    method: Any = METHODS.get("lora")
    made = method(method.Options.model_validate(options), 0.0)
    made.attach(policy)
    return policy, made


def _examples() -> list[Example]:
    draw = np.random.default_rng(0)
    return [Example((Piece(draw.integers(3, 61, size).astype(np.int32)),)) for size in (5, 9, 14, 11)]


def _product(layer: Any) -> Tensor:
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_pissa_is_the_best_approximation_of_its_rank(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    for exact in (2048, 4):  # decomposed whole, and by iteration
        monkeypatch.setattr(starts, "EXACT", exact)
        down, up = starts.pissa(weight, 3, 2.0)
        assert down.shape == (3, shape[1])
        np.testing.assert_allclose((2.0 * up @ down).numpy(), best, atol=2e-3 if exact == 4 else 1e-5)
        np.testing.assert_allclose(down.norm(dim=1).numpy(), up.norm(dim=0).numpy(), rtol=1e-4)  # shared evenly


def test_olora_starts_at_the_first_columns_of_q() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 12)
    down, up = starts.olora(weight, 5, 2.0)
    whole, triangle = np.linalg.qr(weight.double().numpy())
    np.testing.assert_allclose((up @ down).numpy(), whole[:, :5] @ triangle[:5], atol=1e-5)
    np.testing.assert_allclose((up.T @ up).numpy(), np.eye(5), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_stays_and_the_two_adapters_are_nothing_together(init: str) -> None:
    policy, method = _attached(rank=4, init=init)
    untouched = dict(_llama().named_modules())
    for name, layer in method._peft.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight: Any = untouched[name.removeprefix("base_model.model.")]
        assert torch.equal(layer.get_base_layer().weight, weight.weight)
        start = layer.scaling["start"] * layer.lora_B["start"].weight @ layer.lora_A["start"].weight
        assert torch.equal(_product(layer), -start)
        assert float(start.norm()) > 0
    assert {n.split(".")[-2] for n, p in policy.named_parameters() if p.requires_grad} == {"default"}


def test_what_is_saved_is_one_adapter_of_twice_the_rank(tmp_path: Path) -> None:
    policy, method = _attached(rank=4, alpha=6, init="pissa", ranks={"k_proj": 2}, rslora=True)
    method.export(policy, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (8, {"k_proj": 4})
    assert config["lora_alpha"] / config["r"] ** 0.5 == pytest.approx(6 / 2)
    assert config["lora_alpha"] / 4**0.5 == pytest.approx(6 / 2**0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_eva_starts_at_the_leading_directions_of_each_layers_inputs() -> None:
    policy, method = _attached(rank=3, init="eva")
    read: dict[str, list[Tensor]] = {}
    for name, module in policy.model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(lambda m, x, name=name: read.setdefault(name, []).append(x[0][0]))
    batches = list(first_batches(ExampleList(_examples()), np.ones(4), 7, 26, packed=False, pad_id=0))
    assert [batch.tokens for batch in batches] == sorted((b.tokens for b in batches), reverse=True)
    assert sum(batch.tokens for batch in batches) <= 26
    method.fit(policy, batches)
    for name, module in policy.model.named_modules():
        if name not in read:
            continue
        inputs = torch.cat(read[name]).double().numpy()
        right = np.linalg.svd(inputs, full_matrices=False)[2][:3]
        found = module.lora_A["default"].weight.detach().double().numpy()
        np.testing.assert_allclose(np.abs(found @ right.T), np.eye(3), atol=1e-4)
        assert not module.lora_B["default"].weight.any()


def test_few_directions_are_refused() -> None:
    with pytest.raises(InputError, match=r"method.rank is 17, and only 16 directions"):
        _attached(rank=17, init="pissa")
    policy, method = _attached(rank=8, init="eva")
    with pytest.raises(InputError, match=r"method.rank is 8, and only 5 directions"):
        method.fit(policy, [collate(_examples()[:1], [0], packed=True, pad_id=0)])
    assert policy.score(collate(_examples(), range(4), packed=True, pad_id=0), Want(hidden=True)).hidden_BTD is not None


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_only_linear_layers_have_directions_to_start_in(init: str) -> None:
    with pytest.raises(InputError, match=r"method.init starts in the base's weights, and .*embed_tokens is no linear"):
        _attached(rank=4, init=init, targets=["q_proj", "embed_tokens"])


def test_dora_has_no_second_update() -> None:
    with pytest.raises(ValueError, match="dora cannot start at pissa"):
        METHODS.get("dora").Options.model_validate({"init": "pissa"})
