"""IA3: vectors that scale keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunesmith.declared import Combination, MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import (
    Names,
    PeftAdapter,
    has_transposed_linears,
    linear_layers,
    linear_names,
    task_type,
)
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Strict

if TYPE_CHECKING:
    from peft import IA3Config

# Where families keep keys and values, and the layer that reads the feed-forward's inner activations.
OUTER = (".k_proj", ".v_proj", ".key", ".value", ".key_proj", ".value_proj", ".k", ".v")
OUTER_JOINT = (".qkv_proj", ".query_key_value", ".c_attn", ".Wqkv")
INNER = (".down_proj", ".dense_4h_to_h", ".fc2", ".wo", ".output.dense", ".mlp.Wo", ".mlp.c_proj")
NOT_INNER = (".attention.output.dense", ".attn.c_proj")


@METHODS.register("ia3")
class Ia3(PeftAdapter):
    """Three learned vectors a layer: l_k * K, l_v * V, and W2 (l_ff * f(W1 x)) (equation 1)."""

    facts: MethodFacts = MethodFacts(
        summary="three scaling vectors a layer: the fewest parameters, for few examples",
        when="a few dozen rows, or very many adapters to keep",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=3e-3,
        learning_rate_source="Liu et al. 2022, who use it for every task",
        stands_on=frozenset({"ia3"}),
        combines=frozenset({"linear"}),
    )

    class Options(Strict):
        """Which layers are scaled; the family's own by default."""

        targets: Names | None = Field(None, description="layers whose outputs are scaled: keys and values")
        feedforward: Names | None = Field(None, description="layers whose inputs are scaled instead")

        @model_validator(mode="after")
        def _apart(self) -> Ia3.Options:
            for name in self.targets or ():
                if name in (self.feedforward or ()):
                    raise ValueError(f"{name!r} stands in targets and in feedforward; keep it in one")
            return self

    options: Options

    def config(self, policy: Policy) -> IA3Config:
        from peft import IA3Config

        linear = linear_layers(policy.model)
        outer = self.options.targets or [name for name in linear if name.endswith(OUTER + OUTER_JOINT)]
        inner = self.options.feedforward
        if inner is None:
            inner = [name for name in linear if name.endswith(INNER) and not name.endswith(NOT_INNER)]
        if not outer or not inner:
            known = ", ".join(linear_names(policy.model))
            raise InputError(
                f"method ia3 does not know where {type(policy.model).__name__} keeps its keys, values and feed-forward",
                f"give method.targets and method.feedforward; its linear layers: {known}",
            )
        return IA3Config(
            target_modules=[*outer, *inner],
            feedforward_modules=inner,
            fan_in_fan_out=has_transposed_linears(policy),
            task_type=task_type(policy),
        )

    @classmethod
    def combine(cls, folders: Sequence[Path], combination: Combination, to: Path) -> Options:
        """1 + sum of weight * (l - 1): a vector of ones changes nothing, and neither does a layer left alone."""
        from peft import IA3Config
        from safetensors.torch import load_file, save_file

        configs = [cast("IA3Config", IA3Config.from_pretrained(str(folder))) for folder in folders]
        states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        merged: dict[str, Tensor] = {}
        for key in sorted({key for state in states for key in state}):
            held = [(weight, s[key]) for weight, s in zip(combination.weights, states, strict=True) if key in s]
            if len({vector.shape for _, vector in held}) > 1:
                raise InputError(
                    f"{key} scales a layer's inputs in one adapter and its outputs in another",
                    "combine adapters with the same targets and feedforward",
                )
            merged[key] = 1 + sum((weight * (vector.float() - 1) for weight, vector in held), torch.zeros(()))
        targets, inner = (
            sorted({name for config in configs for name in getattr(config, key) or []})
            for key in ("target_modules", "feedforward_modules")
        )
        made = replace(configs[0], target_modules=targets, feedforward_modules=inner, inference_mode=True)
        save_file(merged, to / "adapter_model.safetensors", metadata={"format": "pt"})
        made.save_pretrained(str(to))
        return cls.Options(targets=[name for name in targets if name not in inner], feedforward=inner)
