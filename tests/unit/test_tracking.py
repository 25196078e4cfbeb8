"""A run and its trackers: what they are told, what is sent twice or never, and that none can end the run."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.recipe_file import parse_recipe
from tunesmith.report.live import View
from tunesmith.report.plan_view import show_plan
from tunesmith.report.screen import screen
from tunesmith.rundir import read_json, sha256_file
from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS

STEPS = 6


class Memory:
    """A tracker that keeps what it is told where every process of this test finds it."""

    package: ClassVar[str] = "memory"
    module: ClassVar[str] = "json"
    runs: ClassVar[list[TrackedRun]]
    points: ClassVar[list[tuple[int, dict[str, float]]]]
    outcomes: ClassVar[list[Outcome]]
    fails_at: ClassVar[int | None]  # the step at which the network is gone; 0: at the start, -1: at the end

    def __init__(self, run: TrackedRun) -> None:
        print("chatter on stdout")
        print("chatter on stderr", file=sys.stderr)
        self._fail(0)
        self.runs.append(run)
        self.key = run.key or "k1"
        self.where = "here"

    def held(self, kind: str) -> int | None:
        return None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._fail(step)
        self.points.append((step, dict(numbers)))

    def finish(self, outcome: Outcome) -> None:
        self._fail(-1)
        self.outcomes.append(outcome)

    def _fail(self, at: int) -> None:
        if self.fails_at == at:
            if at > 0:
                type(self).fails_at = None
            raise ConnectionError("no route to host\nand a long page of HTML")


class Rewinding(Memory):
    """One that forgets what came after the checkpoint."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._from_step = run.from_step
        type(self).points = [(step, numbers) for step, numbers in self.points if step <= run.from_step]

    def held(self, kind: str) -> int | None:
        return self._from_step


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    for tracker in (Memory, Rewinding):
        monkeypatch.setattr(tracker, "runs", [], raising=False)
        monkeypatch.setattr(tracker, "points", [], raising=False)
        monkeypatch.setattr(tracker, "outcomes", [], raising=False)
        monkeypatch.setattr(tracker, "fails_at", None, raising=False)
    list(TRACKERS)  # the built-in ones are there before
    monkeypatch.setitem(TRACKERS._items, "memory", Memory)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setitem(TRACKERS._items, "rewinding", Rewinding)  # pyright: ignore[reportPrivateUsage]
    return Memory


ROWS = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(26)]
DATA = {"train": ROWS[:16], "validation": ROWS[16:20], "test": ROWS[20:]}


def recipe(model: Path, *trackers: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "sft",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.01, "save_every": 2, "evaluate_every": 3},
        "evaluate": {"max_new_tokens": 2, "metrics": ["exact_match", "loss"]},
        "precision": "fp32",
        "place": {"device": "cpu", "threads": 1},
        "report_to": list(trackers),
    }


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("untracked") / "run"
    api.train(recipe(tiny_llama), data=DATA, out=folder)
    return folder


def same_result(run: Path, untracked: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.json", "model/adapter_model.safetensors"):
        assert sha256_file(run / name) == sha256_file(untracked / name)


def counted(points: list[tuple[int, dict[str, float]]]) -> Counter[tuple[int, str]]:
    return Counter((step, "validation" if "validation/loss" in numbers else "train") for step, numbers in points)


EVERY_ONCE = Counter({**{(s, "train"): 1 for s in range(1, STEPS + 1)}, (3, "validation"): 1, (6, "validation"): 1})


class Crash(BaseException):
    """The power went."""


def crash_after(step: int) -> Any:
    """A listener that ends the process's work as nothing catches it."""

    def listen(event: str, data: Mapping[str, Any]) -> None:
        if event == "step" and data["step"] == step + 1:
            raise Crash

    return listen


# ---------------------------------------------------------------- what a tracker is told


def test_a_tracker_is_told_everything_once(
    tmp_path: Path, tiny_llama: Path, memory: type[Memory], untracked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tickets"
    heard: list[tuple[str, Mapping[str, Any]]] = []
    api.train(recipe(tiny_llama, "memory"), data=DATA, out=run, listen=lambda e, d: heard.append((e, d)))
    same_result(run, untracked)
    (about,) = memory.runs
    assert (about.name, about.folder, about.key, about.from_step) == ("tickets", run, None, 0)
    assert about.params["train.learning_rate"] == 0.01
    assert about.params["method.rank"] == 2
    assert about.params["run_folder"] == str(run)
    assert about.params["plan"] == read_json(run / "plan.json")["hash"]
    assert about.params["report_to"] == '["memory"]'
    assert "train.epochs" not in about.params

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = {t["step"]: t for t in map(json.loads, (run / "timings.jsonl").read_text().splitlines())}
    assert counted(memory.points) == EVERY_ONCE
    for line, (step, numbers) in zip(lines, memory.points, strict=True):
        assert step == line["step"]
        if "validation" in line:
            assert numbers == {f"validation/{name}": value for name, value in line["validation"].items()}
        else:
            told = {**line, **timings[step]}
            assert numbers == {f"train/{name}": value for name, value in told.items() if name != "step"}
            for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"):
                assert f"train/{name}" in numbers

    (outcome,) = memory.outcomes
    records = read_json(run / "evaluation.json")
    assert (outcome.state, outcome.step, list(outcome.records)) == ("finished", STEPS, records)
    kept = ["report.html", "MODEL_CARD.md", "evaluation.json", "comparison.json"]
    assert [file.name for file in outcome.files] == kept
    tuned = next(r for r in records if r["model"] == "tuned" and r["metric"] == "loss")
    name = "evaluation/test/tuned/loss"
    numbers = outcome.numbers()
    assert [numbers[f"{name}{part}"] for part in ("", "/low", "/high", "/n")] == [
        tuned[part] for part in ("value", "low", "high", "n")
    ]
    assert ("tracking", {"tracker": "memory", "where": "here"}) in heard
    assert read_json(run / "trackers.json") == {"memory": {"key": "k1", "where": "here", "finished": True}}
    assert "chatter" not in "".join(capsys.readouterr())


def test_groups_and_limits_that_are_infinite_are_no_points() -> None:
    record = {"data": "test", "model": "tuned", "metric": "loss", "value": 1.0, "low": None, "high": 2.0, "n": 1}
    outcome = Outcome("finished", 1, [{**record, "group": "all"}, {**record, "group": "team=A", "metric": "other"}])
    name = "evaluation/test/tuned/loss"
    assert outcome.numbers() == {name: 1.0, f"{name}/high": 2.0, f"{name}/n": 1.0}


def test_the_meaning_of_a_run_does_not_depend_on_its_trackers(tiny_llama: Path, memory: type[Memory]) -> None:
    plans = [api.plan(recipe(tiny_llama, *names), data=DATA) for names in ((), ("memory",), ("memory", "rewinding"))]
    assert len({planned.hash for planned in plans}) == 1
    assert [planned.trackers for planned in plans] == [[], ["memory"], ["memory", "rewinding"]]
    shown = [io.StringIO() for _ in plans]
    for planned, stream in zip(plans, shown, strict=True):
        show_plan(planned, screen(stream))
    assert ["tracked by" in stream.getvalue() for stream in shown] == [False, True, True]
    assert parse_recipe({**recipe(tiny_llama), "data": {"train": "t"}, "report_to": "memory"}).report_to == ["memory"]


def test_the_screen_says_where_a_run_is_tracked() -> None:
    stream = io.StringIO()
    with View(stream) as view:
        view.listen("tracking", {"tracker": "memory", "where": "here"})
    assert stream.getvalue() == "tracked by memory: here\n"


def test_a_tracker_named_twice_is_one(tmp_path: Path, tiny_llama: Path, memory: type[Memory]) -> None:
    api.train(recipe(tiny_llama, "memory", "memory"), data=DATA, out=tmp_path / "run")
    assert counted(memory.points) == EVERY_ONCE


# ---------------------------------------------------------------- refused before training


def test_what_is_not_installed_is_refused_before_training(
    tmp_path: Path, tiny_llama: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "module", "no_such_module_anywhere")
    with pytest.raises(InputError) as refused:
        api.train(recipe(tiny_llama, "memory"), data=DATA, out=tmp_path / "run")
    assert refused.value.cause == "report_to x installed libraries: report_to names what is not installed here: memory"
    assert "pip install memory" in refused.value.remedy
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_nearest(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(InputError) as refused:
        api.train(recipe(tiny_llama, "tensorbord"), data=DATA, out=tmp_path / "run")
    assert refused.value.cause == "unknown tracker 'tensorbord'"
    assert "did you mean 'tensorboard'?" in refused.value.remedy


def test_one_that_does_not_start_is_refused_and_resume_goes_on_without_it(
    tmp_path: Path, tiny_llama: Path, memory: type[Memory], untracked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    memory.fails_at = 0
    with pytest.raises(InputError, match="memory did not start: no route to host") as refused:
        api.train(recipe(tiny_llama, "memory"), data=DATA, out=run)
    assert f"tunesmith resume {run}" in refused.value.remedy
    with caplog.at_level(logging.WARNING, "tunesmith"):
        api.resume(run)
    same_result(run, untracked)
    assert [r.message for r in caplog.records] == [
        "memory did not start: no route to host; the run goes on without it"
    ]  # fmt: skip


# ---------------------------------------------------------------- trouble on the way


@pytest.mark.parametrize("step", [1, 4, -1])
def test_a_tracker_that_fails_does_not_end_the_run_and_it_is_said(
    step: int,
    tmp_path: Path,
    tiny_llama: Path,
    memory: type[Memory],
    untracked: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    memory.fails_at = step

    def gone_for_good(event: str, data: Mapping[str, Any]) -> None:
        if event == "phase" and data["name"] == "saving":
            memory.fails_at = 0

    with caplog.at_level(logging.WARNING, "tunesmith"):
        listen = None if step == -1 else gone_for_good
        api.train(recipe(tiny_llama, "memory", "rewinding"), data=DATA, out=run, listen=listen)
    same_result(run, untracked)
    assert [r.message for r in caplog.records] == ["memory failed: no route to host; the run goes on without it"]
    assert max((s for s, _ in memory.points), default=0) == (STEPS if step == -1 else step - 1)
    assert memory.outcomes == []
    assert counted(Rewinding.points) == EVERY_ONCE  # the other one is not touched
    entry = read_json(run / "trackers.json")["memory"]
    assert (entry["finished"], entry["trouble"]) == (False, "no route to host")

    memory.fails_at = None
    api.resume(run)  # the run is finished; what the tracker lacks is sent now
    assert counted(memory.points) == EVERY_ONCE
    assert len(memory.outcomes) == 1
    assert read_json(run / "trackers.json")["memory"]["finished"] is True


@pytest.mark.parametrize("name", ["memory", "rewinding"])
def test_a_tracker_that_failed_for_a_while_has_everything_at_the_end(
    name: str, tmp_path: Path, tiny_llama: Path, memory: type[Memory]
) -> None:
    run = tmp_path / "run"
    tracker: Any = TRACKERS.get(name)
    tracker.fails_at = 3
    api.train(recipe(tiny_llama, name), data=DATA, out=run)  # at the end the network is there again
    assert counted(tracker.points) == EVERY_ONCE
    assert [o.state for o in tracker.outcomes] == ["finished"]
    assert read_json(run / "trackers.json")[name] == {"key": "k1", "where": "here", "finished": True}


def test_what_a_library_warns_of_is_said(
    tmp_path: Path, tiny_llama: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def warn(self: Memory, step: int, numbers: Mapping[str, float]) -> None:
        warnings.warn(f"could not send step {step}", UserWarning, stacklevel=1)
        warnings.warn("an old way", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(memory, "log", warn)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        api.train(recipe(tiny_llama, "memory"), data=DATA, out=tmp_path / "run")
    assert [r.message for r in caplog.records if "step 2" in r.message] == ["could not send step 2"]
    assert "an old way" not in caplog.text


# ---------------------------------------------------------------- stopped and gone on with


@pytest.mark.parametrize("after", [1, 3, 4, 5])
@pytest.mark.parametrize("name", ["memory", "rewinding"])
def test_a_resumed_run_goes_on_in_the_same_tracker_run_without_a_point_twice(
    name: str, after: int, tmp_path: Path, tiny_llama: Path, memory: type[Memory], untracked: Path
) -> None:
    """The checkpoints stand at 2, 3 (a better validation), 4 and 6: steps after the last of them are taken again."""
    run = tmp_path / "run"
    tracker: Any = TRACKERS.get(name)
    with pytest.raises(Crash):
        api.train(recipe(tiny_llama, name), data=DATA, out=run, listen=crash_after(after))
    assert [o.state for o in tracker.outcomes] == ["failed"]
    api.resume(run)
    same_result(run, untracked)
    assert [r.key for r in tracker.runs] == [None, "k1"]
    assert tracker.runs[1].from_step == {1: 0, 3: 3, 4: 4, 5: 4}[after]
    assert counted(tracker.points) == EVERY_ONCE
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    expected = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {s: n["train/loss"] for s, n in tracker.points if "train/loss" in n} == expected
    assert [o.state for o in tracker.outcomes] == ["failed", "finished"]


def test_what_was_lost_to_a_failure_is_sent_when_the_run_goes_on(
    tmp_path: Path, tiny_llama: Path, memory: type[Memory]
) -> None:
    run = tmp_path / "run"
    memory.fails_at = 2
    with pytest.raises(Crash):
        api.train(recipe(tiny_llama, "memory"), data=DATA, out=run, listen=crash_after(5))
    assert counted(memory.points) == Counter({(1, "train"): 1})
    memory.fails_at = None
    api.resume(run)
    assert counted(memory.points) == EVERY_ONCE
    assert [step for step, _ in memory.points] == sorted(step for step, _ in memory.points)


def test_a_tracker_that_joins_later_gets_the_whole_run(tmp_path: Path, tiny_llama: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        api.train(recipe(tiny_llama), data=DATA, out=run, listen=crash_after(5))
    assert not (run / "trackers.json").exists()
    text = (run / "recipe.yaml").read_text()
    assert "report_to: []" in text
    (run / "recipe.yaml").write_text(text.replace("report_to: []", "report_to: memory"))
    api.resume(run)
    assert counted(memory.points) == EVERY_ONCE


def test_half_a_line_that_a_kill_left_is_no_point(tmp_path: Path, tiny_llama: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        api.train(recipe(tiny_llama, "memory"), data=DATA, out=run, listen=crash_after(5))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    api.resume(run)
    assert counted(memory.points) == EVERY_ONCE
