"""When the fast functions of a decoder layer stand for it: with the adapters that it had, all of them, undropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tunesmith.kernels.decoder_layer import FastLayer, drops_out

WEIGHTS = 7


def _layer(dropout: float) -> tuple[Any, Any]:
    """PEFT's model as it is when adapters have just been attached, and its layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model: Any = get_peft_model(
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16),
        LoraConfig(r=8, lora_dropout=dropout, target_modules="all-linear"),
    )
    return model, model.base_model.model.model.layers[0]


def _adapters(fast: FastLayer) -> int:
    return sum(len(weight.adapters) for weight in fast.weights)


def test_adapters_that_drop_out_while_it_is_built_are_in_it() -> None:
    """A model is built in training mode: without them, what is measured afterwards would be the base."""
    model, layer = _layer(dropout=0.1)
    assert layer.self_attn.q_proj.lora_dropout["default"].training
    fast = FastLayer(layer, fp8=False)
    assert _adapters(fast) == WEIGHTS
    assert not fast.still_serves()
    assert drops_out(layer)
    model.eval()
    assert drops_out(layer), "it will, in training"
    assert fast.still_serves()
    model.train()
    assert not fast.still_serves()


@pytest.mark.parametrize("change", ["off", "merged", "another", "both"])
def test_other_adapters_than_it_was_built_with_are_left_to_the_layer(change: str) -> None:
    model, layer = _layer(dropout=0.0)
    fast = FastLayer(layer, fp8=False)
    assert fast.still_serves()
    if change == "off":
        model.disable_adapter_layers()
    elif change == "merged":
        model.merge_adapter()
    else:
        model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
        assert fast.still_serves(), "it is there, and not in use"
        model.base_model.set_adapter(["default", "other"] if change == "both" else "other")
    assert not fast.still_serves()


def test_built_over_adapters_that_are_off_it_is_the_base() -> None:
    model, layer = _layer(dropout=0.0)
    assert not drops_out(layer)
    model.disable_adapter_layers()
    fast = FastLayer(layer, fp8=False)
    assert _adapters(fast) == 0
    assert fast.still_serves()
    model.enable_adapter_layers()
    assert not fast.still_serves()
