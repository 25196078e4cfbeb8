"""Full fine-tuning: every parameter of the base trains."""

from __future__ import annotations

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.own_weights import OwnWeights
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Strict


@METHODS.register("full")
class Full(OwnWeights):
    """Trains all weights, tied ones together; the result is a model of its own."""

    facts: MethodFacts = MethodFacts(
        summary="every parameter: the most capacity, memory and forgetting; the result is a whole model",
        when="much data, or a domain far from the base's, and memory for 16 bytes a parameter (6 by adamw_8bit)",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="snapshot",
        multiplies_in=frozenset({"fp8"}),
        learning_rate=5e-5,
        learning_rate_source="the largest of the rates that Devlin et al. 2019 (A.3) choose from",
    )

    class Options(Strict):
        """full has no options."""

    def chosen(self, policy: Policy) -> set[str]:
        return {name for name, _ in policy.model.named_parameters()}
