"""What a run tells while it happens: the events, what each carries, and how to listen to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    from tunesmith.planning import Plan


class Progress(TypedDict):
    """Something is waited for, such as a download or the tokenising of a split."""

    what: str
    done: int
    of: int | None


class Planned(TypedDict):
    """The plan stands and the run has its folder."""

    run: str
    plan: Plan


class Tracking(TypedDict):
    """A tracker of `report_to` follows the run; `where` says where it can be looked at."""

    tracker: str
    where: str


class Phase(TypedDict):
    """Another part of the run begins. `what` and `rows`: the model or data that it is about.

    `total_steps` and `from_step` (the checkpoint that it goes on from, 0 for none) come with training.
    """

    name: Literal["loading", "training", "saving", "evaluating", "finished already"]
    what: NotRequired[str]
    rows: NotRequired[int]
    total_steps: NotRequired[int]
    from_step: NotRequired[int]


class Step(TypedDict):
    """An optimizer step was taken: the line of metrics.jsonl and that of timings.jsonl in one.

    Further keys: each part of a loss that has several, the objective's own numbers (such as `accuracy`) and those
    of the gradient rules (`grad_norm`). `skipped` stands where the step had nothing to learn.
    """

    step: int
    total_steps: int
    epoch: float
    tokens: int
    loss: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    examples_per_second: float
    peak_memory_bytes: int
    skipped: NotRequired[bool]


class Sample(TypedDict):
    """The model's answer to the first validation row, where answers are generated."""

    where: str
    output: str
    reference: str | None


class Validation(TypedDict):
    """The validation rows were measured after `step`. Further keys: the metric of early stopping.

    `best`: these are the best numbers so far.
    """

    step: int
    loss: float
    best: bool


class Best(TypedDict):
    """Training is over, and the model is the one of an earlier step, whose validation number was the best."""

    step: int
    value: float


class Finished(TypedDict):
    """All is written. `records` is what evaluation.json holds, `effects` what comparison.json holds."""

    run: str
    records: list[dict[str, Any]]
    effects: list[dict[str, Any]]


EVENTS: Mapping[str, type] = {
    "progress": Progress,
    "planned": Planned,
    "tracking": Tracking,
    "phase": Phase,
    "step": Step,
    "sample": Sample,
    "validation": Validation,
    "best": Best,
    "finished": Finished,
}


class Listen(Protocol):
    """Any function of an event's name and its data. What it returns is not looked at."""

    def __call__(self, event: str, data: Mapping[str, Any], /) -> object: ...


class StopRun(Exception):  # noqa: N818 - a request, as StopIteration is one
    """Raised by a listener to end the run. At a step, what was learned is saved first; `resume` goes on from there."""


class Callback:
    """A listener with a method for each event; a subclass overrides those that it wants to hear."""

    def __call__(self, event: str, data: Mapping[str, Any], /) -> None:
        """Hands an event to its method; events of later versions are passed over."""
        if event in EVENTS:
            getattr(self, f"on_{event}")(data)

    def on_progress(self, data: Progress) -> None: ...
    def on_planned(self, data: Planned) -> None: ...
    def on_tracking(self, data: Tracking) -> None: ...
    def on_phase(self, data: Phase) -> None: ...
    def on_step(self, data: Step) -> None: ...
    def on_sample(self, data: Sample) -> None: ...
    def on_validation(self, data: Validation) -> None: ...
    def on_best(self, data: Best) -> None: ...
    def on_finished(self, data: Finished) -> None: ...


class Together:
    """Several listeners as one. All hear every event; the first failure is raised after that."""

    def __init__(self, listeners: Iterable[Listen]) -> None:
        self._listeners = tuple(listeners)

    def __call__(self, event: str, data: Mapping[str, Any], /) -> None:
        failure: Exception | None = None
        for listen in self._listeners:
            try:
                listen(event, data)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


class Deferred:
    """A listener whose first failure is kept until whoever tells has brought its work to safety."""

    def __init__(self, listen: Listen) -> None:
        self.failure: Exception | None = None
        self._listen = listen

    def __call__(self, event: str, data: Mapping[str, Any], /) -> None:
        if self.failure is not None:
            return
        try:
            self._listen(event, data)
        except Exception as error:
            self.failure = error
