"""Feature extraction: the backbone is frozen; the fresh head, or the output projection, trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import nn

from tunesmith.declared import MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.own_weights import OwnWeights
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Strict


@METHODS.register("head")
class HeadOnly(OwnWeights):
    """Trains a head on pooled vectors that the frozen base makes once per example, or the base's output projection."""

    facts: MethodFacts = MethodFacts(
        summary="the head alone, on cached vectors of the frozen base: seconds of training",
        when="few rows or little time: the base's vectors are good already; also the first baseline to beat",
        kinds=frozenset({"decoder", "encoder"}),
        heads=frozenset({"pooled", "lm"}),
        reference="snapshot",
        learning_rate=3e-3,
        learning_rate_source="better than 1e-2 on BANKING77 (0.923 against 0.919)",
        frozen_backbone=True,
        moves_output=True,
    )

    class Options(Strict):
        """What a head of the model's own may need."""

        untie: bool = Field(
            False,
            description="give the output projection weights of its own where the base shares them with the embeddings",
        )

    def __init__(self, options: Any, dropout: float) -> None:
        super().__init__(options, dropout)
        self._dropout = dropout
        self.facts = replace(self.facts, unties=options.untie)

    def attach(self, policy: Policy) -> None:
        if self.options.untie:
            _untie(policy.model)
        super().attach(policy)
        for head in policy.heads.values():
            assert isinstance(head, Head)
            head.set_dropout(self._dropout)

    def chosen(self, policy: Policy) -> set[str]:
        """The output projection where there is no fresh head."""
        if len(policy.heads):
            return set()
        output = {id(p) for p in policy.model.get_output_embeddings().parameters()}
        return {name for name, p in policy.model.named_parameters() if id(p) in output}


def _untie(model: Any) -> None:
    """A copy of the shared weights for the output projection; the embeddings stay as they are."""
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    if output is None or output.weight is not model.get_input_embeddings().weight:
        raise InputError(
            f"method.untie: {type(model).__name__} has no output projection that it shares with its embeddings",
            "leave untie out",
        )
    output.weight = nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = config.tie_word_embeddings = False
