"""Which layers run again in the backward, so that they keep less for it; the result stays as it is."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from tunesmith import compat
from tunesmith.errors import RefusedError
from tunesmith.models import host_memory
from tunesmith.models.layers import layers

Again = Literal["none", "feed", "whole", "away"]


def recompute(model: nn.Module, again: Again, count: int) -> None:
    """The first `count` layers run again, from the bottom up: whole, but for attention ("feed"), or whole from inputs
    in the host's memory ("away").

    The lowest, because by the time that they run again all others have given up what they kept. "feed" is of layers
    that `kernels.decoder_layer` serves. Families that cannot tell layers apart run all of them again. Raises
    RefusedError for one that cannot run any.
    """
    found = cast("list[Any]", list(layers(model).values()))
    if again == "feed":
        for layer in found[:count]:
            layer.fast.again = True
    elif again != "none" and not compat.recompute(model, found[count:]):
        raise RefusedError(
            f"layers of {type(model).__name__} cannot run again in the backward",
            "set train.recompute to false, and train.micro_batch_size or train.sequence_length lower",
        )
    elif again == "away":
        host_memory.keep(model, found[:count])
