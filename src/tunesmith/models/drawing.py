"""How a saved model draws its answers: by its card for us, by generation_config.json for others."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.types import SampleSpec

if TYPE_CHECKING:
    from tunesmith.models.policy import Policy
    from tunesmith.recipe_evaluation import Decoding

CARD_KEY, FILE = "decoding", "generation_config.json"


@dataclass(frozen=True, slots=True)
class Setting:
    """How answers are drawn, as `SampleSpec` has it; greedy if nothing is said."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def plainness(self) -> tuple[int, float, float, int]:
        """The smaller, the simpler: how many of the three are in use, then how far each goes."""
        used = (self.temperature > 0) + (self.top_p < 1) + (self.top_k > 0)
        return used, self.temperature, 1 - self.top_p, self.top_k

    def spec(self, max_new_tokens: int, seed: int) -> SampleSpec:
        return SampleSpec(max_new_tokens, self.temperature, self.top_p, self.top_k, seed=seed)

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        cut = f", top_p {self.top_p:g}" * (self.top_p < 1) + f", top_k {self.top_k}" * (self.top_k > 0)
        return f"temperature {self.temperature:g}{cut}"


def settings(asked: Decoding) -> list[Setting]:
    """Those that a recipe asks for, the simplest first. At temperature 0 nothing is cut: it is one setting."""
    found = {
        Setting(temperature, top_p, top_k) if temperature > 0 else Setting()
        for temperature, top_p, top_k in itertools.product(asked.temperature, asked.top_p, asked.top_k)
    }
    return sorted(found, key=lambda setting: setting.plainness)


@dataclass(frozen=True, slots=True)
class Drawn:
    """How a saved model and its base draw answers; greedily where the recipe did not ask for more."""

    tuned: Setting = Setting()
    base: Setting = Setting()
    seed: int = 0

    def specs(self, max_new_tokens: int) -> tuple[SampleSpec, SampleSpec]:
        """Of the tuned model, and of the base."""
        return self.tuned.spec(max_new_tokens, self.seed), self.base.spec(max_new_tokens, self.seed)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_card(card: Mapping[str, Any]) -> Drawn:
    """That of a saved model, by its card."""
    told = card.get(CARD_KEY)
    if told is None:
        return Drawn()
    return Drawn(Setting(**told["tuned"]), Setting(**told["base"]), int(told["seed"]))


def save(folder: Path, policy: Policy, drawn: Drawn, max_new_tokens: int) -> None:
    """Writes FILE, by which transformers draws: the model's own, and how it answers over that."""
    config, setting, sampled = copy.deepcopy(policy.model.generation_config), drawn.tuned, drawn.tuned.temperature > 0
    config.update(
        do_sample=sampled,
        temperature=setting.temperature if sampled else None,
        top_p=setting.top_p if sampled else None,
        top_k=setting.top_k if sampled else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(policy.tokens.end),
        pad_token_id=policy.tokens.pad,
    )
    config.save_pretrained(str(folder))
