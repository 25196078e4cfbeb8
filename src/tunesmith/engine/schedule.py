"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warm-up: a fraction of the run below 1, a number of steps from 1 on."""
    return min(total_steps, math.ceil(warmup * total_steps) if warmup < 1 else round(warmup))


def multiplier(schedule: str, step: int, total_steps: int, warmup: int) -> float:
    """Factor on the learning rate of step `step` (the first is 1): up to 1 over `warmup` steps, then down.

    The last step still learns: decay is measured over `total_steps - warmup` and reaches 0 one step later.
    """
    if step <= warmup:
        return step / warmup
    return DECAYS[schedule]((step - warmup - 1) / max(1, total_steps - warmup))
