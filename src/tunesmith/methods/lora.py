"""LoRA: a low-rank update beside each linear layer (Hu et al. 2021, arXiv 2106.09685), through PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tunesmith.declared import Combination, MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS, low_rank_sum, starts
from tunesmith.methods.peft_adapter import (
    LowRankOptions,
    PeftAdapter,
    has_transposed_linears,
    linear_layers,
    task_type,
    token_rows,
)
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Positive
from tunesmith.types import Batch

if TYPE_CHECKING:
    from peft import LoraConfig


@METHODS.register("lora")
class Lora(PeftAdapter):
    """h = W x + (alpha / rank) B A x with W frozen (equation 3); B starts at 0."""

    facts: MethodFacts = MethodFacts(
        summary="low-rank updates of the linear layers: about 1% of the parameters, switchable, mergeable",
        when="the usual choice: near full fine-tuning's quality in a fraction of its memory",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=2e-4,
        learning_rate_source="Hu et al. 2021 (table 11) for GPT-2, and Dettmers et al. 2023 (QLoRA) up to 13B",
        frozen_in=frozenset({"fp8", "int4"}),
        combines=frozenset(low_rank_sum.WAYS),
        stands_on=frozenset({"lora", "dora"}),
    )

    class Options(LowRankOptions):
        """Width and scale of the update, where it stands, and how it starts and learns."""

        rslora: bool = Field(
            False, description="scale by alpha / sqrt(rank), so that large ranks learn (Kalajdzievski 2023, 2312.03732)"
        )
        ranks: dict[str, Positive] = Field(
            default_factory=dict, description="other ranks for layers whose names a regular expression matches"
        )
        plus: Annotated[float, Field(ge=1)] = Field(
            1.0, description="how much faster B learns than A; 16 is LoRA+ (Hayou et al. 2024, 2402.12354)"
        )
        init: Literal["default", "gaussian", "pissa", "olora", "eva"] = Field(
            "default",
            description="where A and B start: B at 0 beside a random A (default: uniform), at leading directions of "
            "the weights (pissa, olora), or B at 0 beside those of what the layer reads in training rows (eva)",
        )
        tokens: list[Annotated[str, Field(min_length=1)]] = Field(
            default_factory=list, description="tokens to add to the vocabulary, whose embeddings train with the adapter"
        )

        @field_validator("ranks")
        @classmethod
        def _are_patterns(cls, ranks: dict[str, int]) -> dict[str, int]:
            for pattern in ranks:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"ranks: {pattern!r} is no regular expression: {error}") from error
            return ranks

    options: Options

    def __init__(self, options: Any, dropout: float) -> None:
        super().__init__(options, dropout)
        self._is_offset = options.init in starts.STARTS
        frozen_in = self.facts.frozen_in - ({"fp8"} if self._is_offset else set())  # e4m3 is too rough for B A - B0 A0
        self.facts = replace(self.facts, frozen_in=frozen_in, tokens=tuple(options.tokens))

    def attach(self, policy: Policy) -> None:
        names = linear_layers(policy.model)
        for pattern in self.options.ranks:  # as PEFT reads it, which passes over one that matches nothing
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names):
                raise InputError(
                    f"method.ranks: {pattern!r} is the name of no linear layer of {type(policy.model).__name__}",
                    f"name one as in {names[0]}, by its end or a regular expression",
                )
        super().attach(policy)
        if self._is_offset:
            starts.offset(self._peft, self._without_tokens(policy), starts.STARTS[self.options.init])

    def fit(self, policy: Policy, batches: Iterable[Batch]) -> None:
        if self.options.init == "eva":
            starts.observe(policy, self._peft, batches)

    def export(self, policy: Policy, to: Path) -> None:
        super().export(policy, to)
        if self._is_offset:
            starts.join(self._peft, to)

    def load(self, policy: Policy, source: Path) -> None:
        if not self._is_offset:
            super().load(policy, source)
            return
        super().attach(policy)
        starts.offset(self._peft, self._without_tokens(policy), None)
        starts.split(self._peft, source)

    def config(self, policy: Policy) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.options.rank,
            lora_alpha=self.options.scale,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.options.targets,
            use_rslora=self.options.rslora,
            rank_pattern=dict(self.options.ranks),
            trainable_token_indices=token_rows(policy) if self.options.tokens else None,
            init_lora_weights="gaussian" if self.options.init == "gaussian" else True,
            fan_in_fan_out=has_transposed_linears(policy),
            task_type=task_type(policy),  # type: ignore[arg-type]
        )

    def _without_tokens(self, policy: Policy) -> LoraConfig:
        config = self.config(policy)
        config.trainable_token_indices = None
        return config

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        """B learns `plus` times as fast as the rest."""
        if self.options.plus == 1:
            return super().parameter_groups(policy)
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        fast = {name for name in trained if ".lora_B." in name}
        return [
            {"params": [p for name, p in trained.items() if name not in fast]},
            {"params": [trained[name] for name in trained if name in fast], "times": self.options.plus},
        ]

    @classmethod
    def combine(cls, folders: Sequence[Path], combination: Combination, to: Path) -> Options:
        made = low_rank_sum.combine(folders, combination, to)
        keys = {"rank": made.r, "alpha": made.r, "targets": made.target_modules, "ranks": made.rank_pattern}
        return cls.Options.model_validate(keys)
