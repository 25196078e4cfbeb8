"""LoHa: an update that is the element-wise product of two low-rank ones (Hyeon-Woo et al. 2022, 2108.06098)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import LowRankOptions, PeftAdapter, task_type
from tunesmith.models.policy import Policy

if TYPE_CHECKING:
    from peft import LoHaConfig


@METHODS.register("loha")
class Loha(PeftAdapter):
    """h = W x + (alpha / rank) ((B1 A1) * (B2 A2)) x (proposition 1)."""

    facts: MethodFacts = MethodFacts(
        summary="the product of two low-rank updates: rank squared for twice the parameters",
        when="a higher rank than LoRA for the same number of parameters",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=3e-3,
        learning_rate_source="best of 3e-3 (0.855) and 1e-2 (0.850) on 10 rows a class of BANKING77, four epochs",
        stands_on=frozenset({"loha"}),
    )

    class Options(LowRankOptions):
        """The width of the factors, their scale, and the layers they stand beside."""

    options: Options

    def config(self, policy: Policy) -> LoHaConfig:
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.options.rank,
            alpha=self.options.scale,  # type: ignore[arg-type]
            module_dropout=self.dropout,
            target_modules=self.options.targets,
            task_type=task_type(policy),  # type: ignore[arg-type]
        )
