"""LoRA: a low-rank update beside each linear layer (Hu et al. 2021, arXiv 2106.09685), through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import PeftAdapter, has_transposed_linears, task_type
from tunesmith.models.policy import Policy
from tunesmith.recipe import Positive, Strict
from tunesmith.types import MethodFacts

if TYPE_CHECKING:
    from peft import PeftConfig


@METHODS.register("lora")
class Lora(PeftAdapter):
    """h = W x + (alpha / rank) B A x with W frozen (equation 3); B starts at 0."""

    facts: MethodFacts = MethodFacts(
        summary="low-rank updates of the linear layers: about 1% of the parameters, switchable, mergeable",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=2e-4,
        learning_rate_source="Hu et al. 2021 (table 11) for GPT-2, and Dettmers et al. 2023 (QLoRA) up to 13B",
    )

    class Options(Strict):
        """rank: width of the update; alpha: its scale (2 x rank); targets: layers by name, or all-linear."""

        rank: Positive = 16
        alpha: Annotated[float, Field(gt=0)] | None = None
        targets: Literal["all-linear"] | list[str] = "all-linear"

    options: Options

    def config(self, policy: Policy) -> PeftConfig:
        from peft import LoraConfig

        rank, alpha = self.options.rank, self.options.alpha
        return LoraConfig(
            r=rank,
            lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.options.targets,
            fan_in_fan_out=has_transposed_linears(policy),
            task_type=task_type(policy),
        )
