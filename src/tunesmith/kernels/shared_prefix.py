"""What all examples of a row begin with is computed once: a template's system turn, a common instruction.

In a causal model a position's hidden state depends on nothing behind it, so equal beginnings have equal
hidden states. The row is shortened to one copy of the beginning, attention puts that copy before every
segment, and the result is laid out again at full length: the same numbers, and by the sum over the copies
the same gradients, for fewer tokens. Chats under a 24-token system turn, 45 to 90 tokens each, lose a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels.attention import Bounds
from tunesmith.types import Segment, Stream

WORTH = 4  # shorter beginnings cost more in copies than they save


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A row with `length` first positions in common: which positions run, and where all of them are then.

    `kept_K` indexes the T positions of the row, `place_T` the K that are kept; `bounds` are those of the
    shortened row.
    """

    length: int
    kept_K: Tensor
    place_T: Tensor
    bounds: Bounds

    def shorten(self, x_1T: Tensor) -> Tensor:
        """[1, T] -> [1, K], for token ids and positions."""
        return x_1T.index_select(1, self.kept_K)

    def restore(self, hidden_1KD: Tensor) -> Tensor:
        """[1, K, D] -> [1, T, D]."""
        return hidden_1KD.index_select(1, self.place_T)


def find(stream: Stream, segments: Sequence[Segment]) -> SharedPrefix | None:
    """The beginning that all segments of a packed row have in common, if there is one worth it.

    Every segment keeps a token of its own. Ask `serves` first.
    """
    if len(segments) < 2 or stream.input_ids_BT.shape[0] != 1:
        return None
    ids_T = stream.input_ids_BT[0]
    length = min(s.length for s in segments) - 1
    starts_S = torch.tensor([s.start for s in segments], device=ids_T.device)
    if length < WORTH:
        return None
    heads_SL = ids_T[starts_S[:, None] + torch.arange(length, device=ids_T.device)]
    differs_L = (heads_SL != heads_SL[0]).any(0)
    length = int(differs_L.int().argmax()) if bool(differs_L.any()) else length
    if length < WORTH:
        return None
    kept: list[Tensor] = []
    place_T = torch.empty_like(ids_T)
    spans: list[tuple[int, int]] = []
    at = 0
    for number, segment in enumerate(sorted(segments, key=lambda s: s.start)):
        skipped = length if number else 0
        own = torch.arange(segment.start + skipped, segment.stop, device=ids_T.device)
        kept.append(own)
        place_T[segment.start : segment.start + length] = torch.arange(length, device=ids_T.device)
        place_T[own] = torch.arange(at, at + len(own), device=ids_T.device)
        spans.append((at, at + len(own)))
        at += len(own)
    return SharedPrefix(length, torch.cat(kept), place_T, Bounds([spans], shared=length))


def serves(model: nn.Module) -> bool:
    """Whether equal beginnings have equal hidden states in a forward of the model now.

    Not where attention looks ahead, nor where anything is dropped out: dropout draws for each copy apart.
    """
    config = getattr(model, "config", None)
    rates = [float(getattr(config, name, None) or 0.0) for name in ("attention_dropout", "attn_pdrop")]
    if model.training and any(rates):
        return False
    return not any(
        (isinstance(m, nn.Dropout) and m.training and m.p > 0) or _own(m, "is_causal") is False for m in model.modules()
    )


def _own(module: nn.Module, name: str) -> Any:
    """An attribute that is no parameter, buffer or module; getattr takes 10 times longer where there is none."""
    return vars(module).get(name, getattr(type(module), name, None))
