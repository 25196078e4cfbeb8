"""Gradual unfreezing: layers begin to train one after the other, the top one first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tunesmith.protocols import Engine
from tunesmith.types import GradientMode


class Unfreeze:
    """Takes the gradient off layers whose turn has not come, so that neither they nor their moments move.

    `blocks` are parameter names from the top layer down: block k of n trains from step 1 + floor(k share total / n).
    `bottom` (embeddings) begins with the last block. Source: Howard and Ruder 2018 (ULMFiT, arXiv 1801.06146), 3.3.
    """

    mode: ClassVar[GradientMode] = "plain"

    def __init__(self, blocks: Sequence[set[str]], bottom: set[str], total_steps: int, share: float) -> None:
        turns = [1 + int(k * share * total_steps / len(blocks)) for k in range(len(blocks))]
        self.first_step = {name: turn for names, turn in zip(blocks, turns, strict=True) for name in names}
        self.first_step |= dict.fromkeys(bottom, max(turns, default=1))

    def before_step(self, engine: Engine, number: int) -> dict[str, float]:
        """How many parameters train, as `unfrozen`."""
        waiting = [name for name, first in self.first_step.items() if number < first]
        for name in waiting:
            engine.trainable[name].grad = None
        return {"unfrozen": float(sum(p.numel() for n, p in engine.trainable.items() if n not in set(waiting)))}

    def after_step(self, engine: Engine, number: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
