"""Partial fine-tuning: some layers, norms, biases or named parameters of the base train."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.declared import MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.own_weights import OwnWeights
from tunesmith.methods.unfreeze import Unfreeze
from tunesmith.models import layers
from tunesmith.models.policy import Policy
from tunesmith.protocols import GradientRule
from tunesmith.recipe_keys import Strict

TOP = 0.25
FEW_RATE = 1e-3
FEW_SOURCE = "better for the norms of SmolLM2 than 1e-4 on the task of the demo (field accuracy 0.714 against 0.252)"
Pattern = Annotated[str, Field(min_length=1)]


@METHODS.register("partial")
class Partial(OwnWeights):
    """Trains what its options choose; `only: biases` is BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    facts: MethodFacts = MethodFacts(
        summary="the top layers, or any layers, norms, biases or parameters by pattern: less memory than full",
        when="full is too much: the top layers, the norms or the biases alone (BitFit)",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="snapshot",
        learning_rate=1e-4,
        learning_rate_source="twice the rate of full: fewer weights have to make the same change",
    )

    class Options(Strict):
        """Which parameters train."""

        top: Annotated[float, Field(gt=0)] | None = Field(
            None, description="that many layers from the top; below 1, that share of them (0.25 if nothing is chosen)"
        )
        layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
            None, description="first and last layer to train, counted from 0 at the bottom"
        )
        parameters: list[Pattern] | None = Field(
            None, description="regular expressions; parameters whose names one of them is found in"
        )
        only: Literal["all", "norms", "biases"] = Field(
            "all", description="of what is chosen, the norms or the biases alone (then of all layers by default)"
        )
        gradual: Annotated[float, Field(gt=0, le=1)] | None = Field(
            None, description="share of the run in which the layers begin to train, one by one from the top"
        )

        @property
        def implied(self) -> dict[str, tuple[float, str]]:
            """What an option that is left out comes to, and why."""
            chosen = self.layers is not None or self.parameters is not None or self.only != "all"
            return {} if chosen else {"top": (TOP, "that share of the layers, where nothing is chosen")}

        @model_validator(mode="after")
        def _one_choice(self) -> Partial.Options:
            if sum(choice is not None for choice in (self.top, self.layers, self.parameters)) > 1:
                raise ValueError("top, layers and parameters exclude each other; keep one")
            if self.layers is not None and self.layers[0] > self.layers[1]:
                raise ValueError("layers is [first, last], and first comes after last")
            if self.top is not None and self.top > 1 and self.top % 1:
                raise ValueError(f"top is {self.top:g}; give a whole number of layers, or a share of them below 1")
            for pattern in self.parameters or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"parameters: {pattern!r} is no regular expression: {error}") from error
            return self

    options: Options

    def __init__(self, options: Options, dropout: float) -> None:
        super().__init__(options, dropout)
        if options.only != "all":
            self.facts = replace(self.facts, learning_rate=FEW_RATE, learning_rate_source=FEW_SOURCE)

    def chosen(self, policy: Policy) -> set[str]:
        options, model = self.options, policy.model
        every = {name for name, _ in model.named_parameters()}
        limited = {"all": every, "norms": layers.norm_parameters(model), "biases": layers.bias_parameters(model)}
        names = self._selected(model, every) & limited[options.only]
        if not names:
            what = {"all": "parameter", "norms": "norm", "biases": "bias"}[options.only]
            shown = ", ".join(sorted(every)[:3])
            raise InputError(
                f"method partial chooses no {what} of {type(model).__name__}",
                f"choose others; its parameters are called {shown}, ...",
            )
        return names

    def rules(self, policy: Policy, total_steps: int) -> list[GradientRule]:
        """With `gradual`, layers wait for their turn."""
        if self.options.gradual is None:
            return []
        trained = {n for n, p in policy.named_parameters() if p.requires_grad and n.startswith("model.")}
        depths = [
            {f"model.{layer}.{name}" for name, _ in module.named_parameters()} & trained
            for layer, module in layers.layers(policy.model).items()
        ]
        blocks = [names for names in reversed(depths) if names]
        return [Unfreeze(blocks, trained.difference(*blocks), total_steps, self.options.gradual)]

    def _selected(self, model: Any, every: set[str]) -> set[str]:
        options = self.options
        if options.parameters is not None:
            for pattern in options.parameters:
                if not any(re.search(pattern, name) for name in every):
                    raise InputError(
                        f"method.parameters: {pattern!r} is found in no parameter's name of {type(model).__name__}",
                        f"its parameters are called {', '.join(sorted(every)[:3])}, ...",
                    )
            return {name for name in every if any(re.search(pattern, name) for pattern in options.parameters)}
        if options.layers is None and options.top is None and options.only != "all":
            return every
        named = list(layers.layers(model))
        first, last = self._range(len(named), type(model).__name__)
        inside = tuple(f"{name}." for name in named[first : last + 1])
        above = layers.parameters_above(model) if last + 1 == len(named) else set[str]()
        return {name for name in every if name.startswith(inside)} | above

    def _range(self, count: int, model: str) -> tuple[int, int]:
        if self.options.layers is not None:
            first, last = self.options.layers
        else:
            top = self.options.top or TOP
            if top > count:
                raise InputError(f"method.top is {top:g}, and {model} has {count} layers", "set it to that or less")
            first, last = count - (math.ceil(top * count) if top < 1 else int(top)), count - 1
        if first < 0 or last >= count:
            raise InputError(f"method partial names layers that {model} lacks: it has {count}", f"stay below {count}")
        return first, last
