"""What objectives share whose head reads one vector a text: the options, and the head's outputs for rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.models.policy import Policy
from tunesmith.recipe import Positive, Strict
from tunesmith.types import Batch, Example, Want

if TYPE_CHECKING:
    from tunesmith.types import SampleSpec


class PooledOptions(Strict):
    """How hidden states become one vector, and what the head makes of it."""

    pooling: Literal["mean", "first", "last"] | None = Field(
        None, description="mean over the tokens, the first (CLS) or the last one; the base's own by default"
    )
    hidden: Positive | None = Field(None, description="width of a hidden layer in the head; a linear head without")


def head_outputs(policy: Policy, head: str, batch: Batch) -> Tensor:
    """[S, outputs] of the head called `head`, one row for each text."""
    return policy.heads[head](policy.score(batch, Want(pooled=True)).pooled_SD)


def read_all(policy: Policy, head: str, examples: Sequence[Example], spec: SampleSpec) -> list[Tensor]:
    """The head's outputs [outputs] for each example of one text, in their order, on the CPU; nothing is learned."""
    found: dict[int, Tensor] = {}
    policy.eval()
    with torch.no_grad():
        made = batches(ExampleList(examples), spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad)
        for batch in made:
            outputs_SV = head_outputs(policy, head, place(batch, policy.device)).cpu()
            found.update(zip(batch.examples, outputs_SV, strict=True))
    return [found[index] for index in range(len(examples))]
