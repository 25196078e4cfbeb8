"""The training loop: the whole of training, whatever is trained and however."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tunesmith.models.policy import Policy
from tunesmith.protocols import Engine, GradientRule, Objective, Source
from tunesmith.types import Number, Step, StepStats


class Watch(Protocol):
    """What happens around the steps: records, evaluation, checkpoints, early stopping."""

    def record(self, step: Step, stats: StepStats, columns: Mapping[str, Number]) -> None:
        """Tells of the step, or of the one before while a device is still at this one."""
        ...

    def finished(self, step: Step) -> bool:
        """Evaluates and saves when due; True when the run should end here."""
        ...


def train(
    source: Source, policy: Policy, objective: Objective, engine: Engine, rules: Sequence[GradientRule], watch: Watch
) -> None:
    """Takes every step of `source`, until it is exhausted or `watch` has seen enough.

    A step without a single trained unit moves nothing and is counted by `watch`.
    """
    for step in source.steps(policy):
        stats = engine.forward_backward(objective, policy, step)
        columns: dict[str, Number] = {}
        if not stats.skipped:
            for rule in rules:
                columns.update(rule.before_step(engine, step.number))
            engine.step()
            for rule in rules:
                rule.after_step(engine, step.number)
        watch.record(step, stats, columns)
        if watch.finished(step):
            break
