"""Where a layer of each family takes adapters, and the hooks through which they act.

With x the residual stream, h what a sub-layer adds to it and A an adapter, an adapter makes of the sum x + h
    after_sublayer   x + h + A(h)
    after_sum        x + h + A(x + h), or A(norm(x + h)) where a norm follows the sum
    beside_sublayer  x + h + A(x)
Hooks see the model's own calls, so packing, recomputation and caches stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor, nn

from tunesmith.errors import InputError
from tunesmith.recipe_keys import Strict


class Sublayer(Strict):
    """Paths of modules, from the layer; see adapter_sites.yaml."""

    output: str
    residual: str = ""
    norm: str = ""


class Sites(Strict):
    """How layers of some model types are built, and how the `adapters` library calls what we put there."""

    types: tuple[str, ...]
    attention: Sublayer
    feedforward: Sublayer
    hub: Mapping[str, str] | None = None
    heads: Mapping[str, str] = {}
    interface: Mapping[str, str | None] | None = None
    interface_pfeiffer: Mapping[str, str] = {}

    def sublayer(self, place: str) -> Sublayer:
        return {"attention": self.attention, "feedforward": self.feedforward}[place]


@cache
def known_sites() -> tuple[Sites, ...]:
    """The whole of adapter_sites.yaml."""
    from ruamel.yaml import YAML

    text = files("tunesmith.methods").joinpath("adapter_sites.yaml").read_text(encoding="utf-8")
    return tuple(Sites.model_validate(entry) for entry in YAML(typ="safe").load(text))


def sites_of(layer: nn.Module, model_type: str) -> Sites:
    """The sites of one layer. InputError for a family that is not known."""
    have = {name for name, _ in layer.named_modules()}
    for sites in known_sites():
        needed = [sites.attention.output, sites.feedforward.output, sites.feedforward.residual, sites.feedforward.norm]
        if model_type in sites.types and have.issuperset(filter(None, needed)):
            return sites
    known = sorted({name for sites in known_sites() for name in sites.types})
    raise InputError(
        f"method bottleneck does not know where a layer of {model_type} models takes adapters",
        f"use lora, or a base of type {', '.join(known)}",
    )


class Switch:
    """Whether the adapters of a model act now."""

    on: bool = True


Place = Callable[[nn.Module, Sublayer, nn.Module, Switch], None]


def after_sublayer(layer: nn.Module, site: Sublayer, adapter: nn.Module, switch: Switch) -> None:
    """Houlsby et al. 2019 (arXiv 1902.00751), figure 2: in front of the sum."""

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        return _with_first(output, lambda h: h + adapter(h)) if switch.on else None

    layer.get_submodule(site.output).register_forward_hook(add)


def after_sum(layer: nn.Module, site: Sublayer, adapter: nn.Module, switch: Switch) -> None:
    """Pfeiffer et al. 2020 (arXiv 2005.00247), figure 3 of the appendix: on the normalised sum."""

    def add_to_output(_: nn.Module, args: Any, output: Any) -> Any:
        return _with_first(output, lambda s: s + adapter(s)) if switch.on else None

    def add_to_input(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        s, *rest = args
        return (s + adapter(norm.forward(s)), *rest) if switch.on else None

    if site.norm:
        layer.get_submodule(site.norm).register_forward_pre_hook(add_to_input)
    else:
        layer.register_forward_hook(add_to_output)


def beside_sublayer(layer: nn.Module, site: Sublayer, adapter: nn.Module, switch: Switch) -> None:
    """He et al. 2021 (arXiv 2110.04366), table 1: reads what the sub-layer reads, its norm left out."""
    held: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        held[:] = args[:1]

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        x = held.pop()
        return _with_first(output, lambda h: h + adapter(x).to(h.dtype)) if switch.on else None

    layer.get_submodule(site.residual).register_forward_pre_hook(keep)
    layer.get_submodule(site.output).register_forward_hook(add)


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's result, its hidden states changed; some return more than those."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])
