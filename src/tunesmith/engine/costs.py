"""Bytes and seconds of a step as straight lines over a model's layers, and the recomputation that fits fastest.

Layers are alike, so a step of any number of them is read off the line through two models of few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.models.recompute import Again


@dataclass(frozen=True, slots=True)
class Cost:
    """A step of one model. Bytes, the most in use: `loss`, until the loss's backward reaches the layers; `turn`, while
    it is in the topmost of them; `rest`, from there to the step's end. Seconds: `micro`, of the largest micro-batch
    forward and backward, `usual`, of one of mean size that comes for the first time, and `step`, of clipping and the
    optimizer. `served`: its layers run on our kernels.
    """

    loss: float
    turn: float
    rest: float
    micro: float
    step: float
    served: bool = False
    usual: float = 0.0

    @property
    def peak(self) -> float:
        return max(self.loss, self.turn, self.rest)


@dataclass(frozen=True, slots=True)
class Line:
    """Costs of models of `few` and of `more` layers, and through them of any number; both are one where few is more."""

    few: int
    more: int
    of_few: Cost
    of_more: Cost

    def at(self, name: str, layers: float) -> float:
        low, high = getattr(self.of_few, name), getattr(self.of_more, name)
        return low if self.few == self.more else low + (high - low) * (layers - self.few) / (self.more - self.few)

    def each(self, name: str) -> float:
        """What one layer adds."""
        return self.at(name, 1) - self.at(name, 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """`count` layers run again. `peak` in bytes; seconds as in `Cost`."""

    again: Again
    count: int
    peak: float
    micro: float
    step: float


def peak(plain: Line, again: Line, layers: int, count: int) -> float:
    """The most bytes in use by a step of `layers`, of which the lowest `count` run again.

    `plain` and `again` are of models none and all of whose layers do. With some of them the peak is at the loss or in
    the topmost layer's backward, less what each layer that runs again does not keep, or among the layers that run
    again: at their bottom, where gradients of a layer are more than it keeps, and else below what the topmost took.
    """
    if count in (0, layers):
        line = again if count else plain
        return max(line.at(name, layers) for name in ("loss", "turn", "rest"))
    spared = count * (plain.each("loss") - again.each("loss"))
    return max(plain.at("loss", layers) - spared, plain.at("turn", layers) - spared, again.at("rest", layers))


def choose(lines: Mapping[Again, Line], layers: int, room: float, all_of: Again | None = None) -> Choice | None:
    """The fastest that fits into `room` bytes; None where nothing does.

    `lines`: of "none", and of the ways to run again that are to be considered; `all_of`: so, and all layers.
    """
    plain = lines["none"]
    found: list[Choice] = []
    for name, line in lines.items():
        if all_of not in (None, name):
            continue
        partly = range(1, layers) if plain.few != plain.more and all_of is None else ()
        for count in (0,) if name == "none" else (*partly, layers):
            if (bytes_ := peak(plain, line, layers, count)) <= room:
                more = line.at("micro", layers) - plain.at("micro", layers)
                micro = plain.at("micro", layers) + more * count / layers
                found.append(Choice(name, count, bytes_, micro, line.at("step", layers)))
                break  # more of them only take longer
    return min(found, key=lambda choice: choice.micro, default=None)
