"""VeRA: fixed random projections, and vectors that scale them (Kopiczko et al. 2024, arXiv 2310.11454)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import PeftAdapter, Targets, has_transposed_linears, task_type
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Positive, Strict

if TYPE_CHECKING:
    from peft import VeraConfig


@METHODS.register("vera")
class Vera(PeftAdapter):
    """h = W x + diag(b) B diag(d) A x with A and B random, shared by all layers and frozen (equation 2)."""

    facts: MethodFacts = MethodFacts(
        summary="two vectors a layer over shared random projections: a tenth of LoRA's parameters",
        when="hundreds of adapters on one base: each is a tenth of LoRA's",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=4e-3,
        learning_rate_source="Kopiczko et al. 2024, who train it with rates ten times LoRA's and more",
        stands_on=frozenset({"vera"}),
    )

    class Options(Strict):
        """Width of the random projections, and the layers they stand beside."""

        rank: Positive = Field(256, description="width of the shared random projections")
        targets: Targets = Field("all-linear", description="linear layers by name, or all-linear")

    options: Options

    def config(self, policy: Policy) -> VeraConfig:
        from peft import VeraConfig

        return VeraConfig(
            r=self.options.rank,
            vera_dropout=self.dropout,
            target_modules=self.options.targets,
            fan_in_fan_out=has_transposed_linears(policy),
            task_type=task_type(policy),
        )
