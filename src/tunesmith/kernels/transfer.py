"""Between host and device without waiting for what else is queued: tensors there, numbers back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to CUDA through pinned memory, from which it is copied when its turn comes."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Mark:
    """The moment at which a device has done all that is queued so far; on a CPU: now."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._now = time.perf_counter()

    def since(self, before: Mark) -> float:
        """Seconds from an earlier moment of the same device; waits for this one."""
        if self._event is None or before._event is None:
            return self._now - before._now
        self._event.synchronize()
        return before._event.elapsed_time(self._event) / 1e3


class Arriving:
    """A number that work queued so far leaves on a device; to look at it waits for that work, not for later work.

    Where it is not finite and there is a `refusal`, looking at it raises what that makes of it.
    """

    def __init__(self, value: Tensor, refusal: Callable[[float], Exception] | None = None) -> None:
        self._refusal = refusal
        self._arrived: torch.cuda.Event | None = None
        self._value = value.detach()
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(self._value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        number = float(self._value)
        if self._refusal is not None and not math.isfinite(number):
            raise self._refusal(number)
        return number
