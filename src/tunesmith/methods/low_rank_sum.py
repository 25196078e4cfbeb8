"""Low-rank adapters into one: the ways there are, as rows of data, and the factors that come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tunesmith.declared import Combination
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
Merge = Callable[[list[Tensor], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """How updates become one. `merge` is PEFT's function, None where factors only stand side by side.

    `whole`: it is taken of the updates B A and the result cut to a rank, and not of the factors A and B apart.
    `pruned`: only a share of the entries, the density, goes in; `drawn`: which ones is drawn.
    """

    summary: str
    merge: str | None = None
    whole: bool = False
    pruned: bool = False
    drawn: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the updates themselves are summed, so that a sum in the sum is nothing else."""
        return self.merge is None or (self.whole and not self.pruned)


# TIES: Yadav et al. 2023 (arXiv 2306.01708); DARE: Yu et al. 2024 (arXiv 2311.03099); both as PEFT has them.
_SUM = Way("the factors are summed, not their products: cheap, rough; ranks must be equal", "task_arithmetic")
_PRUNE = Way("the sum of each one's largest entries", "magnitude_prune", pruned=True)
_TIES = Way("the largest entries, where the adapters agree on the sign", "ties", pruned=True)
_DARE = Way("the sum of entries drawn at random, scaled up", "dare_linear", pruned=True, drawn=True)
_DARE_TIES = Way("entries drawn at random, where the adapters agree on the sign", "dare_ties", pruned=True, drawn=True)
WAYS: Mapping[str, Way] = {
    "cat": Way("the weighted sum of the updates, exactly; ranks add up"),
    "svd": replace(_SUM, summary="the weighted sum of the updates, cut to the nearest of a rank", whole=True),
    "linear": _SUM,
    "magnitude_prune": _PRUNE,
    "ties": _TIES,
    "dare_linear": _DARE,
    "dare_ties": _DARE_TIES,
    **{
        f"{name}_svd": replace(way, summary=f"{way.summary}; of the updates themselves, cut to a rank", whole=True)
        for name, way in (
            ("magnitude_prune", _PRUNE),
            ("ties", _TIES),
            ("dare_linear", _DARE),
            ("dare_ties", _DARE_TIES),
        )
    },
}


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter's update of one layer: weight * scaling * B A."""

    down_RI: Tensor
    up_OR: Tensor
    scaling: float
    weight: float

    @property
    def share(self) -> float:
        return self.weight * self.scaling


def combine(folders: Sequence[Path], combination: Combination, to: Path) -> LoraConfig:
    """Writes the weighted combination of LoRA adapters into `to`, in PEFT's format; its scaling is 1 in every layer.

    Raises InputError where an adapter holds more than low-rank factors, or ranks differ and may not.
    """
    from safetensors.torch import save_file

    way, density = WAYS[combination.how], combination.density
    read = [_read(folder, weight) for folder, weight in zip(folders, combination.weights, strict=True)]
    names = sorted({name for _, layers in read for name in layers})
    merged: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(combination.seed)
        for name in names:
            held = [layers[name] for _, layers in read if name in layers]
            factors = _merged(name, held, way, density, combination.rank)
            merged |= {key: value.contiguous() for key, value in zip(_keys(name), factors, strict=True)}
            ranks[_module(name)] = factors[0].shape[0]
    save_file(merged, to / WEIGHTS, metadata={"format": "pt"})
    config = _config([config for config, _ in read], ranks)
    config.save_pretrained(str(to))
    return config


def _merged(name: str, held: Sequence[Factors], way: Way, density: float, rank: int | None) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of one layer."""
    if way.merge is None:
        return torch.cat([f.down_RI * f.share for f in held]), torch.cat([f.up_OR for f in held], 1)
    merge = _peft(way, density)
    if way.whole:
        weights = torch.tensor([f.weight for f in held])
        update_OI = merge([f.scaling * (f.up_OR @ f.down_RI) for f in held], weights)
        left_OK, values_K, right_KI = torch.linalg.svd(update_OI, full_matrices=False)
        cut = rank or max(f.down_RI.shape[0] for f in held)
        return right_KI[:cut], left_OK[:, :cut] * values_K[:cut]
    if len({f.down_RI.shape[0] for f in held}) > 1:
        raise InputError(
            f"the adapters have different ranks in {_module(name)}, and their factors cannot be summed",
            "combine by cat, or by a way that ends in svd",
        )
    # A negative weight turns one of the two factors over, so that their product changes its sign.
    root = torch.tensor([math.sqrt(abs(f.share)) for f in held])
    sign = torch.tensor([math.copysign(1.0, f.share) for f in held])
    return merge([f.down_RI for f in held], root * sign), merge([f.up_OR for f in held], root)


def _peft(way: Way, density: float) -> Merge:
    from peft.utils import merge_utils

    function: Any = getattr(merge_utils, str(way.merge))
    return cast(Merge, partial(function, density=density) if way.pruned else function)


def _read(folder: Path, weight: float) -> tuple[LoraConfig, dict[str, Factors]]:
    """An adapter's configuration and its layers by the stem of their keys."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
    state = load_file(folder / WEIGHTS)
    if config.target_parameters:
        raise InputError(
            f"{folder} updates stacks of experts ({', '.join(sorted(config.target_parameters))}), "
            "whose factors are kept in another order",
            "load the adapters side by side instead",
        )
    layers: dict[str, Factors] = {}
    known: set[str] = set()
    for key in state:
        stem, found, tail = key.partition(".lora_A")
        if not found:
            stem, found, tail = key.partition(".lora_embedding_A")
        if not found:
            continue
        name = f"{stem}{found[:-1]}|{tail}"
        down, up = _keys(name)
        known |= {down, up}
        layers[name] = Factors(
            state[down].float(), state[up].float(), _scaling(config, _module(name), state[down]), weight
        )
    if more := sorted(state.keys() - known):
        raise InputError(
            f"{folder} holds more than low-rank factors ({more[0]}), which has no weighted sum",
            "load the adapters side by side instead",
        )
    return config, layers


def _keys(name: str) -> tuple[str, str]:
    """The keys of A and B: `layers.0.q_proj.lora_|.weight` stands for both."""
    stem, tail = name.split("|")
    return f"{stem}A{tail}", f"{stem}B{tail}"


def _module(name: str) -> str:
    """The layer's name in the model that PEFT was given."""
    return name.split("|")[0].rpartition(".lora_")[0].removeprefix("base_model.model.")


def _scaling(config: LoraConfig, module: str, down_RI: Tensor) -> float:
    from peft.utils.other import get_pattern_key

    alphas: Any = config.alpha_pattern
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha))
    rank = down_RI.shape[0]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _config(configs: Sequence[LoraConfig], ranks: Mapping[str, int]) -> LoraConfig:
    """alpha is the rank, so that nothing scales the sum again."""
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    named: list[Any] = [config.target_modules for config in configs]
    listed = all(not isinstance(targets, str) for targets in named)
    targets = sorted({t for targets in named for t in targets}) if listed else sorted(ranks)
    return replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=targets,
        lora_dropout=0.0,
        inference_mode=True,
    )
