"""Prefix tuning: trained keys and values before each text, in every layer (Li and Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.virtual_tokens import VirtualMethod, VirtualOptions
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import Virtual, VirtualKeys
from tunesmith.recipe_keys import Positive

if TYPE_CHECKING:
    from peft import PrefixTuningConfig


class Prefix(VirtualKeys):
    """A table of keys and values, or one of `width` and a network that makes them of it (equation 3)."""

    def __init__(self, count: int, layers: int, heads: int, head_width: int, width: int, hidden: int | None) -> None:
        super().__init__(count)
        self.shape = (count, layers, 2, heads, head_width)
        kept = 2 * layers * heads * head_width
        self.embedding = nn.Embedding(count, kept if hidden is None else width)
        self.mlp = (
            None if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, kept))
        )

    def flat(self) -> Tensor:
        """[P, layers * 2 * heads * head width], as PEFT keeps them."""
        return self.embedding.weight if self.mlp is None else self.mlp(self.embedding.weight)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        key_LKPD, value_LKPD = self.flat().view(self.shape).permute(2, 1, 3, 0, 4)
        return list(zip(key_LKPD, value_LKPD, strict=True))


@METHODS.register("prefix")
class PrefixTuning(VirtualMethod):
    """Attention of each layer sees [P_k; k_1 .. k_T] and [P_v; v_1 .. v_T]; the base stays as it is (section 4.2)."""

    facts: MethodFacts = MethodFacts(
        summary="keys and values of virtual tokens in every layer: more room than prompt, the base untouched",
        kinds=frozenset({"decoder", "encoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        when="as prompt, where that learns too little: every layer has its own",
        learning_rate=3e-2,
        learning_rate_source="better than 1e-2 in short runs on BANKING77 (0.772 against 0.715)",
        feeds_attention=True,
    )

    class Options(VirtualOptions):
        """How many, and whether a network makes them."""

        hidden: Positive | None = Field(
            None, description="width of a network that makes them while they train; without one if left out"
        )

    options: Options

    def made(self, policy: Policy) -> Virtual:
        layers, heads, head_width = _attention_of(policy)
        return Prefix(self.options.virtual_tokens, layers, heads, head_width, policy.width, self.options.hidden)

    def config(self, policy: Policy, **shape: Any) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig

        layers, heads, head_width = _attention_of(policy)
        own: dict[str, Any] = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_width}
        return PrefixTuningConfig(**{**shape, **own})


def _attention_of(policy: Policy) -> tuple[int, int, int]:
    """Layers, key heads and the width of a head."""
    config = policy.config.get_text_config()
    heads = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    return int(config.num_hidden_layers), keys, int(getattr(config, "head_dim", None) or policy.width // heads)
