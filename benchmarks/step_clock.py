"""How long each step took, and how much of the machine other processes had meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = (0, 1, 2, 5, 6, 7)  # /proc/stat: user, nice, system, irq, softirq, steal


class StepClock:
    """Call `tick` at the end of each step. `others[i]` is the share of all cores that others used in step i.

    A step's threads wait for one another thousands of times, so a single foreign process that takes a core now
    and then slows it several times over; such steps say nothing of the system that is measured.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.others: list[float] = []
        self._before = self._now()

    def restart(self) -> None:
        """The first step begins now."""
        self._before = self._now()

    def tick(self) -> None:
        now = self._now()
        wall, own, busy = (b - a for a, b in zip(self._before, now, strict=True))
        self.seconds.append(wall)
        self.others.append(max(0.0, busy - own) / (wall * (os.cpu_count() or 1)))
        self._before = now

    def _now(self) -> tuple[float, float, float]:
        """Seconds: on the wall, of this process, and of all processes; the last is this one's where unknown."""
        own = time.process_time()
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return time.perf_counter(), own, own
        return time.perf_counter(), own, sum(int(fields[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
