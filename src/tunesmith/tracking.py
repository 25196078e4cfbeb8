"""A run's events sent to the trackers that its recipe names. Not one of them can end the run."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import rundir
from tunesmith.engine import checkpoint
from tunesmith.errors import InputError, StoppedError
from tunesmith.events import Listen, StopRun
from tunesmith.protocols import Tracker
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import leaves
from tunesmith.rundir import RunDir
from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS

log = logging.getLogger("tunesmith.tracking")

FILE = "trackers.json"
KEPT = ("report.html", "model/MODEL_CARD.md", "evaluation.json", "comparison.json")
UNPLOTTED = ("step", "total_steps", "skipped", "best")
KINDS = {"step": "train", "validation": "validation"}  # events whose numbers are points


@dataclass(frozen=True, slots=True)
class Point:
    """The numbers of one step of one kind."""

    kind: str
    step: int
    numbers: Mapping[str, float]

    @staticmethod
    def of(kind: str, data: Mapping[str, Any]) -> Point:
        named = {f"{kind}/{name}": data[name] for name in data if name not in UNPLOTTED}
        numbers = {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
        return Point(kind, int(data["step"]), numbers)


@dataclass(slots=True)
class Followed:
    """One tracker at work: the last step of each kind that it has, and what went wrong, which ends its work."""

    name: str
    tracker: Tracker
    held: dict[str, int]
    trouble: str | None = None
    finished: bool = False

    def entry(self) -> dict[str, Any]:
        lost = {} if self.trouble is None else {"trouble": self.trouble, "held": self.held}
        return {"key": self.tracker.key, "where": self.tracker.where, "finished": self.finished, **lost}


class Tracking:
    """Listens to a run for its trackers, in front of who listens already."""

    def __init__(self, run: RunDir, params: Mapping[str, str | float], listen: Listen) -> None:
        self._run = run
        self._params = params
        self._listen = listen
        self._known: dict[str, Any] = _known(run)
        self._followed: dict[str, Followed] = {}
        self._said: set[str] = set()
        saved = checkpoint.found(run.checkpoints)
        self._step = saved[-1].step if saved else 0

    def start(self, names: Iterable[str], again: bool) -> None:
        """Begins each tracker, or goes on with it and sends what it lacks of the steps that stay.

        Raises InputError where one cannot begin with a fresh run; a run that goes on goes on without it.
        """
        for name in dict.fromkeys(names):
            try:
                self._begin(name)
            except Exception as error:
                why = f"{name} did not start: {_reason(error)}"
                if not again:
                    remedy = f"mend it and `tunesmith resume {self._run.path}`, which goes on without it if need be"
                    raise InputError(why, remedy) from error
                log.warning("%s; the run goes on without it", why)
        self._write()

    def listen(self, event: str, data: Mapping[str, Any]) -> None:
        """Sends an event's numbers, and passes it on."""
        if event in KINDS:
            self._step = int(data["step"])
            point = Point.of(KINDS[event], data)
            for followed in self._followed.values():
                self._send(followed, point)
        self._listen(event, data)

    def finish(
        self, state: Literal["finished", "stopped", "failed"], records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """The last word to each tracker. At a run's end, one that failed is tried once more, with all that it lacks."""
        files = [self._run.path / name for name in KEPT if state == "finished" and (self._run.path / name).is_file()]
        outcome = Outcome(state, self._step, records, files)
        for name, followed in list(self._followed.items()):
            if followed.trouble is not None and state == "finished":
                self._known[name] = followed.entry()
                with suppress(Exception):
                    self._begin(name)
            followed = self._followed[name]
            self._tell(followed, lambda tracker: tracker.finish(outcome))
            followed.finished = state == "finished" and followed.trouble is None
        self._write()
        self._followed = {}

    def _begin(self, name: str) -> None:
        """The tracker in its place, with every point up to the step where the run stands."""
        before = self._known.get(name, {})
        folder = self._run.path.resolve()
        points = list(_recorded(self._run.path))
        with _quiet(self._said):
            tracker = TRACKERS.get(name)(TrackedRun(folder.name, folder, self._params, before.get("key"), self._step))
            held = {kind: _held(tracker, kind, points, before) for kind in KINDS.values()}
        followed = self._followed[name] = Followed(name, tracker, held)
        self._listen("tracking", {"tracker": name, "where": tracker.where})
        for point in points:
            if point.step <= self._step:
                self._send(followed, point)

    def _send(self, followed: Followed, point: Point) -> None:
        if point.step > followed.held[point.kind]:
            self._tell(followed, lambda tracker: tracker.log(point.step, point.numbers))
            if followed.trouble is None:
                followed.held[point.kind] = point.step

    def _tell(self, followed: Followed, act: Callable[[Tracker], None]) -> None:
        """Lets a tracker do something; one that failed is left alone, and the run goes on."""
        if followed.trouble is not None:
            return
        try:
            with _quiet(self._said):
                act(followed.tracker)
        except Exception as error:
            followed.trouble = _reason(error)
            log.warning("%s failed: %s; the run goes on without it", followed.name, followed.trouble)
            self._write()

    def _write(self) -> None:
        self._known |= {name: followed.entry() for name, followed in self._followed.items()}
        if self._known:
            rundir.write_json(self._run.path / FILE, self._known)


@contextmanager
def tracked(run: RunDir, recipe: Recipe, plan_hash: str, listen: Listen, again: bool = False) -> Generator[Tracking]:
    """Inside, the trackers follow the run; however it ends, they are told."""
    params = {"run_folder": str(run.path.resolve()), "plan": plan_hash, **_params(recipe)}
    tracking = Tracking(run, params, listen)
    try:
        tracking.start(recipe.report_to, again)
        yield tracking
    except (StoppedError, StopRun, KeyboardInterrupt):
        tracking.finish("stopped")
        raise
    except BaseException:
        tracking.finish("failed")
        raise


def unfinished(run: RunDir) -> bool:
    """Whether a tracker has not been told the end of the run."""
    return not all(entry["finished"] for entry in _known(run).values())


def _held(tracker: Tracker, kind: str, points: Sequence[Point], before: Mapping[str, Any]) -> int:
    """The last step of a kind that a tracker has: by its own account, else what was recorded before the run stopped."""
    if not before:
        return 0
    told = tracker.held(kind)
    sent = max((point.step for point in points if point.kind == kind), default=0) if told is None else told
    return min(sent, before["held"][kind]) if "trouble" in before else sent


def _recorded(folder: Path) -> Iterator[Point]:
    """What metrics.jsonl and timings.jsonl hold, the steps that a resume takes again included."""
    timings = {line["step"]: line for line in _lines(folder / "timings.jsonl")}
    for line in _lines(folder / "metrics.jsonl"):
        if "validation" in line:
            yield Point.of("validation", {"step": line["step"], **line["validation"]})
        else:
            yield Point.of("train", {**line, **timings.get(line["step"], {})})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a journal; a kill may have left half of the last one."""
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def _known(run: RunDir) -> dict[str, Any]:
    """The trackers that have begun, by name: key, place, and how it ended."""
    return rundir.read_json(run.path / FILE) if (run.path / FILE).is_file() else {}


def _params(recipe: Recipe) -> dict[str, str | float]:
    """The recipe's keys with their values; those that were left out are left out."""
    found: dict[str, str | float] = {}
    for key, value in leaves(recipe.model_dump(mode="json")).items():
        if value is not None and value != [] and value != {}:
            found[key] = value if isinstance(value, str | int | float) else json.dumps(value)
    return found


def _reason(error: Exception | str) -> str:
    """The first line of what is wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet(said: set[str]) -> Generator[None]:
    """Inside, a library's chatter stays off the screen; what it only warns of is said by us, and once."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for text in [_reason(warning.message) for warning in caught]:
        if text not in said:
            said.add(text)
            log.warning("%s", text)
