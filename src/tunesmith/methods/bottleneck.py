"""Bottleneck adapters: two small layers with a non-linearity between them, in each layer of a frozen base."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS, adapter_hub
from tunesmith.methods.adapter_sites import Place, Switch, after_sublayer, after_sum, beside_sublayer, sites_of
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Strict

# What each variant does at which sub-layers.
PLACES: dict[str, tuple[Place, tuple[str, ...]]] = {
    "pfeiffer": (after_sum, ("feedforward",)),
    "houlsby": (after_sublayer, ("attention", "feedforward")),
    "parallel": (beside_sublayer, ("feedforward",)),
}
# As the `adapters` library has them; 4 for parallel ones is from He et al. 2021, section 4.6.
USUAL = {
    "pfeiffer": {"non_linearity": "relu", "scaling": 1.0},
    "houlsby": {"non_linearity": "swish", "scaling": 1.0},
    "parallel": {"non_linearity": "relu", "scaling": 4.0},
}
NON_LINEARITIES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU,
}


class Adapter(nn.Module):
    """A(x) = scaling * up(f(down(x))): [..., D] -> [..., D], in the dtype of x; 0 at first.

    Houlsby et al. 2019 begin near 0, He et al. 2021 at 0, which is what is done here: then a run begins with its base.
    """

    def __init__(self, width: int, options: Bottleneck.Options, dropout: float) -> None:
        super().__init__()
        inner = max(1, int(width // options.reduction_factor))
        self.down = nn.Linear(width, inner)
        self.non_linearity = NON_LINEARITIES[options.non_linearity]()
        self.up = nn.Linear(inner, width)
        self.scaling = nn.Parameter(torch.ones(1)) if options.scaling == "learned" else options.scaling
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.up(self.non_linearity(self.down(x))) * self.scaling).to(x.dtype)


@METHODS.register("bottleneck")
class Bottleneck:
    """Trains adapters in every layer, after a sub-layer or beside it; cross-attention has none."""

    facts: MethodFacts = MethodFacts(
        summary="small non-linear layers in each layer of the frozen base; loads in AdapterHub's library",
        when="an adapter for AdapterHub's library, or one that no merge can hide: answers take a little longer",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        learning_rate=3e-4,
        learning_rate_source="the middle one of the rates that Houlsby et al. 2019 (section 3.1) choose from",
    )

    class Options(Strict):
        """Where adapters stand and what they compute."""

        variant: Literal["pfeiffer", "houlsby", "parallel"] = Field(
            "pfeiffer",
            description="after the feed-forward; after attention and feed-forward; or beside the feed-forward",
        )
        reduction_factor: Annotated[float, Field(gt=0)] = Field(
            16, description="the model's width divided by the adapter's"
        )
        non_linearity: Literal["relu", "gelu", "swish", "tanh", "leakyrelu"] = Field(
            "relu", description="between the two layers; swish for houlsby if left out"
        )
        scaling: Annotated[float, Field(gt=0)] | Literal["learned"] = Field(
            1.0, description="what the adapter's output is multiplied by, or learned; 4 for parallel if left out"
        )

        @model_validator(mode="before")
        @classmethod
        def _usual(cls, given: Any) -> Any:
            if not isinstance(given, dict):
                return given
            return {**USUAL.get(str(given.get("variant")), {}), **given}

    options: Options

    def __init__(self, options: Any, dropout: float) -> None:
        self.options = options
        self._dropout = dropout
        self._switch = Switch()

    def attach(self, policy: Policy) -> None:
        policy.model.requires_grad_(False)
        model_type = policy.config.get_text_config().model_type
        put, places = PLACES[self.options.variant]
        for layer in layers(policy.model).values():
            sites = sites_of(layer, model_type)
            adapters = nn.ModuleDict(
                {place: Adapter(policy.width, self.options, self._dropout).to(policy.device) for place in places}
            )
            for place, adapter in adapters.items():
                put(layer, sites.sublayer(place), adapter, self._switch)
            layer.add_module(adapter_hub.OURS, adapters)
        policy.heads.requires_grad_(True)

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    @contextmanager
    def reference(self, policy: Policy) -> Generator[None]:
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = True

    def export(self, policy: Policy, to: Path) -> None:
        """A folder for `load_adapter` of AdapterHub's library (`adapters`), where it serves the family."""
        adapter_hub.write(policy, to, self.options.model_dump(mode="json"), PLACES[self.options.variant][1])

    def load(self, policy: Policy, source: Path) -> None:
        self.attach(policy)
        adapter_hub.read(policy, source)
