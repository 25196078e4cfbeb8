"""What trackers are told of a run: when it begins or goes on, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run when it begins or goes on.

    `key` is what the tracker called it before, None the first time. Points of steps up to `from_step` stay as they
    are; those of later steps come again, because the run goes on from there.
    """

    name: str
    folder: Path
    params: Mapping[str, str | float]
    key: str | None
    from_step: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: after which step, with which records of evaluation.json, and files worth keeping."""

    state: Literal["finished", "stopped", "failed"]
    step: int
    records: Sequence[Mapping[str, Any]] = ()
    files: Sequence[Path] = ()

    def numbers(self) -> dict[str, float]:
        """The records of whole data sets as flat numbers, each with its interval: "test/tuned/accuracy/low"."""
        found: dict[str, float] = {}
        for record in self.records:
            if record["group"] != "all":
                continue
            name = f"evaluation/{record['data']}/{record['model']}/{record['metric']}"
            parts = {name: record["value"], **{f"{name}/{part}": record[part] for part in ("low", "high", "n")}}
            found |= {key: float(value) for key, value in parts.items() if value is not None}
        return found
