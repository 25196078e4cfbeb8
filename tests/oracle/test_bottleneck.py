"""Bottleneck adapters against the papers' formulas, written out for a layer of each kind of residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kinds import examples_of, model_of, objective_of, outputs, policy_of
from tunesmith.errors import InputError
from tunesmith.methods.adapter_sites import sites_of
from tunesmith.methods.bottleneck import Bottleneck
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy

Adapters = Callable[[str, Tensor], Tensor]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "swish": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "tanh": lambda x: 2 / (1 + (-2 * x).exp()) - 1,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
}


def pre_norm(layer: Any, x: Tensor, a: Adapters, variant: str, **given: Any) -> Tensor:
    """Llama: x + attention(norm(x)), then x + mlp(norm(x))."""
    h = layer.self_attn(hidden_states=layer.input_layernorm(x), **given)[0]
    x = x + h + (a("attention", h) if variant == "houlsby" else 0)
    h = layer.mlp(layer.post_attention_layernorm(x))
    read = {"houlsby": h, "pfeiffer": x + h, "parallel": x}[variant]
    return x + h + a("feedforward", read)


def post_norm(layer: Any, x: Tensor, a: Adapters, variant: str, **given: Any) -> Tensor:
    """BERT: norm(x + attention(x)), then norm(x + mlp(x))."""
    output = layer.attention.output
    h = output.dense(layer.attention.self(x, **given)[0])
    x = output.LayerNorm(x + h + (a("attention", h) if variant == "houlsby" else 0))
    h = layer.output.dense(layer.intermediate(x))
    read = {"houlsby": h, "pfeiffer": layer.output.LayerNorm(x + h), "parallel": x}[variant]
    return layer.output.LayerNorm(x + h + a("feedforward", read))


def side_by_side(layer: Any, x: Tensor, a: Adapters, variant: str, **given: Any) -> Tensor:
    """GPT-NeoX: x + attention(norm(x)) + mlp(norm(x))."""
    attended = layer.attention(layer.input_layernorm(x), **given)[0]
    h = layer.mlp(layer.post_attention_layernorm(x))
    if variant == "houlsby":
        attended = attended + a("attention", attended)
    read = {"houlsby": h, "pfeiffer": x + attended + h, "parallel": x}[variant]
    return x + attended + h + a("feedforward", read)


LAYERS = {"llama": pre_norm, "bert": post_norm, "gpt_neox": side_by_side}
OPTIONS: list[dict[str, Any]] = [
    {"variant": "pfeiffer"},
    {"variant": "pfeiffer", "non_linearity": "tanh", "reduction_factor": 5, "scaling": 0.5},
    {"variant": "houlsby"},
    {"variant": "houlsby", "non_linearity": "gelu", "scaling": "learned"},
    {"variant": "parallel"},
    {"variant": "parallel", "non_linearity": "leakyrelu", "reduction_factor": 100},
]
SCALES = {"pfeiffer": 1.0, "houlsby": 1.0, "parallel": 4.0}


def attached(family: str, options: dict[str, Any], dropout: float = 0.0, *, filled: bool = True) -> Policy:
    policy = policy_of(family, packed=False)
    Bottleneck(Bottleneck.Options.model_validate(options), dropout).attach(policy)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in policy.model.named_parameters():
        if filled and parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3 + name.endswith("scaling")
    return policy.eval()


def calls(model: nn.Module) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each layer of a model is called with, on some tokens."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def record(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        mask = {"attention_mask": args[1]} if len(args) > 1 else {}
        found.append((args[0], {**mask, **given}))

    for layer in layers(model).values():
        layer.register_forward_pre_hook(record, with_kwargs=True)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    model.eval()(input_ids=ids, use_cache=False) if "Bert" not in type(model).__name__ else model.eval()(input_ids=ids)
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_layer_computes_the_formula(family: str, options: dict[str, Any]) -> None:
    plain = model_of(family)
    inputs = calls(plain)
    variant = options["variant"]
    activation = ACTIVATIONS[options.get("non_linearity", "swish" if variant == "houlsby" else "relu")]
    adapted = list(layers(attached(family, options).model).values())
    untouched = list(layers(model_of(family).eval()).values())
    for (x, given), ours, base in zip(inputs, adapted, untouched, strict=True):
        weights = dict(ours.named_parameters())
        assert weights["adapters.feedforward.down.weight"].shape == (
            max(1, int(32 // options.get("reduction_factor", 16))),
            32,
        )

        def a(place: str, z: Tensor, weights: Mapping[str, Tensor] = weights) -> Tensor:
            own = {k.removeprefix(f"adapters.{place}."): v for k, v in weights.items() if f"adapters.{place}." in k}
            scale = own.get("scaling", options.get("scaling", SCALES[variant]))
            inner = activation(z @ own["down.weight"].T + own["down.bias"])
            return scale * (inner @ own["up.weight"].T + own["up.bias"])

        found = ours(x, **given)
        found = found if isinstance(found, Tensor) else found[0]
        torch.testing.assert_close(found, LAYERS[family](base, x, a, variant, **given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("family", ["llama", "bert", "falcon", "t5", "bart", "mixtral"])
def test_training_begins_with_the_base_to_the_bit(family: str, variant: str) -> None:
    objective, examples = objective_of(family), examples_of(family)
    begun = outputs(attached(family, {"variant": variant}, 0.3, filled=False).train(), objective, examples)
    assert torch.equal(begun, outputs(policy_of(family, packed=False), objective, examples))


def test_dropout_falls_on_what_the_adapter_adds_while_training() -> None:
    policy = attached("llama", {}, dropout=0.5)
    adapter: Any = next(iter(layers(policy.model).values())).get_submodule("adapters.feedforward")
    x = torch.randn(400, 32)
    kept = adapter.eval()(x)
    torch.manual_seed(0)
    dropped = adapter.train()(x)
    zero = dropped == 0
    assert 0.4 < float(zero.float().mean()) < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


def test_an_adapter_keeps_the_dtype_of_the_stream() -> None:
    policy = attached("llama", {"scaling": "learned"})
    adapter: Any = next(iter(layers(policy.model).values())).get_submodule("adapters.feedforward")
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_kernels_of_whole_decoder_layers_leave_a_layer_with_adapters_alone() -> None:
    """They call none of its modules, so hooks would not run."""
    from tunesmith.kernels.decoder_layer import _is_built_as_served  # pyright: ignore[reportPrivateUsage]

    def built(policy: Policy) -> bool:
        layer = next(iter(layers(policy.model.bfloat16().requires_grad_(False)).values()))
        return _is_built_as_served(layer)

    assert built(policy_of("llama"))
    assert not any(built(attached("llama", {"variant": v})) for v in ("pfeiffer", "houlsby", "parallel"))


def test_a_family_that_is_not_known_is_refused_with_those_that_are() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(
            OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32)
        )
    with pytest.raises(InputError, match="layer of opt models") as refusal:
        sites_of(next(iter(layers(model).values())), "opt")
    assert "llama" in refusal.value.remedy


def test_a_folder_without_adapters_or_with_others_is_refused(tmp_path: Path) -> None:
    Bottleneck(Bottleneck.Options(), 0.0).export(attached("llama", {}), tmp_path)
    for other in ({"reduction_factor": 4}, {"variant": "houlsby"}):
        method = Bottleneck(Bottleneck.Options.model_validate(other), 0.0)
        with pytest.raises(InputError, match=r"adapter.safetensors holds adapters of another shape or place"):
            method.load(policy_of("llama"), tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter.safetensors is missing"):
        Bottleneck(Bottleneck.Options(), 0.0).load(policy_of("llama"), tmp_path)


def test_options_of_a_variant_are_its_paper_s() -> None:
    assert Bottleneck.Options(variant="houlsby").non_linearity == "swish"
    assert Bottleneck.Options(variant="parallel").scaling == 4.0
    assert Bottleneck.Options(variant="parallel", scaling=1.0).scaling == 1.0
    assert Bottleneck.Options().non_linearity == "relu"
    assert Bottleneck.Options().reduction_factor == 16
    with pytest.raises(ValidationError):
        Bottleneck.Options.model_validate({"variant": "serial"})
    with pytest.raises(ValidationError):
        Bottleneck.Options.model_validate({"variant": ["pfeiffer"]})
