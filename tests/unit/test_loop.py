"""The order of things around a step: gradient, rules, optimizer, rules, record, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tunesmith import loop
from tunesmith.types import Batch, Step, StepStats

SKIPPED = 2
Notes = list[tuple[Any, ...]]


class Source:
    def __init__(self, notes: Notes, total_steps: int) -> None:
        self.notes, self.total_steps = notes, total_steps

    def restore(self, state: Any) -> None: ...
    def steps(self, policy: Any) -> Iterator[Step]:
        for number in range(1, self.total_steps + 1):
            self.notes.append(("take", number))
            yield Step(number, list[Batch](), {})


class Engine:
    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def forward_backward(self, objective: Any, policy: Any, step: Step) -> StepStats:
        self.notes.append(("gradient", step.number))
        return StepStats(float(step.number), {}, {}, 0, skipped=step.number == SKIPPED)

    def step(self) -> None:
        self.notes.append(("move",))


class Rule:
    def __init__(self, notes: Notes, name: str) -> None:
        self.notes, self.name = notes, name

    def before_step(self, engine: Any, number: int) -> dict[str, float]:
        self.notes.append(("before", self.name, number))
        return {self.name: float(number)}

    def after_step(self, engine: Any, number: int) -> None:
        self.notes.append(("after", self.name, number))


class Watch:
    def __init__(self, notes: Notes, last: int) -> None:
        self.notes, self.last = notes, last

    def record(self, step: Step, stats: StepStats, columns: dict[str, float]) -> None:
        self.notes.append(("record", step.number, stats.loss, columns))

    def finished(self, step: Step) -> bool:
        self.notes.append(("finished?", step.number))
        return step.number == self.last


def notes_of(total_steps: int, last: int) -> Notes:
    notes: Notes = []
    engine: Any = Engine(notes)
    rules: Any = [Rule(notes, "a"), Rule(notes, "b")]
    nothing: Any = None
    source: Any = Source(notes, total_steps)
    loop.train(source, nothing, nothing, engine, rules, Watch(notes, last))
    return notes


def test_rules_stand_around_the_optimizer_in_their_order() -> None:
    assert notes_of(1, 9) == [
        ("take", 1),
        ("gradient", 1),
        ("before", "a", 1),
        ("before", "b", 1),
        ("move",),
        ("after", "a", 1),
        ("after", "b", 1),
        ("record", 1, 1.0, {"a": 1.0, "b": 1.0}),
        ("finished?", 1),
    ]


def test_a_skipped_step_is_recorded_and_meets_neither_rule_nor_optimizer() -> None:
    assert [note for note in notes_of(2, 9) if note[-1] == SKIPPED or note[1:2] == (SKIPPED,)] == [
        ("take", 2),
        ("gradient", 2),
        ("record", 2, 2.0, {}),
        ("finished?", 2),
    ]


@pytest.mark.parametrize(("total", "last", "taken"), [(5, 3, 3), (5, 9, 5), (0, 9, 0)])
def test_it_ends_with_the_source_or_with_the_watch(total: int, last: int, taken: int) -> None:
    notes = notes_of(total, last)
    assert [note for note in notes if note[0] == "take"] == [("take", n) for n in range(1, taken + 1)]
    assert notes.count(("move",)) == taken - (taken >= SKIPPED)
