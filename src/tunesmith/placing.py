"""Where a run goes and in what pieces, by the shapes alone, and whether it is to be measured instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith import extent, settings
from tunesmith.engine.precision import choose_device
from tunesmith.protocols import Mines

if TYPE_CHECKING:
    from tunesmith.data.prepare import Prepared
    from tunesmith.engine.precision import Speed
    from tunesmith.facts import Facts
    from tunesmith.protocols import Objective


def placed(
    facts: Facts,
    prepared: Prepared,
    objective: Objective,
    training: settings.Meaning,
    speed: Speed,
    trainable: int,
    defaults: list[settings.Default],
    *,
    measured: bool,
) -> tuple[settings.Placement, settings.Prediction]:
    """Where it runs and in what pieces, and what that takes by the shapes alone."""
    longest = extent.longest(facts, prepared, objective, training.sequence_length)
    epoch = extent.epoch(facts, prepared, objective)
    placement, shape, peak = settings.resolve_placement(
        facts, training, speed, trainable, longest, epoch, defaults, measured=measured
    )
    prediction = settings.predict(facts, training, placement, shape, speed, peak, epoch)
    return settings.with_compiling(facts, placement, prediction, defaults), prediction


def is_measured(facts: Facts, objective: Objective) -> bool:
    """Whether steps are measured before weights load (see `probing`), and not only predicted from shapes.

    On CUDA, where training is of one model that begins at its base, by examples that are known.
    """
    on_cuda = choose_device(facts.recipe.place.device).type == "cuda" and not facts.method.frozen_backbone
    mines = isinstance(objective, Mines) and objective.mines
    return on_cuda and facts.teacher is None and not facts.beneath and not mines
