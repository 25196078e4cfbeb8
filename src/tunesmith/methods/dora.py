"""DoRA: magnitude and direction of each weight trained apart (Liu et al. 2024, arXiv 2402.09353), through PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import field_validator

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS, starts
from tunesmith.methods.lora import Lora
from tunesmith.models.policy import Policy

if TYPE_CHECKING:
    from peft import LoraConfig


@METHODS.register("dora")
class Dora(Lora):
    """h = m (W + (alpha / rank) B A) x / |W + (alpha / rank) B A| by columns, with m, B and A trained (equation 5)."""

    facts: MethodFacts = replace(
        Lora.facts,
        summary="LoRA with the weights' magnitudes trained apart: often better at low rank, slower",
        when="LoRA at rank 8 or less is not good enough, and a slower step is no matter",
        learning_rate_source="LoRA's, as Liu et al. 2024 compare the two",
        frozen_in=frozenset({"int4"}),
        combines=frozenset(),  # magnitudes of different weights have no sum
        stands_on=frozenset(),  # and those of a weight are not those of a sum that it is part of
    )

    class Options(Lora.Options):
        """LoRA's, without the starts that need a second adapter: the magnitudes belong to one update."""

        @field_validator("init")
        @classmethod
        def _starts_at_no_update(cls, init: str) -> str:
            if init in starts.STARTS:
                raise ValueError(f"dora cannot start at {init}; use default, gaussian or eva")
            return init

    def config(self, policy: Policy) -> LoraConfig:
        config = super().config(policy)
        config.use_dora = True
        return config
