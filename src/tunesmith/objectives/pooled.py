"""What objectives share that read one vector a text: the options, and what is read for rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.errors import InputError
from tunesmith.models.heads import joined
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Positive, Strict
from tunesmith.types import Batch, Example, Piece, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.types import SampleSpec


class Pooling(Strict):
    """How hidden states become one vector."""

    pooling: Literal["mean", "first", "last"] | None = Field(
        None, description="mean over the tokens, the first (CLS) or the last one; the base's own by default"
    )


class PooledOptions(Pooling):
    """How hidden states become one vector, and what the head makes of it."""

    hidden: Positive | None = Field(None, description="width of a hidden layer in the head; a linear head without")


class LongTexts(PooledOptions):
    """What becomes of a text that is longer than train.sequence_length."""

    long: Literal["cut", "windows"] = Field(
        "cut",
        description="a text longer than train.sequence_length is cut, or read in windows of that length, whose vectors "
        "are averaged into one",
    )
    stride: Positive | None = Field(
        None,
        description="tokens from the beginning of a window to the next one's; all of a window by default, so that no "
        "token is read twice; only with `long: windows`",
    )

    def check(self) -> None:
        """InputError: a stride of windows that there are none of."""
        if self.stride is not None and self.long == "cut":
            raise InputError(
                "objective.stride does nothing where long texts are cut",
                "set objective.long to windows, or leave it out",
            )


def read_text(text: str, renderer: Renderer, options: LongTexts) -> tuple[tuple[Piece, ...], int]:
    """What the model reads of a text, and how many tokens were cut.

    The mean over the windows of a long text is that of Sun et al. 2019 (arXiv 1905.05583), on long texts.
    """
    if options.long == "windows":
        return tuple(Piece(ids) for ids in renderer.stretches(text, options.stride)), 0
    encoded = renderer.text(text)
    return (Piece(encoded.input_ids),), encoded.cut


def text_outputs(policy: Policy, head: str, batch: Batch) -> Tensor:
    """[N, outputs] of the head called `head`, one row for each example, of however many windows."""
    pooled_SD = policy.score(batch, Want(pooled=True)).pooled_SD
    assert pooled_SD is not None
    return policy.heads[head](joined(pooled_SD, batch.segments))


def head_outputs(policy: Policy, head: str, batch: Batch) -> Tensor:
    """[S, outputs] of the head called `head`, one row for each text."""
    return policy.heads[head](policy.score(batch, Want(pooled=True)).pooled_SD)


def read_all(policy: Policy, head: str, examples: Sequence[Example], spec: SampleSpec) -> list[Tensor]:
    """The head's outputs [outputs] for each example of one text, in their order, on the CPU; nothing is learned."""
    return read_each(policy, lambda policy, batch: text_outputs(policy, head, batch), examples, spec)


def read_each(
    policy: Policy, read: Callable[[Policy, Batch], Tensor], examples: Sequence[Example], spec: SampleSpec
) -> list[Tensor]:
    """What `read` gives for each example, of which it gives a row for each, in their order, on the CPU."""
    found: dict[int, Tensor] = {}
    policy.eval()
    with torch.no_grad():
        made = batches(ExampleList(examples), spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad)
        for batch in made:
            found.update(zip(batch.examples, read(policy, place(batch, policy.device)).cpu(), strict=True))
    return [found[index] for index in range(len(examples))]
