"""A model of a base's shape with few layers and random weights: what it costs tells what the base costs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tunesmith import compat
from tunesmith.models.config import safe_config
from tunesmith.models.fetch import LocalModel
from tunesmith.models.load import DTYPES, Dtype, Head, builder

if TYPE_CHECKING:
    import torch
    from torch import nn

COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
KINDS = ("layer_types", "mlp_layer_types")  # lists with an entry for each layer


def numbers(local: LocalModel, layers: int) -> tuple[int, int]:
    """Two numbers of layers whose cost tells that of any: one and two rounds of a pattern, two layers at least.

    Both are all layers of a model that has no more than the larger.
    """
    text = safe_config(local.folder).get_text_config()
    few = max(2, *(_round(list(getattr(text, name, None) or [])) for name in KINDS))
    return (few, 2 * few) if layers > 2 * few else (layers, layers)


def _round(kinds: list[Any]) -> int:
    """Layers after which their kinds come again."""
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), len(kinds) or 1)


def few_layers(
    local: LocalModel, head: Head, dtype: Dtype, layers: int, device: str | torch.device, *, in_nf4: bool
) -> nn.Module:
    """The model that `load_backbone` would give, with so many layers (in an encoder-decoder on each side)."""
    import torch

    config = copy.deepcopy(safe_config(local.folder))
    text = config.get_text_config()
    for name in COUNTS:
        if getattr(text, name, None) is not None:
            setattr(text, name, layers)
    for name in KINDS:
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    auto, extra = builder(config, head)
    with compat.quiet_transformers(), torch.device(device):
        model = auto.from_config(config, dtype=getattr(torch, DTYPES[dtype]), **extra)
    if in_nf4:
        from tunesmith.kernels.nf4 import hold_in_nf4

        hold_in_nf4(model, device)
    return model.eval()
