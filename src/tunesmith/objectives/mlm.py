"""Masked-language modelling: an encoder learns a domain's language by finding words that are hidden from it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.declared import ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.sft import Likelihood
from tunesmith.types import WINDOW, Batch, Example, Piece, Prediction, Row, SampleSpec, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

AS_MASK, AS_ANY = 0.8, 0.1  # of the tokens to be found: shown as the mask, as any token; the others as they are


class Hiding(Likelihood):
    """How much is hidden."""

    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="the share of a text's tokens that are hidden and have to be found"
    )


@OBJECTIVES.register("mlm")
class Mlm(Pretrain):
    """loss = - sum_{t in M} log p(x_t | x with M hidden) / |M|, M a share of each window's tokens drawn for each step.

    Devlin et al. 2019 (arXiv 1810.04805, section 3.1), drawn anew each time that a text comes (Liu et al. 2019, arXiv
    1907.11692, section 4.1). What a window hides depends on its tokens and the number of the step alone, so that it is
    the same however windows share micro-batches, and in validation and evaluation always.
    """

    needs: ClassVar[ObjectiveNeeds] = replace(
        Pretrain.needs,
        summary="an encoder learns the language of plain text by finding words that are hidden from it",
        kinds=frozenset({"encoder"}),
        metrics=("loss", "perplexity"),
        generates=False,
    )

    Options: ClassVar[type[Any]] = Hiding

    prompt: Any = None  # it is asked with texts, not with conversations: not `protocols.Converses`

    def example(self, row: Row, renderer: Renderer) -> Example:
        """The text in windows; each token that is not special may be hidden, and is its own label."""
        if renderer.tokenizer.mask_token_id is None:
            raise InputError(
                "the tokenizer has no mask token, so nothing can be hidden", "choose a base that was trained by masks"
            )
        special = np.array(renderer.tokenizer.all_special_ids, np.int32)
        pieces: list[Piece] = []
        for window in renderer.windows(row.value["text"]):
            ids = window.input_ids
            labels_T = np.where(np.isin(ids, special), -1, ids).astype(np.int32)
            pieces.append(Piece(ids, role=WINDOW, labels_T=labels_T))
        return Example(tuple(pieces), self.columns(row))

    def annotate(self, policy: Policy, batch: Batch) -> Batch:
        """The batch with tokens hidden, and those alone as units."""
        stream = batch.streams["input"]
        shown_BT, weight_BT = stream.input_ids_BT.clone(), torch.zeros_like(batch.weight_BT)
        for segment in batch.segments:
            span = segment.row, slice(segment.start, segment.stop)
            ids_T, may_T = stream.input_ids_BT[span].numpy(), batch.weight_BT[span].numpy()
            found, shown = self._hidden(ids_T, np.flatnonzero(may_T), batch.step, policy)
            shown_BT[segment.row, segment.start + found] = torch.from_numpy(shown)
            weight_BT[segment.row, segment.start + found] = 1
        kept = weight_BT.flatten()[batch.unit_U] > 0
        return replace(
            batch,
            streams={**batch.streams, "input": replace(stream, input_ids_BT=shown_BT)},
            weight_BT=weight_BT,
            unit_U=batch.unit_U[kept],
            example_U=batch.example_U[kept],
        )

    def _hidden(
        self, ids_T: NDArray[np.int64], places: NDArray[np.int64], step: int, policy: Policy
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of `places` are to be found, and the token that is shown at each of them."""
        draw = np.random.Generator(np.random.Philox(key=[step, zlib.crc32(ids_T.tobytes())]))
        count = max(1, round(self.options.mlm_probability * len(places)))
        found = draw.permutation(places)[:count]
        lot, any_token = draw.random(len(found)), draw.integers(policy.config.vocab_size, size=len(found))
        mask = policy.tokens.mask
        assert mask is not None
        shown = np.where(lot < AS_MASK, mask, np.where(lot < AS_MASK + AS_ANY, any_token, ids_T[found]))
        return found, shown.astype(np.int64)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """Scores each text; what has masks in it is also answered, by the text with the likeliest tokens in them."""
        mask = policy.tokens.mask
        scored = super().predict(policy, rows, renderer, spec)
        asked = [index for index, row in enumerate(rows) if mask in renderer.plain(row.value["text"])]
        filled = dict(zip(asked, self._filled(policy, [rows[i] for i in asked], renderer, spec), strict=True))
        return [replace(one, output=filled.get(index, "")) for index, one in enumerate(scored)]

    def _filled(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[str]:
        """The texts, the likeliest token in place of each mask."""
        examples = ExampleList([_masks(row, renderer, policy.tokens.mask) for row in rows])
        before, after = map(len, renderer.around)
        found: list[list[int]] = [[] for _ in rows]
        for batch in batches(examples, spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad):
            ids_BT = batch.streams["input"].input_ids_BT.clone()
            if len(batch.unit_U):
                with torch.no_grad():
                    best_UK = policy.score(place(batch, policy.device), Want(reduce=_likeliest)).reduced_UK
                assert best_UK is not None
                ids_BT.view(-1)[batch.unit_U] = best_UK[:, 0].cpu()
            for segment in batch.segments:  # a document's windows come in their order
                own_T = ids_BT[segment.row, segment.start + before : segment.stop - after]
                found[batch.examples[segment.example]] += own_T.tolist()
        return [renderer.decode(ids) for ids in found]


def _masks(row: Row, renderer: Renderer, mask: int | None) -> Example:
    """The text in windows, with units where masks stand."""
    windows = [window.input_ids for window in renderer.windows(row.value["text"])]
    labels = [np.where(ids_T == mask, 0, -1).astype(np.int32) for ids_T in windows]
    pieces = (Piece(ids, role=WINDOW, labels_T=own) for ids, own in zip(windows, labels, strict=True))
    return Example(tuple(pieces))


def _likeliest(logits_RV: Tensor, units: slice) -> Tensor:
    del units
    return logits_RV.argmax(-1, keepdim=True)
