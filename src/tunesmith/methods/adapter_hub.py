"""The folder of a bottleneck adapter, as AdapterHub's library (`adapters`, from 1.0) writes and loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import InputError
from tunesmith.methods.adapter_sites import known_sites, sites_of
from tunesmith.models.heads import Head
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy

WEIGHTS, CONFIG, INTERFACE = "adapter.safetensors", "adapter_config.json", "adapter_interface.json"
HEAD, HEAD_CONFIG = "model_head.safetensors", "head_config.json"
NAME = "tunesmith"  # of the adapter; no attribute of a module may be called so
OURS = "adapters"  # what a layer calls its adapters here
VERSION = "adapters.1.3.0"  # the library whose words these are
NO_HUB = {"attention": "attention_adapters", "feedforward": "output_adapters"}
_KEYS = {"down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias"} | {
    f"up.{own}": f"adapter_up.{own}" for own in ("weight", "bias")
}


def serves(model_type: str) -> bool:
    """Whether the library loads adapters of such a model."""
    return any(model_type in sites.types and sites.hub is not None for sites in known_sites())


def is_plugged(model_type: str) -> bool:
    """Whether the library must be told how such a model is built, by the interface beside the adapter."""
    return any(model_type in sites.types and sites.interface is not None for sites in known_sites())


def write(policy: Policy, to: Path, options: Mapping[str, Any], places: Sequence[str]) -> None:
    """The adapters of a policy with their configuration; the plug-in interface and the head where the library has them.

    `places`: the sub-layers that have adapters.
    """
    to.mkdir(parents=True, exist_ok=True)
    model_type = _type(policy)
    sites = sites_of(next(iter(layers(policy.model).values())), model_type)
    save_file({theirs: p.detach().contiguous() for theirs, p in _parameters(policy).items()}, to / WEIGHTS)
    about = {"hidden_size": policy.width, "model_name": None, "model_type": model_type, "version": VERSION}
    _write_json(
        to / CONFIG,
        {
            **about,
            "config": _config(options, places, _dropout(policy)),
            "model_class": type(policy.model).__name__,
            "name": NAME,
        },
    )
    if sites.interface is not None:
        interface = {
            "adapter_methods": ["bottleneck"],
            "layer_cross_attn": None,
            **sites.interface,
            **(sites.interface_pfeiffer if options["variant"] == "pfeiffer" else {}),
        }
        _write_json(to / INTERFACE, {"interface": interface, "model_type": model_type, "version": VERSION})
    _write_head(policy, to, about, sites.heads.get(model_type))


def read(policy: Policy, source: Path) -> None:
    """Fills a policy's adapters from a folder. InputError where the folder's are others."""
    path = source / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing", "restore it, or train again")
    saved, own = load_file(path), _parameters(policy)
    if {k: v.shape for k, v in saved.items()} != {k: p.shape for k, p in own.items()}:
        raise InputError(f"{path} holds adapters of another shape or place", "restore it, or train again")
    for name, parameter in own.items():
        parameter.data.copy_(saved[name])


def _parameters(policy: Policy) -> dict[str, Tensor]:
    """The adapters' parameters by the library's names."""
    found: dict[str, Tensor] = {}
    for name, layer in layers(policy.model).items():
        places = sites_of(layer, _type(policy)).hub or NO_HUB
        for key, parameter in layer.get_submodule(OURS).named_parameters():
            place, _, own = key.partition(".")
            found[f"{name}.{places[place]}.adapters.{NAME}.{_KEYS.get(own, own)}"] = parameter
    return found


def _config(options: Mapping[str, Any], places: Sequence[str], dropout: float) -> dict[str, Any]:
    """The library's BnConfig."""
    return {
        "mh_adapter": "attention" in places,
        "output_adapter": "feedforward" in places,
        "cross_adapter": False,
        "reduction_factor": options["reduction_factor"],
        "non_linearity": options["non_linearity"],
        "scaling": options["scaling"],
        "is_parallel": options["variant"] == "parallel",
        "original_ln_before": options["variant"] == "pfeiffer",
        "original_ln_after": True,
        "residual_before_ln": True,
        "ln_before": False,
        "ln_after": False,
        "init_weights": "mam_adapter",
        "dropout": dropout,
    }


def _write_head(policy: Policy, to: Path, about: Mapping[str, Any], model_class: str | None) -> None:
    """A linear head on the first position, in the library's words; none for others: poolings, hidden layers, tags.

    The standardisation of its inputs goes into its weights: W (x - m) / s + b = (W / s) x + (b - (W / s) m).
    """
    heads: list[Any] = list(policy.heads.values())
    if model_class is None or policy.pooling != "first" or len(heads) != 1 or heads[0].hidden is not None:
        return
    head: Head = heads[0]
    if head.spec.per_token:
        return
    weight_OD = head.linear.weight.detach() / head.scale_D
    bias_O = head.linear.bias.detach() - weight_OD @ head.mean_D
    save_file({f"heads.{NAME}.1.weight": weight_OD, f"heads.{NAME}.1.bias": bias_O}, to / HEAD)
    config = {
        "head_type": "classification",
        "num_labels": head.spec.outputs,
        "layers": 1,
        "activation_function": None,
        "label2id": {label: i for i, label in enumerate(head.spec.labels)} or None,
        "use_pooler": False,
        "bias": True,
        "dropout_prob": head.dropout.p,
    }
    _write_json(to / HEAD_CONFIG, {**about, "config": config, "model_class": model_class, "name": NAME})


def _dropout(policy: Policy) -> float:
    adapters: Any = next(iter(layers(policy.model).values())).get_submodule(OURS)
    return next(float(adapter.dropout.p) for adapter in adapters.values())


def _type(policy: Policy) -> str:
    return str(policy.config.get_text_config().model_type)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
