"""The examples of one micro-batch laid out as a `Batch`: end to end in one row, or one padded row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.kernels import shared_prefix
from tunesmith.kernels.transfer import sent
from tunesmith.types import Batch, Example, Piece, Segment, Stream


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    packed: bool,
    pad_id: int,
    columns: Mapping[str, NDArray[np.generic]] | None = None,
) -> Batch:
    """Lays out `examples`, whose positions in the data set are `indices`.

    packed: all pieces of a stream end to end in one row, no padding; else one row for each piece,
    padded right with `pad_id`, which belongs to no segment. `columns` (one entry per example)
    are added to the examples' own.
    """
    names = sorted({piece.stream for example in examples for piece in example.pieces}, reverse=True) or ["input"]
    segments: list[Segment] = []
    streams: dict[str, Stream] = {}
    targets: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
    for name in names:
        pieces = [(i, p) for i, e in enumerate(examples) for p in e.pieces if p.stream == name]
        streams[name], targets[name] = _lay_out(pieces, name, segments, packed, pad_id)
    scored = "decoder" if "decoder" in targets else "input"
    target, weight = targets[scored]
    unit_U = torch.from_numpy(weight.reshape(-1).nonzero()[0])  # here, where no device is waited for
    example_S = torch.tensor([segment.example for segment in segments], dtype=torch.int64)
    own = {
        key: torch.from_numpy(np.asarray([example.columns[key] for example in examples])) for key in _shared(examples)
    }
    given = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in (columns or {}).items()}
    return Batch(
        streams=streams,
        target_BT=torch.from_numpy(target),
        weight_BT=torch.from_numpy(weight),
        unit_U=unit_U,
        example_U=example_S[streams[scored].segment_ids_BT.flatten()[unit_U]],
        segments=segments,
        examples=list(indices),
        columns={key: v.float() if v.is_floating_point() else v for key, v in (own | given).items()},
    )


def _shared(examples: Sequence[Example]) -> list[str]:
    return sorted(examples[0].columns) if examples else []


def _lay_out(
    pieces: list[tuple[int, Piece]], name: str, segments: list[Segment], packed: bool, pad_id: int
) -> tuple[Stream, tuple[NDArray[np.int64], NDArray[np.float32]]]:
    lengths = [len(piece.input_ids_T) for _, piece in pieces]
    rows = 1 if packed else len(pieces)
    width = sum(lengths) if packed else max(lengths, default=0)
    ids = np.full((rows, width), pad_id, dtype=np.int64)
    positions, target = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    weight, owner = np.zeros((rows, width), np.float32), np.full((rows, width), -1, np.int64)
    types = np.zeros((rows, width), np.int64)
    at = 0
    for number, (example, piece) in enumerate(pieces):
        row, start = (0, at) if packed else (number, 0)
        stop = start + lengths[number]
        at += lengths[number]
        ids[row, start:stop] = piece.input_ids_T
        positions[row, start:stop] = np.arange(lengths[number])
        owner[row, start:stop] = len(segments)
        if piece.typed_from:
            types[row, start + piece.typed_from : stop] = 1
        if piece.labels_T is not None:
            target[row, start:stop] = np.maximum(piece.labels_T, 0)
            weight[row, start:stop] = piece.labels_T >= 0
        elif piece.weights_T is not None:
            target[row, start : stop - 1] = piece.input_ids_T[1:]
            weight[row, start : stop - 1] = piece.weights_T[1:]
        labelled, typed_from = piece.labels_T is not None, piece.typed_from
        segments.append(Segment(row, start, stop - start, example, piece.role, name, 1.0, labelled, typed_from))
    tensors = [
        torch.from_numpy(x) for x in ((ids, positions, owner, types) if types.any() else (ids, positions, owner))
    ]
    stream = Stream(*tensors)
    return stream, (target, weight)


def split(batch: Batch, groups: Sequence[Sequence[int]], *, packed: bool, pad_id: int) -> list[Batch]:
    """Re-lays a batch as one batch for each group of positions in `batch.examples`.

    Used where memory ran out (halves) and where each example needs its own gradient (singles).
    Raises RuntimeError for a batch with `extra`, whose tensors belong to no example.
    """
    if batch.extra:
        raise RuntimeError(f"a batch with extra tensors ({', '.join(sorted(batch.extra))}) cannot be split")
    return [
        collate(
            [_example(batch, position) for position in group],
            [batch.examples[position] for position in group],
            packed=packed,
            pad_id=pad_id,
            columns={key: value[list(group)].cpu().numpy() for key, value in batch.columns.items()},
        )
        for group in groups
    ]


def _example(batch: Batch, position: int) -> Example:
    pieces: list[Piece] = []
    for segment in batch.segments:
        if segment.example != position:
            continue
        stream = batch.streams[segment.stream]
        span = slice(segment.start, segment.stop)
        ids = stream.input_ids_BT[segment.row, span].cpu().numpy().astype(np.int32)
        if segment.labelled:
            target_T, weight_T = batch.target_BT[segment.row, span].cpu(), batch.weight_BT[segment.row, span].cpu()
            labels_T = torch.where(weight_T > 0, target_T, -1).numpy().astype(np.int32)
            pieces.append(Piece(ids, None, segment.role, segment.stream, labels_T, segment.typed_from))
            continue
        weights = np.zeros(segment.length, np.float32)
        if segment.stream == ("decoder" if "decoder" in batch.streams else "input"):
            weights[1:] = batch.weight_BT[segment.row, segment.start : segment.stop - 1].cpu().numpy()
        weights_T = weights if weights.any() else None
        pieces.append(Piece(ids, weights_T, segment.role, segment.stream, typed_from=segment.typed_from))
    return Example(tuple(pieces))


def place(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; the batch itself where they are there already.

    What its segments begin with is looked for while the tokens are still on the host.
    """
    if batch.target_BT.device == device:
        return batch
    stream = batch.streams.get("input")
    read = [segment for segment in batch.segments if segment.stream == "input"]
    common = batch.common
    if stream is not None and stream.input_ids_BT.device.type == "cpu":
        common = shared_prefix.common(stream.input_ids_BT.numpy(), read)

    def to(tensor: Tensor) -> Tensor:
        return sent(tensor, device)

    return replace(
        batch,
        streams={
            name: Stream(
                to(s.input_ids_BT),
                to(s.position_ids_BT),
                to(s.segment_ids_BT),
                None if s.type_ids_BT is None else to(s.type_ids_BT),
            )
            for name, s in batch.streams.items()
        },
        target_BT=to(batch.target_BT),
        weight_BT=to(batch.weight_BT),
        unit_U=to(batch.unit_U),
        example_U=to(batch.example_U),
        columns={name: to(value) for name, value in batch.columns.items()},
        extra={name: to(value) for name, value in batch.extra.items()},
        common=common,
    )
