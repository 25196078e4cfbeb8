"""IA3: vectors that scale keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import PeftAdapter, has_transposed_linears, linear_layers, linear_names, task_type
from tunesmith.models.policy import Policy
from tunesmith.recipe import Strict
from tunesmith.types import MethodFacts

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
    )

    class Options(Strict):
        """Which layers are scaled; the family's own by default."""

        targets: list[str] | None = Field(None, description="layers whose outputs are scaled: keys and values")
        feedforward: list[str] | None = Field(None, description="layers whose inputs are scaled instead")

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
