"""What a GPU can do without for a while waits in the host's memory: inputs of layers that run again, a frozen table.

Copies go by a stream of their own beside the layers: an input leaves while its layer computes, and comes back while the
layer above runs again. Of a Llama-3.1-8B an input is 8 KB a token and layer, the table of tokens 1 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def keep(model: Any, again: Sequence[Any]) -> None:
    """Of the layers `again`, from the bottom up, which already run again in the backward: what they begin with waits.

    With them the model's table of tokens, where it is frozen and no output projection shares it.
    """
    below: Again | None = None
    for layer in again:
        if hasattr(layer, "gradient_checkpointing"):
            layer._gradient_checkpointing_func = below = Again(below)
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    shared = output is not None and output.weight is table
    if table.is_cuda and not table.requires_grad and not shared:
        table.data = mapped(table.data)


class Again:
    """A layer's checkpoint: called as `torch.utils.checkpoint.checkpoint`, with the hidden states as first argument.

    below: that of the layer which runs again after this one.
    """

    def __init__(self, below: Again | None) -> None:
        self._below = below
        self._latest: Callable[[], _Input | None] = _nothing

    def __call__(self, run: Callable[..., Any], *given: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*given)
        if not given or not isinstance(given[0], Tensor):
            return checkpoint(run, *given, use_reentrant=False)
        hidden, *rest = given
        kept = _Input(hidden, self._below._latest if self._below else _nothing)
        self._latest = ref(kept)

        def from_kept(_: Tensor, *rest: Any) -> Any:
            return run(kept.take(), *rest)

        # By an argument it sees on which device random numbers are drawn.
        out = checkpoint(from_kept, hidden.new_empty(0), *rest, use_reentrant=False)
        kept.leave()
        return out


class _Input:
    """The hidden states that a layer begins with: as they are until it has run, then a copy in the host's memory."""

    def __init__(self, hidden: Tensor, below: Callable[[], _Input | None]) -> None:
        self._hidden: Tensor | None = hidden
        self._below = below
        self._learns, self._device = hidden.requires_grad, hidden.device
        self._back: Tensor | None = None
        self._host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
        with _aside(self._device) as stream:
            self._host.copy_(hidden.detach(), non_blocking=True)
            self._copied = None if stream is None else stream.record_event()

    def leave(self) -> None:
        """The layer has run. What it began with goes in the order of the layers, not when a copy is seen to be done:
        the host is many layers ahead, and all that still waited would lie on the device at once."""
        self._wait()
        self._hidden = None

    def take(self) -> Tensor:
        """The hidden states, as the layer's input; from the second time on those that come back."""
        if self._hidden is not None:
            return self._hidden
        self.fetch()
        back, self._back = self._back, None
        assert back is not None
        self._wait()
        if (below := self._below()) is not None:
            below.fetch()
        return back.requires_grad_(self._learns)

    def fetch(self) -> None:
        """Begins to bring them back."""
        if self._back is not None:
            return
        self._back = torch.empty_like(self._host, device=self._device)
        with _aside(self._device) as stream:
            self._back.copy_(self._host, non_blocking=True)
            self._copied = None if stream is None else stream.record_event()

    def _wait(self) -> None:
        """What is queued from now on comes behind the last copy."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def __del__(self) -> None:
        if self._back is not None:  # never taken: no backward came here
            self._wait()


def mapped(x: Tensor) -> Tensor:
    """`x` of a CUDA device in the host's memory, where its kernels read and write it (unified addressing)."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x)
    return torch.as_tensor(_Bytes(host), device=x.device).view(x.dtype).view(x.shape)


class _Bytes:
    """A tensor's bytes by numba's protocol, which torch takes as they lie; keeps the tensor."""

    def __init__(self, host: Tensor) -> None:
        self._host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel() * host.itemsize,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


@contextmanager
def _aside(device: torch.device) -> Generator[Any]:
    """Inside, work goes to the device's stream for copies, behind what is queued now; None on a CPU, where none is."""
    if device.type != "cuda":
        yield None
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _nothing() -> None:
    return None
