"""Virtual tokens: trained positions before every segment, and where the real positions are among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.kernels.attention import Bounds
from tunesmith.kernels.shared_prefix import SharedPrefix
from tunesmith.models.layers import layers
from tunesmith.types import Segment, Stream


class Virtual(nn.Module, ABC):
    """What stands before every segment, `count` positions long."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def flat(self) -> Tensor:
        """All of it as the one table [P, ...] that PEFT keeps."""
        return self()

    def exact(self) -> Any:
        """What a call gives, in full precision: it is small, and trained."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self()

    def bars_padding(self, config: Any) -> bool:
        """Whether prompts that are sampled together must be of one length, for the model of `config`."""
        return False

    @abstractmethod
    def continued(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
        """What transformers' `generate` goes on from, for prompts that are padded on one side."""


class VirtualTokens(Virtual):
    """Positions of their own: called, it gives their embeddings, [P, D]."""

    def continued(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
        """Embeddings, padding on the left before the virtual tokens."""
        text_BTD = model.get_input_embeddings()(ids_BT)
        virtual_PD = self.exact().to(text_BTD.dtype)
        padding_B = (mask_BT.cumsum(1) == 0).sum(1).tolist()
        rows = [torch.cat((x_TD[:n], virtual_PD, x_TD[n:])) for n, x_TD in zip(padding_B, text_BTD, strict=True)]
        more_P = mask_BT.new_ones(self.count)
        masks = [torch.cat((row_T[:n], more_P, row_T[n:])) for n, row_T in zip(padding_B, mask_BT, strict=True)]
        return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.stack(masks)}


class VirtualKeys(Virtual):
    """Keys and values of each layer's attention: called, it gives those of each layer, both [K, P, D]."""

    def by_module(self, model: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Those that each module inside a layer of the model has before its own."""
        pairs = zip(layers(model).values(), self.exact(), strict=True)
        return {module: pair for layer, pair in pairs for module in layer.modules()}

    def bars_padding(self, config: Any) -> bool:
        """Padding would stand between them and the text, and a window counts it."""
        return getattr(config.get_text_config(), "sliding_window", None) is not None

    def continued(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
        """A cache that is filled already, and ids for it that nobody reads."""
        from transformers import DynamicCache

        rows = len(ids_BT)
        cache = DynamicCache([tuple(x.to(model.dtype).expand(rows, -1, -1, -1) for x in pair) for pair in self.exact()])
        more_BP = mask_BT.new_ones(rows, self.count)
        return {
            "input_ids": torch.cat((more_BP, ids_BT), dim=1),
            "attention_mask": torch.cat((more_BP, mask_BT), dim=1),
            "past_key_values": cache,
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of K positions in which P virtual ones stand before the segments of rows of T.

    `index_BK` picks from the P virtual positions followed by the B * T real ones, row by row; `inside_BK` is False
    where a position belongs to no segment; `place_N` says for each of the B * T where it now is among B * K.
    """

    index_BK: Tensor
    position_BK: Tensor
    inside_BK: Tensor
    place_N: Tensor
    bounds: Bounds

    def lay_out(self, virtual_PD: Tensor, text_BTD: Tensor) -> Tensor:
        """Embeddings [B, K, D]."""
        source_ND = torch.cat((virtual_PD.to(text_BTD.dtype), text_BTD.flatten(0, 1)))
        return source_ND.index_select(0, self.index_BK.flatten()).view(*self.index_BK.shape, -1)

    def restore(self, hidden_BKD: Tensor, text_BT: Tensor) -> Tensor:
        """Hidden states of the real positions alone: [B, T, D]."""
        return hidden_BKD.flatten(0, 1).index_select(0, self.place_N).view(*text_BT.shape, -1)


def before_each(stream: Stream, segments: Sequence[Segment], count: int) -> Layout:
    """Every segment with virtual positions of its own; rows are filled up behind their last segment."""
    ids_BT = stream.input_ids_BT
    rows, length = ids_BT.shape
    spans: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    width = max((sum(count + s.length for s in segments if s.row == row) for row in range(rows)), default=0)
    index, position = np.zeros((2, rows, width), np.int64)
    inside, place = np.zeros((rows, width), np.bool_), np.zeros((rows, length), np.int64)
    for segment in sorted(segments, key=lambda s: (s.row, s.start)):
        row = segment.row
        at = spans[row][-1][1] if spans[row] else 0
        text, stop = at + count, at + count + segment.length
        index[row, at:text] = np.arange(count)
        index[row, text:stop] = count + row * length + np.arange(segment.start, segment.stop)
        position[row, at:stop] = np.arange(stop - at)
        inside[row, at:stop] = True
        place[row, segment.start : segment.stop] = row * width + np.arange(text, stop)
        spans[row].append((at, stop))
    tensors = [torch.from_numpy(array).to(ids_BT.device) for array in (index, position, inside, place.reshape(-1))]
    return Layout(tensors[0], tensors[1], tensors[2], tensors[3], Bounds(spans))


def before_all(stream: Stream, bounds: Bounds, shared: SharedPrefix | None, count: int) -> Layout:
    """One row whose segments share their virtual positions: for models that look backwards only (`shared_prefix`).

    `bounds` are those of the row, shortened where `shared` is given.
    """
    position_1T = stream.position_ids_BT
    kept_K = torch.arange(position_1T.shape[1], device=position_1T.device) if shared is None else shared.kept_K
    place_T = kept_K if shared is None else shared.place_T
    virtual_P = torch.arange(count, device=position_1T.device)
    index_1K = torch.cat((virtual_P, count + kept_K))[None]
    position_1K = torch.cat((virtual_P, count + position_1T[0, kept_K]))[None]
    return Layout(index_1K, position_1K, index_1K >= 0, count + place_T, behind(bounds, count))


def behind(bounds: Bounds, count: int) -> Bounds:
    """Bounds of rows that have `count` more positions at their beginning, which every segment sees before its own."""
    rows = [[(start + count if start else 0, stop + count) for start, stop in spans] for spans in bounds.rows]
    return Bounds(rows, shared=bounds.shared + count)
