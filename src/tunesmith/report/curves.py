"""metrics.jsonl -> curves of a training: loss, learning rate, gradient norm, and what validation said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith.report.plots import Scale, path, scale_of

POINTS = 600  # of a curve; more steps are averaged in equal stretches
REACH = 20  # a smooth curve is the mean over a tenth of the steps
LOGARITHMIC = 20.0  # a curve whose largest value is this many times its smallest gets a logarithmic scale
HEIGHT = 100.0
_COUNTERS = ("step", "epoch", "tokens", "skipped")
_TITLES = {"grad_norm": "gradient norm"}


@dataclass(frozen=True, slots=True)
class Series:
    """One line: values at steps. `style`: raw, smooth, dots."""

    name: str
    tone: str
    style: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over the same steps. `marks` are (value, name) of lines across."""

    key: str
    title: str
    series: list[Series]
    x: Scale
    y: Scale
    logarithmic: bool = False
    marks: tuple[tuple[float, str], ...] = ()

    def path(self, series: Series) -> str:
        return path(series.steps, [self._moved(v) for v in series.values], self.x, self._y, HEIGHT)

    def across(self, step: float) -> float:
        return self.x.at(step)

    def down(self, value: float) -> float:
        """Percent from the top."""
        return round(100 - self._y.at(self._moved(value)), 2)

    @property
    def y_ticks(self) -> list[float]:
        if not self.logarithmic:
            return self.y.ticks(4)
        exponents = range(-12, 13)
        fine = [factor * 10.0**e for e in exponents for factor in (1, 2, 5)]
        inside = [t for t in fine if self.y.holds(t)]
        return inside if len(inside) <= 5 else [t for t in inside if f"{t:e}"[0] == "1"] or inside[:: len(inside) // 4]

    @property
    def _y(self) -> Scale:
        return Scale(self._moved(self.y.low), self._moved(self.y.high)) if self.logarithmic else self.y

    def _moved(self, value: float) -> float:
        return math.log10(max(value, self.y.low)) if self.logarithmic else value

    def points(self) -> dict[str, Any]:
        """What a script needs to tell the values at a step."""
        return {
            "low": self.x.low,
            "high": self.x.high,
            "series": [
                {"name": s.name, "tone": s.tone, "steps": s.steps, "values": [float(f"{v:.5g}") for v in s.values]}
                for s in self.series
            ],
        }


@dataclass(frozen=True, slots=True)
class Training:
    """What was recorded of the steps. `stretch`: how many steps a point of a curve is the mean of."""

    steps: int
    charts: list[Chart]
    validations: list[dict[str, float]]
    best: int | None
    stretch: int
    skipped: int


def read_training(run: Path, training: Mapping[str, Any], higher: bool) -> Training:
    """The curves of a run that has begun; `training` is the plan's, `higher` whether more of what selects is better."""
    lines = _lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    validations = [{"step": float(line["step"]), **line["validation"]} for line in lines if "validation" in line]
    stopping = training["early_stopping"] or {}
    selects = str(stopping.get("metric") or "loss")
    best = _best(validations, selects, higher, float(stopping.get("min_delta", 0.0)))
    stretch = max(1, -(-len(steps) // POINTS))
    charts = _charts(steps, validations, stretch, training) if steps else []
    return Training(len(steps), charts, validations, best, stretch, sum(bool(line.get("skipped")) for line in steps))


def _charts(
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, float]],
    stretch: int,
    plan: Mapping[str, Any],
) -> list[Chart]:
    x = Scale(0.0, float(max(steps[-1]["step"], 1)))
    charts: list[Chart] = []
    named = [key for key in dict.fromkeys(k for line in steps for k in line) if key not in _COUNTERS]
    for key in sorted(named, key=lambda k: (k != "loss", k in ("learning_rate", "grad_norm"))):
        having = [line for line in steps if key in line]
        at = _averaged([line["step"] for line in having], stretch)
        values = _averaged([line[key] for line in having], stretch)
        series = [Series(key.replace("_", " "), "after", "raw", at, values)]
        if key != "learning_rate":
            series = [Series("each step" if stretch == 1 else f"mean of {stretch} steps", "after", "raw", at, values)]
            series.append(Series("smoothed", "after", "smooth", at, _smooth(values)))
        held = [(v["step"], v[key]) for v in validations if key in v]
        if held:
            series.append(Series("validation", "second", "dots", [s for s, _ in held], [v for _, v in held]))
        charts.append(_chart(key, series, x, plan))
    also = [key for key in (validations[0] if validations else {}) if key != "step" and key not in named]
    for key in also:
        points = Series("validation", "second", "dots", [v["step"] for v in validations], [v[key] for v in validations])
        charts.append(_chart(key, [points], x, plan))
    return charts


def _chart(key: str, series: list[Series], x: Scale, plan: Mapping[str, Any]) -> Chart:
    marks = ((float(plan["clip"]), "clipped above"),) if key == "grad_norm" and plan.get("clip") else ()
    values = [value for one in series for value in one.values]
    smooth = [value for one in series if one.style != "raw" for value in one.values] or values
    logarithmic = key != "learning_rate" and min(values) > 0 and max(smooth) > LOGARITHMIC * min(smooth)
    if logarithmic:
        y = Scale(min(values) / 1.15, max(values) * 1.15)
    else:
        y = scale_of(values, include=(0.0,) if min(values) >= 0 and min(values) < 0.5 * max(values) else ())
    return Chart(
        key,
        _TITLES.get(key, key.replace("_", " ")),
        series,
        x,
        y,
        logarithmic,
        tuple(m for m in marks if y.holds(m[0])),
    )


def _averaged(values: Sequence[float], stretch: int) -> list[float]:
    if stretch == 1:
        return [float(value) for value in values]
    pieces = [values[i : i + stretch] for i in range(0, len(values), stretch)]
    return [sum(piece) / len(piece) for piece in pieces]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the values around each, as many before as after it, so that the curve does not lag behind."""
    reach = max(2, len(values) // REACH)
    sums = [0.0, *itertools.accumulate(values)]
    found: list[float] = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        found.append((sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return found


def _best(validations: Sequence[Mapping[str, float]], name: str, higher: bool, margin: float) -> int | None:
    """The step whose checkpoint became the result, as the monitor chooses it."""
    best: tuple[float, float] | None = None
    for found in validations:
        if name in found and (best is None or (found[name] - best[1]) * (1 if higher else -1) > margin):
            best = (found["step"], found[name])
    return None if best is None else int(best[0])


def last_by_step(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The last line of each step of a journal, and how many lines there were besides: steps done again after a stop."""
    lines = _lines(file)
    found = {line["step"]: line for line in lines}
    return list(found.values()), len(lines) - len(found)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Lines of a journal; one that a kill cut off is left out."""
    found: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
    return found
