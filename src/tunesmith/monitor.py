"""What happens around the steps: records, validation, checkpoints, the best one, early stopping, stop signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil
import torch

from tunesmith.engine.native import NativeEngine
from tunesmith.engine.saving import Writer
from tunesmith.errors import RefusedError, StoppedError
from tunesmith.events import Deferred, StopRun
from tunesmith.kernels.transfer import Mark
from tunesmith.protocols import GradientRule, Source
from tunesmith.rundir import RunDir
from tunesmith.settings import Meaning
from tunesmith.types import Number, Step, StepStats


@dataclass(slots=True)
class StopRequest:
    """Set by SIGTERM or SIGINT; looked at after each step."""

    asked: bool = False
    signals: list[int] = field(default_factory=list[int])


@contextmanager
def stoppable() -> Generator[StopRequest]:
    """Inside, the first SIGTERM or SIGINT asks for a stop after the step; a second SIGINT interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True
        request.signals.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Best:
    """The best validation so far, and how many evaluations have passed without a better one."""

    step: int = 0
    value: float | None = None
    waited: int = 0
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step that is told when the device has done it: `at` says where in the run it was."""

    at: dict[str, Any]
    examples: int
    stats: StepStats
    columns: Mapping[str, Number]
    learning_rate: float
    began: Mark
    ended: Mark


class Monitor:
    """The `Watch` of a run: `validate` returns the numbers of one validation, None where there is none."""

    def __init__(
        self,
        run: RunDir,
        training: Meaning,
        save_every: int,
        engine: NativeEngine,
        source: Source,
        rules: Sequence[GradientRule],
        *,
        validate: Callable[[], dict[str, float]] | None,
        selects: tuple[str, bool],
        stop: StopRequest,
        listen: Deferred,
    ) -> None:
        self.best = Best()
        self.skipped = 0
        self._run = run
        self._training = training
        self._save_every = save_every
        self._engine = engine
        self._source = source
        self._rules = rules
        self._validate = validate
        self._selects, self._higher = selects
        self._stop = stop
        self._listen = listen
        self._metrics = run.journal("metrics.jsonl")
        self._timings = run.journal("timings.jsonl")
        self._writer = Writer(run.checkpoints)
        self._tokens = 0
        self._mark = Mark(engine.device)
        self._late: list[_Taken] = []  # steps that nobody has been told of yet

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes everything back to where a checkpoint was written; a fresh run has no states."""
        if not states:
            self._metrics.cut(0)
            return
        self._engine.restore(states["engine"])
        self._source.restore(states["source"])
        for index, rule in enumerate(self._rules):
            rule.restore(states["rules"][str(index)])
        watch = states["watch"]
        self.best = Best(**watch["best"])
        self.skipped, self._tokens = int(watch["skipped"]), int(watch["tokens"])
        self._metrics.cut(int(watch["metrics_bytes"]))

    def record(self, step: Step, stats: StepStats, columns: Mapping[str, Number]) -> None:
        """Tells of the step; where the engine runs ahead, of the one before, while the device is at this one."""
        self._tokens += stats.tokens
        self.skipped += stats.skipped
        at = {"step": step.number, "epoch": round(step.epoch, 6), "tokens": self._tokens}
        mark, began = Mark(self._engine.device), self._mark
        self._mark = mark
        self._late.append(_Taken(at, step.examples, stats, columns, self._engine.learning_rate, began, mark))
        self._tell(up_to=1 if self._engine.runs_ahead else 0)

    def _tell(self, up_to: int = 0) -> None:
        """Tells of all steps that nobody has been told of but the last `up_to`; of none behind one that is refused."""
        while len(self._late) > up_to:
            try:
                self._told(self._late.pop(0))
            except RefusedError:
                self._late.clear()
                raise

    def _told(self, taken: _Taken) -> None:
        stats = taken.stats
        loss = stats.loss  # waits for the device
        seconds = max(taken.ended.since(taken.began), 1e-6)  # a step of nothing takes none
        line: dict[str, Any] = {
            **taken.at,
            "loss": loss,
            **(stats.parts if len(stats.parts) > 1 else {}),
            **stats.metrics,
            "learning_rate": taken.learning_rate,
            **{name: float(value) for name, value in taken.columns.items()},
            **({"skipped": True} if stats.skipped else {}),
        }
        timing = {
            "step": taken.at["step"],
            "seconds": round(seconds, 6),
            "tokens_per_second": round(stats.tokens / seconds, 1),
            "examples_per_second": round(taken.examples / seconds, 1),
            "peak_memory_bytes": peak_memory(self._engine.device),
        }
        self._metrics.append(line)
        self._timings.append(timing)
        self._listen("step", {**line, **timing, "total_steps": self._source.total_steps})

    def finished(self, step: Step) -> bool:
        """Validates and begins to save when due; where the run ends, its checkpoint is on disk first.

        Then raises StoppedError where a signal or a listener asked for it, and any other failure of a listener.
        """
        last = step.number == self._source.total_steps
        every = self._training.evaluate_every
        validated = self._validate is not None and every is not None and (last or step.number % every == 0)
        due = step.number % self._save_every == 0
        if last or validated or due or self._stop.asked or self._listen.failure is not None:
            self._tell()
        improved = self._validated(step) if validated else False
        asked, failure = self._stop.asked, self._listen.failure  # a signal from here on is for the next step
        ends = last or self.best.stopped or asked or failure is not None
        if ends or improved or due:
            self.save(step)
        if ends:
            self._writer.wait()
        resume = f"go on with `tunesmith resume {self._run.path}`"
        if asked or isinstance(failure, StopRun):
            raise StoppedError(f"stopped after step {step.number}, as asked", resume) from failure
        if failure is not None:
            failure.add_note(f"a listener raised this; the run is saved after step {step.number}: {resume}")
            raise failure
        if not self._late:
            self._mark = Mark(self._engine.device)  # what stands between steps is no part of them
        return self.best.stopped

    def save(self, step: Step) -> None:
        """Begins a checkpoint of everything that has state; the best and the last are kept."""
        self._tell()  # a signal may have come since
        states = {
            "engine": self._engine.state(),
            "source": step.state,
            "rules": {str(index): rule.state() for index, rule in enumerate(self._rules)},
            "watch": {
                "best": {name: getattr(self.best, name) for name in Best.__slots__},
                "skipped": self.skipped,
                "tokens": self._tokens,
                "metrics_bytes": self._metrics.sync(),
            },
        }
        self._writer.write(step.number, states, keep={self.best.step})

    @contextmanager
    def telling(self) -> Generator[None]:
        """Inside, a failure comes behind what is known of the steps before it.

        RefusedError of such a step goes first, as what came behind it may be only its consequence.
        """
        try:
            yield
        except Exception as failure:
            try:
                self._tell()
            except RefusedError:
                raise
            except Exception as error:  # a device that has failed tells nothing more
                failure.add_note(f"the step before it cannot be told: {type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Waits for a checkpoint that is still being written, and raises what that failed with."""
        self._metrics.close()
        self._timings.close()
        self._writer.close()

    def _validated(self, step: Step) -> bool:
        """Records one validation; True if it is the best so far."""
        assert self._validate is not None
        numbers = self._validate()
        self._metrics.append({"step": step.number, "validation": numbers})
        value = numbers[self._selects]
        stopping = self._training.early_stopping or {}
        best, margin = self.best, float(stopping.get("min_delta", 0.0))
        improved = best.value is None or (value - best.value if self._higher else best.value - value) > margin
        if improved:
            self.best = Best(step.number, value, 0, False)
        else:
            waited = best.waited + 1
            stopped = bool(stopping) and waited >= int(stopping["patience"])
            self.best = Best(best.step, best.value, waited, stopped)
        self._listen("validation", {"step": step.number, **numbers, "best": improved})
        return improved


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: reserved on the device, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", 0) or _max_rss() or info.rss)


def _max_rss() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
