"""Tensors as the content of a safetensors file in host memory, copied once; no later step changes it.

safetensors' own `save` copies twice and keeps all other threads waiting meanwhile. For the 1.6 GB of a full run of 135M
parameters on one core of a CPU it took 2.2 s, this 0.8 s. From an H200, 7.2 GB took 0.4 s through pinned buffers and
4.6 s without, with 16 cores; LoRA's 0.5 GB in 1,792 tensors took 0.07 s. All of it pinned took 0.1 s, but 5 s at first,
and stays taken from the host until the process ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

BUFFER = 64 * 2**20  # bytes of a pinned buffer, of which there are two
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors(tensors: Mapping[str, Tensor]) -> memoryview:
    """The length of a JSON header in 8 bytes, the header, and each tensor's bytes where it says."""
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each stands at a multiple of its size
    header, size = {}, 0
    for name in names:
        tensor = tensors[name]
        offsets = [size, size := size + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content_B = torch.empty(8 + len(text) + size, dtype=torch.uint8)
    content = content_B.numpy().data
    content[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    _gather([tensors[name] for name in names], content_B[8 + len(text) :])
    return content


def _gather(tensors: Sequence[Tensor], into_B: Tensor) -> None:
    """The bytes of tensors one behind another."""
    pieces = (tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in tensors)
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is not None:
        pieces = _through_pinned(pieces, device)
    begin = 0
    for piece_B in pieces:
        into_B[begin : begin + len(piece_B)] = piece_B
        begin += len(piece_B)


def _through_pinned(pieces: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The same bytes, many pieces at once, by two pinned buffers in turn: one is read while the other is filled."""
    buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    sent: list[tuple[torch.cuda.Event, Tensor]] = []
    for number, load in enumerate(_loads(pieces)):
        buffer_B, size = buffers[number % 2], 0
        for piece_B in load:
            buffer_B[size : size + len(piece_B)].copy_(piece_B, non_blocking=True)
            size += len(piece_B)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
        yield from _arrived(sent)
        sent = [(arrived, buffer_B[:size])]
    yield from _arrived(sent)


def _arrived(sent: list[tuple[torch.cuda.Event, Tensor]]) -> Iterator[Tensor]:
    for arrived, buffer_B in sent:
        arrived.synchronize()
        yield buffer_B


def _loads(pieces: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces that go into one buffer; those that are larger are cut."""
    load: list[Tensor] = []
    size = 0
    for part_B in (part_B for piece_B in pieces for part_B in piece_B.split(BUFFER)):
        if size + len(part_B) > BUFFER:
            yield load
            load, size = [], 0
        load.append(part_B)
        size += len(part_B)
    yield load
