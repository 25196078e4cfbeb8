"""Attention over segments on CUDA: the backend follows the rows, and a mask is made once for all layers.

Rows whose segments are all of one length are a dense batch, for cuDNN where its plan of that length pays. Little rows
are padded_attention's, which compiles nothing. Everything else goes through FlexAttention, compiled once for a few
lengths, with the blocks of each row's segments; what neither serves takes one call per segment. On an H100 (bfloat16,
32 heads, 8 key heads, width 128, 8,192 positions, forward and backward): 2 x 4,096 took 2.00 ms in cuDNN and 3.05 in
FlexAttention; 28 segments 1.05 ms in FlexAttention (compiled for any length 2.93), 2.92 in torch's varlen. cuDNN's
ragged layout fails in torch 2.11.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith import compat
from tunesmith.kernels import padded_attention
from tunesmith.kernels.transfer import sent

if TYPE_CHECKING:
    from tunesmith.kernels.attention import Bounds

log = logging.getLogger("tunesmith.kernels")

BLOCK = 128
SHORTEST = 512  # below, compiling costs more than it saves
# cuDNN plans each new length for 0.1 s, which a length of many rows earns back: one that examples are cut at. On an
# H200 (16 heads of width 128, both passes) 1 x 1,100 took 0.36 ms in cuDNN and 0.38 in FlashAttention-2, and 1 x 3,000
# 0.65 and 0.83.
CUDNN_PAYS = 2048
SMALL = 4 << 20  # features of a padded batch: up to here it takes as long as blocks, for both wait for launches
FORWARD = 16  # times as many where nothing is learnt: blocks would be compiled for a few forwards
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Look:
    """What each position may look at: inside its segment, backwards only if causal, within a window if any."""

    bounds: Bounds
    length: int
    causal: bool
    window: int | None
    softcap: float | None
    scaling: float | None

    @staticmethod
    def of(module: nn.Module, bounds: Bounds, length: int) -> Look:
        """As a module of transformers says of itself."""
        causal = bool(getattr(module, "is_causal", True))
        window: Any = getattr(module, "sliding_window", None)
        return Look(bounds, length, causal, reach(bounds, window), None, getattr(module, "scaling", None))

    @property
    def dense(self) -> int | None:
        """The length of every segment, where they are all alike and fill the rows; else None."""
        length = None if self.bounds.shared else alike(self.bounds, self.length)
        return length if length and self.window is None and self.softcap is None else None


def alike(bounds: Bounds, length: int) -> int:
    """The length of every segment, where they are all alike and fill rows of `length` positions; else 0."""
    spans = [span for row in bounds.rows for span in row]
    one = spans[0][1] - spans[0][0] if spans else 0
    same = one > 0 and all(b - a == one for a, b in spans)
    return one if same and all(len(row) * one == length for row in bounds.rows) else 0


def reach(bounds: Bounds, window: int | None) -> int | None:
    """The window, if some segment is longer than it."""
    if window is None:
        return None
    longest = max((b - a + bounds.prefix(a) for spans in bounds.rows for a, b in spans), default=0)
    return window if longest > window else None


def backend(
    look: Look, features: int, dtype: torch.dtype, dropout: float = 0.0
) -> Literal["dense", "blocks", "padded", "each"]:
    """How these rows are computed: see the module. `features`: the width of all query heads."""
    pads = padded_attention.serves(look.bounds)
    if dropout:
        return "padded" if pads else "each"
    if look.dense is not None:
        return "dense"
    most = SMALL if torch.is_grad_enabled() else FORWARD * SMALL
    small = pads and padded_attention.positions(look.bounds) * features <= most
    if dtype in HALF and look.length >= SHORTEST and not small and _flex_is_there():
        return "blocks"
    return "padded" if pads else "each"


def padded_length(look: Look, features: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Positions that attention computes: for blocks one of four lengths an octave, so that few graphs are compiled."""
    if backend(look, features, dtype) != "blocks":
        return look.length
    step = max(BLOCK, (1 << (look.length - 1).bit_length()) // 8)
    return -(-look.length // step) * step


def attend(query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, look: Look) -> Tensor:
    """[B, T, H, D], for inputs of `padded_length` positions or of the rows' own; padding is cut off only if added here.

    `backend` must be "dense" or "blocks".
    """
    if look.dense is not None:
        return dense(query_BHTD, key_BKTD, value_BKTD, look.dense, look.causal, look.scaling)
    features = query_BHTD.shape[1] * query_BHTD.shape[3]
    missing = padded_length(look, features, query_BHTD.dtype) - query_BHTD.shape[2]
    if missing:
        query_BHTD, key_BKTD, value_BKTD = (F.pad(x, (0, 0, 0, missing)) for x in (query_BHTD, key_BKTD, value_BKTD))
    mask = _mask(look, query_BHTD.shape[2], query_BHTD.device)
    out_BHTD = _flex(look.softcap)(
        query_BHTD,
        key_BKTD,
        value_BKTD,
        kind=(look.causal, look.window, bool(look.bounds.shared)),
        block_mask=mask,
        scale=look.scaling,
        enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
    )
    out_BTHD = out_BHTD.transpose(1, 2)
    return out_BTHD[:, : look.length] if missing else out_BTHD


def dense(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, segment: int, causal: bool, scaling: float | None
) -> Tensor:
    """[B, T, H, D], for rows that segments of this length fill; torch.compile may go through it."""
    from torch.nn.attention import sdpa_kernel

    batch, heads, length, _ = query_BHTD.shape
    grouped = heads != key_BKTD.shape[1]
    if grouped and query_BHTD.dtype not in HALF:  # only the half-precision kernels take fewer key heads as they are
        key_BKTD, value_BKTD = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key_BKTD, value_BKTD))
        grouped = False

    def cut(x_BHTD: Tensor) -> Tensor:
        return x_BHTD.transpose(1, 2).reshape(-1, segment, x_BHTD.shape[1], x_BHTD.shape[3]).transpose(1, 2)

    with sdpa_kernel(order_of(segment), set_priority=True):
        out = F.scaled_dot_product_attention(
            cut(query_BHTD), cut(key_BKTD), cut(value_BKTD), is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    return out.transpose(1, 2).reshape(batch, length, heads, value_BKTD.shape[3])


def order_of(length: int) -> list[Any]:
    """Kernels of torch for rows of one length, the one that is to be taken first."""
    from torch.nn.attention import SDPBackend

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *order] if comes_again(length) else order


def comes_again(length: int) -> bool:
    """Whether many examples are likely to have this length, because they were cut at it."""
    return length >= CUDNN_PAYS and length % BLOCK == 0


def _mask(look: Look, length: int, device: torch.device) -> Any:
    """The blocks of these rows, made once for all layers that look alike."""
    made: dict[Any, Any] = look.bounds.made
    key = (look.causal, look.window, length, device)
    if key not in made:
        made[key] = _block_mask(look, length, device)
    return made[key]


def _block_mask(look: Look, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    owner_BT, place_BT, open_BT = positions(look.bounds, length)
    some_BQK, all_BQK = blocks(owner_BT, place_BT, open_BT, look.causal, look.window)
    owner, place, opened = (sent(torch.from_numpy(x), device) for x in (owner_BT, place_BT, open_BT))
    mod = _seen(owner, place, opened, look.causal, look.window, shared=bool(look.bounds.shared))
    lists = [sent(torch.from_numpy(x), device) for x in (*_listed(some_BQK & ~all_BQK), *_listed(all_BQK))]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(length, length))


def positions(bounds: Bounds, length: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """For each position [B, T]: its segment, its place in it, and whether every later segment sees it.

    Positions of no segment are segments of their own, so that each attends to itself and nothing is empty.
    """
    batch = len(bounds.rows)
    owner_BT, place_BT = np.empty((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for row, spans in enumerate(bounds.rows):
        number = at = 0
        for start, stop in [*spans, (length, length)]:
            owner_BT[row, at:start] = number + np.arange(start - at)
            number += start - at
            owner_BT[row, start:stop] = number
            place_BT[row, start:stop] = np.arange(stop - start) + bounds.prefix(start)
            number, at = number + 1, stop
    open_BT = np.zeros((batch, length), np.bool_)
    open_BT[:, : bounds.shared] = True
    return owner_BT, place_BT, open_BT


def blocks(
    owner_BT: NDArray[np.int32],
    place_BT: NDArray[np.int32],
    open_BT: NDArray[np.bool_],
    causal: bool,
    window: int | None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each pair of blocks [B, Q, K]: whether some pair of positions may look, and whether all may.

    "Some" may be said where none does, never the other way round; owners rise along a row.
    """
    batch, length = owner_BT.shape
    count = length // BLOCK
    first, last = owner_BT[:, ::BLOCK], owner_BT[:, BLOCK - 1 :: BLOCK]
    some = (last[:, None, :] >= first[:, :, None]) & (first[:, None, :] <= last[:, :, None])
    every = (
        (first == last)[:, :, None] & (first[:, :, None] == first[:, None, :]) & (last[:, None, :] == first[:, :, None])
    )
    at = np.arange(count) * BLOCK
    ahead = at[:, None] - at[None, :]  # how far a query block begins behind a key block
    if causal:
        some, every = some & (ahead >= 0), every & (ahead > 0)
    if window is not None:
        some &= np.abs(ahead) - (BLOCK - 1) < window
        every &= np.abs(ahead) + (BLOCK - 1) < window
    opened: NDArray[np.bool_] = open_BT.reshape(batch, count, BLOCK)
    some |= np.any(opened, 2)[:, None, :] & (ahead >= 0)
    if window is None:
        every |= np.all(opened, 2)[:, None, :] & (ahead > 0)
    return some, every


def _listed(chosen_BQK: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many key blocks each query block has, and which: [B, 1, Q] and [B, 1, Q, K], those that count first."""
    order = np.argsort(~chosen_BQK, axis=2, kind="stable").astype(np.int32)
    return chosen_BQK.sum(2, dtype=np.int32)[:, None], order[:, None]


def _seen(owner: Tensor, place: Tensor, opened: Tensor, causal: bool, window: int | None, *, shared: bool) -> Any:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = owner[b, q] == owner[b, k]
        if shared:
            inside = inside | opened[b, k]
        if causal:
            inside = inside & (q >= k)
        if window is not None:
            distance = place[b, q] - place[b, k]
            inside = inside & (distance < window) & (distance > -window)
        return inside

    return seen


@cache
def _flex(softcap: float | None) -> Any:
    """FlexAttention compiled for these scores; a softcap is Gemma 2's (arXiv 2408.00118, section 2)."""
    from torch.nn.attention import flex_attention

    attention: Any = flex_attention.flex_attention

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap is not None else score

    def call(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        return attention(query, key, value, score_mod=None if softcap is None else capped, **keywords)

    with compat.compiling():
        compiled: Any = torch.compile(call, dynamic=False)
    known: set[Any] = set()

    def run(*tensors: Tensor, kind: tuple[Any, ...], **keywords: Any) -> Any:
        learns = (torch.is_grad_enabled(), *[x.requires_grad for x in tensors])
        key = (*[x.shape for x in tensors], tensors[0].dtype, learns, keywords["scale"], kind)
        if key in known:
            return compiled(*tensors, **keywords)
        known.add(key)
        log.info("compiling attention for %d positions (%d graphs so far)", tensors[0].shape[2], len(known))
        with compat.compiling():
            return compiled(*tensors, **keywords)

    return run


@cache
def _flex_is_there() -> bool:
    """FlexAttention's kernels are Triton's."""
    served = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return served and find_spec("triton") is not None
