"""LoKr: an update that is a Kronecker product of small matrices (LyCORIS, Yeh et al. 2024, 2309.14859)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import LowRankOptions, PeftAdapter, task_type
from tunesmith.models.policy import Policy

if TYPE_CHECKING:
    from peft import LoKrConfig


@METHODS.register("lokr")
class Lokr(PeftAdapter):
    """h = W x + (alpha / rank) (C kron (B A)) x (section 3)."""

    facts: MethodFacts = MethodFacts(
        summary="a Kronecker product of small matrices: full rank for few parameters",
        when="the smallest adapter files that can still be of full rank",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=3e-3,
        learning_rate_source="best of 3e-3 (0.859) and 1e-2 (0.843) on 10 rows a class of BANKING77, four epochs",
        stands_on=frozenset({"lokr"}),
    )

    class Options(LowRankOptions):
        """The width of the factors, their scale, and the layers they stand beside."""

    options: Options

    def config(self, policy: Policy) -> LoKrConfig:
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.options.rank,
            alpha=self.options.scale,  # type: ignore[arg-type]
            module_dropout=self.dropout,
            target_modules=self.options.targets,
            task_type=task_type(policy),  # type: ignore[arg-type]
        )
