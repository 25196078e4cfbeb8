"""Where things stand in a plot: scales, round ticks, paths. What is drawn there is the templates' matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DIGITS = 5  # of a coordinate: a plot is at most a few thousand pixels wide


@dataclass(frozen=True, slots=True)
class Mark:
    """A value with its interval in a plot; limits that are unknown are None. `tone` names its colour."""

    name: str
    value: float
    low: float | None
    high: float | None
    tone: str = "after"


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` -> percent of a plot's width or height."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Percent, kept inside the plot."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(100 * min(1.0, max(0.0, share)), 2)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 5) -> list[float]:
        """At most `most` round numbers inside the scale."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        step = _round_up(span / most)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(values: Iterable[float | None], *, include: Sequence[float] = (), padding: float = 0.06) -> Scale:
    """A scale that holds all known values and `include`, with room at ends that `include` does not set."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    every = [*found, *include] or [0.0, 1.0]
    low, high = min(every), max(every)
    room = padding * (high - low) or 0.5 * abs(high) or 0.5
    return Scale(low if low in include else low - room, high if high in include else high + room)


def path(xs: Sequence[float], ys: Sequence[float | None], x: Scale, y: Scale, height: float = 100.0) -> str:
    """The d of an SVG path through the points, in a box 100 wide and `height` high whose y points down.

    A None in `ys` breaks the line.
    """
    parts: list[str] = []
    pen = "M"
    for at, value in zip(xs, ys, strict=True):
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{x.at(at):.{DIGITS}g} {height * (1 - y.at(value) / 100):.{DIGITS}g}")
        pen = "L"
    return "".join(parts)


def _round_up(step: float) -> float:
    """The least of 1, 2, 2.5, 5, 10 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
