"""Runs whose engine is at a step while the one before is told, as on CUDA: the same run, told one step later."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith import api
from tunesmith.engine.native import NativeEngine
from tunesmith.errors import RefusedError, StoppedError
from tunesmith.events import Deferred, StopRun
from tunesmith.types import Step, StepStats

ROWS = [{"prompt": f"say {i}", "completion": f"{i}" * (1 + i % 5)} for i in range(40)]


def _ahead(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    monkeypatch.setattr(NativeEngine, "runs_ahead", property(lambda _: ahead, lambda *_: None), raising=False)


def _recipe(model: Path, **more: Any) -> dict[str, Any]:
    train = {"max_steps": 10, "batch_size": 4, "evaluate_every": 4, "save_every": 3, **more}
    return {"model": str(model), "objective": "sft", "method": "lora", "place": {"device": "cpu"}, "train": train}


def _run(model: Path, out: Path, stop_at: int = 0, **more: Any) -> list[Any]:
    """What a listener heard: steps and validations by number, in order."""
    heard: list[Any] = []

    def listen(event: str, data: Any) -> None:
        if event in ("step", "validation"):
            heard.append((event, data["step"]))
        if event == "step" and data["step"] == stop_at:
            raise StopRun

    api.train(_recipe(model, **more), data={"train": ROWS[:32], "validation": ROWS[32:]}, out=out, listen=listen)
    return heard


def _same(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    mine, theirs = (load_file(next((run / "model").rglob("adapter_model.safetensors"))) for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_a_run_ahead_tells_the_same(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[Any]] = []
    for ahead in (False, True):
        _ahead(monkeypatch, ahead)
        heard.append(_run(tiny_llama, tmp_path / f"{ahead}"))
    assert heard[0] == heard[1]
    assert heard[0][3:6] == [("step", 4), ("validation", 4), ("step", 5)], "a validation behind the step that it is of"
    _same(tmp_path / "False", tmp_path / "True")
    timings = [json.loads(line) for line in (tmp_path / "True" / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == list(range(1, 11))
    assert all(line["seconds"] > 0 for line in timings)


@pytest.mark.parametrize(("stop_at", "stopped"), [(5, 6), (6, 6), (10, 10)])  # 6 is saved anyhow, and 10 the last
def test_a_stopped_run_ahead_goes_on_to_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, stopped: int
) -> None:
    _ahead(monkeypatch, True)
    _run(tiny_llama, tmp_path / "whole")
    with pytest.raises(StoppedError, match=f"stopped after step {stopped}, as asked"):
        _run(tiny_llama, tmp_path / "parts", stop_at)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, stopped + 1))
    api.resume(tmp_path / "parts")
    _same(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_between_two_looks_loses_no_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the last look at whether steps must be told, and before the one at whether the run ends here."""
    _ahead(monkeypatch, True)
    heard: list[int] = []
    run = tmp_path / "run"

    def listen(event: str, data: Any) -> None:
        if event == "step":
            heard.append(data["step"])

    def failure(_: Deferred) -> None:
        if heard[-1:] == [4]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Deferred, "failure", property(failure, lambda *_: None), raising=False)
    with pytest.raises(StoppedError, match="stopped after step 5, as asked"):
        api.train(
            _recipe(tiny_llama, save_every=100, evaluate_every=None), data={"train": ROWS}, out=run, listen=listen
        )
    monkeypatch.undo()
    api.resume(run)  # which goes on behind the lines that the checkpoint knows of
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_a_step_that_is_not_finite_is_named_though_the_next_is_under_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for ahead in (False, True):
        _ahead(monkeypatch, ahead)
        with pytest.raises(RefusedError) as error:
            _run(tiny_llama, tmp_path / f"{ahead}", learning_rate=1e30, warmup=0.0)
        told.append(str(error.value))
        lines = (tmp_path / f"{ahead}" / "metrics.jsonl").read_text().splitlines()
        assert all("NaN" not in line for line in lines)
    assert told[0] == told[1]
    assert told[0].startswith("step ")


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_a_failure_comes_behind_the_step_before_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """And where that step is refused, that is what is told: the failure may be its consequence."""
    _ahead(monkeypatch, True)
    run = NativeEngine.forward_backward

    def breaks(engine: NativeEngine, objective: Any, policy: Any, step: Step) -> StepStats:
        if step.number == 3:
            raise BrokenError
        return run(engine, objective, policy, step)

    monkeypatch.setattr(NativeEngine, "forward_backward", breaks)
    with pytest.raises(BrokenError if rate < 1 else RefusedError, match="^$" if rate < 1 else "^step 2: the loss is"):
        _run(tiny_llama, tmp_path / "run", learning_rate=rate, warmup=0.0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ([1, 2] if rate < 1 else [1])


def test_a_step_that_cannot_be_told_behind_a_failure_is_a_note_of_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a device that has failed: nothing comes from it any more."""
    _ahead(monkeypatch, True)
    run = NativeEngine.forward_backward

    class Lost:
        def __float__(self) -> float:
            raise OSError("the device is lost")

    def breaks(engine: NativeEngine, objective: Any, policy: Any, step: Step) -> StepStats:
        if step.number == 3:
            raise BrokenError
        return StepStats(Lost(), {}, {}, 1) if step.number == 2 else run(engine, objective, policy, step)

    monkeypatch.setattr(NativeEngine, "forward_backward", breaks)
    with pytest.raises(BrokenError) as failure:
        _run(tiny_llama, tmp_path / "run")
    assert failure.value.__notes__ == ["the step before it cannot be told: OSError: the device is lost"]
