"""When steps end, by events on the device: nobody waits for it between steps, as nobody does in a run."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import workload


class Marks:
    """Call `begin` before the first step, and `end` after each; then `numbers`."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self._events: list[torch.cuda.Event] = []
        self._began = self.first = 0.0

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._began = time.perf_counter()

    def end(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        if len(self._events) == 1:
            event.synchronize()
            self.first = time.perf_counter() - self._began
        if len(self._events) == self._warm_up:
            torch.cuda.reset_peak_memory_stats()

    def numbers(self, shape: dict[str, Any], lengths: list[list[int]], method: str) -> dict[str, Any]:
        """Of the steps behind the warm-up, whose lengths are among `lengths` of all steps."""
        torch.cuda.synchronize()
        timed = self._events[self._warm_up - 1 :]
        steps = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(timed))
        seconds = timed[0].elapsed_time(timed[-1]) / 1e3
        work = sum(workload.flop(shape, part, method) for part in lengths[self._warm_up :])
        return {
            "tokens_per_second": round(sum(map(sum, lengths[self._warm_up :])) / seconds),
            "share_of_peak": round(work / seconds / workload.PEAK, 4),
            "step_ms": round(steps[len(steps) // 2], 1),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            "first_step_s": round(self.first, 2),
            "steps": len(self._events),
            "warm_up": self._warm_up,
            "tokens_per_step": round(sum(map(sum, lengths[self._warm_up :])) / len(steps)),
            "torch": torch.__version__,
            "card": torch.cuda.get_device_name(),
        }
