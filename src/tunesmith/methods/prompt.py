"""Prompt tuning: trained embeddings before each text, and nothing else (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.declared import MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.virtual_tokens import VirtualMethod, VirtualOptions
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import Virtual, VirtualTokens

if TYPE_CHECKING:
    from peft import PromptTuningConfig

DRAWN = 1024  # rows of the vocabulary that tell how large embeddings are


class Prompt(VirtualTokens):
    """The embeddings themselves."""

    def __init__(self, embeddings_PD: Tensor) -> None:
        super().__init__(len(embeddings_PD))
        self.embedding = nn.Parameter(embeddings_PD)

    def forward(self) -> Tensor:
        return self.embedding


@METHODS.register("prompt")
class PromptTuning(VirtualMethod):
    """P free vectors stand where P more tokens would: [p_1 .. p_P; x_1 .. x_T] (section 2)."""

    facts: MethodFacts = MethodFacts(
        summary="embeddings of virtual tokens before each text: a few thousand parameters, the base untouched",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        when="many tasks over one base in memory: an adapter is a few kilobytes",
        learning_rate=3e-2,
        learning_rate_source="better than 1e-2 in short runs on BANKING77 (0.752 against 0.672)",
    )

    class Options(VirtualOptions):
        """How many, and what they begin as."""

        init: Literal["vocabulary", "random", "text"] = Field(
            "vocabulary",
            description="begin as tokens drawn from the vocabulary, drawn like them, or as those of method.text",
        )
        text: str | None = Field(None, description="what they begin as with init: text, repeated or cut to fit")

        @model_validator(mode="after")
        def _text_for_text(self) -> PromptTuning.Options:
            if (self.init == "text") != bool(self.text):
                raise ValueError("init: text and a text belong together; give both or neither")
            return self

    options: Options

    def made(self, policy: Policy) -> Virtual:
        return Prompt(_START[self.options.init](policy, self.options))

    def config(self, policy: Policy, **shape: Any) -> PromptTuningConfig:
        from peft import PromptTuningConfig

        return PromptTuningConfig(**shape)


@torch.no_grad()
def _vocabulary(policy: Policy, options: PromptTuning.Options) -> Tensor:
    """Embeddings of drawn tokens."""
    return policy.embedded(_drawn(policy, options.virtual_tokens)).float()


@torch.no_grad()
def _random(policy: Policy, options: PromptTuning.Options) -> Tensor:
    """Normal, with each width's own mean and deviation over the vocabulary: the sizes that the layers know."""
    some_ND = policy.embedded(_drawn(policy, DRAWN)).float()
    return some_ND.mean(0) + some_ND.std(0) * torch.randn(options.virtual_tokens, policy.width, device=policy.device)


@torch.no_grad()
def _text(policy: Policy, options: PromptTuning.Options) -> Tensor:
    ids = policy.tokens.encode(options.text or "")
    if not ids:
        raise InputError("method.text holds no token of the model's", "give some words of the task")
    repeated = (ids * (options.virtual_tokens // len(ids) + 1))[: options.virtual_tokens]
    return policy.embedded(torch.tensor(repeated, device=policy.device)).float()


def _drawn(policy: Policy, count: int) -> Tensor:
    size = int(policy.config.get_text_config().vocab_size)
    return torch.randint(size, (count,), device="cpu").to(policy.device)


_START = {"vocabulary": _vocabulary, "random": _random, "text": _text}
