"""Checkpoints written beside training: hashed, fsynced and renamed by one thread, one at a time.

Training waits only while the state is copied, and for the write before where that is still under way. SmolLM2-135M on
one of two busy cores, with steps of 4 to 6 s: a save took 25 s of a full run (1.6 GB), now 1.3 s and about 2 s of the
step behind it, which shares the cores with the hashing; of a LoRA run (59 MB) 0.9 s, now 0.1 s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

from tunesmith.engine import checkpoint


class Writer:
    """Writes the checkpoints of one folder. What a write fails with is raised by the next call of any method."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: futures.Future[None] | None = None

    def write(self, step: int, states: Mapping[str, Mapping[str, Any]], keep: Collection[int]) -> None:
        """Begins a checkpoint of `states` as they are now; once it is whole, all others but those of `keep` go."""
        self.wait()  # so that memory holds one snapshot
        self._writing = self._thread.submit(self._write, step, checkpoint.snapshot(states), keep)

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk."""
        if self._writing is not None:
            futures.wait([self._writing])  # an interrupt leaves it to `close`
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
        self._thread.shutdown()
        self.wait()

    def _write(self, step: int, files: checkpoint.Files, keep: Collection[int]) -> None:
        checkpoint.put(self._folder, step, files)
        checkpoint.prune(self._folder, {*keep, step})
