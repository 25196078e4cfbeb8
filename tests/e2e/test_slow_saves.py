"""Whole runs whose checkpoints are slow or fail: training goes on meanwhile, to the same bits."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from safetensors.torch import load_file

import tunesmith
from tunesmith import rundir, training
from tunesmith.engine import checkpoint
from tunesmith.errors import ResourceError, StoppedError
from tunesmith.rundir import sha256_file

ROWS = [{"prompt": f"colour {i}?", "completion": ("red", "green", "blue")[i % 3]} for i in range(18)]
DATA = {"train": ROWS[:14], "validation": ROWS[14:]}


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 6, "batch_size": 4, "evaluate_every": 6, "dropout": 0.1, "save_every": 2},
        "precision": "fp32",
        "evaluate": {"max_new_tokens": 4},
    }


class Slow:
    """`checkpoint.put`, which lets the first go on only when a later step was heard; it keeps each one's hashes."""

    def __init__(self, until: int, then: Callable[[], None] | None = None) -> None:
        self.hashes: dict[int, bytes] = {}
        self.heard: list[int] = []
        self._until, self._then, self._go = until, then, threading.Event()
        self._put = checkpoint.put

    def put(self, folder: Path, step: int, files: checkpoint.Files) -> checkpoint.Checkpoint:
        assert self._go.wait(30)
        assert threading.current_thread() is not threading.main_thread()
        made = self._put(folder, step, files)
        self.hashes[step] = (made.path / "hashes.json").read_bytes()
        return made

    def listen(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "step":
            self.heard.append(data["step"])
            if data["step"] == self._until:
                if self._then is not None:
                    self._then()
                self._go.set()


def results(run: Path) -> dict[str, str]:
    """sha256 of all that two equal runs have in common."""
    kept = [run / "metrics.jsonl", run / "evaluation.json", *sorted((run / "model").iterdir())]
    return {path.name: sha256_file(path) for path in kept}


@pytest.fixture(scope="module")
def prompt(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, bytes]]:
    """The run that none of its saves kept waiting, and the hashes of its checkpoints."""
    out, slow = tmp_path_factory.mktemp("saving") / "run", Slow(until=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "put", slow.put)
        tunesmith.train(recipe, data=DATA, out=out, listen=slow.listen)
    assert sorted(slow.hashes) == [2, 4, 6]
    return out, slow.hashes


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_no_bit_of_it(
    recipe: dict[str, Any], prompt: tuple[Path, dict[int, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(until=4)  # the step of the next save, which waits
    monkeypatch.setattr(checkpoint, "put", slow.put)
    tunesmith.train(recipe, data=DATA, out=tmp_path / "run", listen=slow.listen)
    assert slow.heard == [1, 2, 3, 4, 5, 6]
    assert slow.hashes == prompt[1]
    assert results(tmp_path / "run") == results(prompt[0])


def test_a_stop_while_a_checkpoint_is_written_is_saved_too(
    recipe: dict[str, Any], prompt: tuple[Path, dict[int, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, slow = tmp_path / "run", Slow(until=3, then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "put", slow.put)
        with pytest.raises(StoppedError, match="stopped after step 3, as asked"):
            tunesmith.train(recipe, data=DATA, out=out, listen=slow.listen)
    assert list(slow.hashes) == [2, 3]
    assert [found.step for found in checkpoint.found(out / "checkpoints")] == [3]
    tunesmith.resume(out)
    assert results(out) == results(prompt[0])


def test_a_stop_that_comes_while_a_state_is_copied_ends_the_run_behind_the_next_step(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = checkpoint.snapshot
    monkeypatch.setattr(checkpoint, "snapshot", lambda states: os.kill(os.getpid(), signal.SIGTERM) or snapshot(states))
    with pytest.raises(StoppedError, match="stopped after step 3, as asked"):
        tunesmith.train(recipe, data=DATA, out=tmp_path / "run")
    assert [found.step for found in checkpoint.found(tmp_path / "run" / "checkpoints")] == [3]


@pytest.mark.parametrize(("fails", "steps", "kept"), [(2, 4, []), (4, 6, [2]), (6, 6, [4])])
def test_a_save_that_fails_ends_the_run_at_the_next_or_at_its_end(
    fails: int,
    steps: int,
    kept: list[int],
    recipe: dict[str, Any],
    prompt: tuple[Path, dict[int, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, heard = tmp_path / "run", list[int]()
    write = rundir.write_bytes

    def full(handle: BinaryIO, content: bytes | memoryview) -> None:
        if f"step-{fails:06d}" in handle.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_bytes", full)
        with pytest.raises(ResourceError, match=f"the disk is full while writing .*step-{fails:06d}"):
            tunesmith.train(recipe, data=DATA, out=out, listen=lambda event, data: heard.append(data.get("step", 0)))
    assert max(heard) == steps
    assert not (out / "model").exists()
    assert [found.step for found in checkpoint.found(out / "checkpoints")] == kept
    tunesmith.resume(out)
    assert results(out) == results(prompt[0])


def test_a_failure_in_between_waits_for_the_write_and_tells_of_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(until=3)

    def broken(folder: Path, step: int, files: checkpoint.Files) -> None:
        slow.put(folder, step, files)
        raise ResourceError("the disk left", "bring it back")

    def listen(event: str, data: Mapping[str, Any]) -> None:
        slow.listen(event, data)
        if event == "step" and data["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "put", broken)
    with pytest.raises(ResourceError, match="the disk left") as caught:
        tunesmith.train(recipe, data=DATA, out=tmp_path / "run", listen=listen)
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_the_best_is_restored_behind_the_last_save(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    put = checkpoint.put

    def slow(folder: Path, step: int, files: checkpoint.Files) -> checkpoint.Checkpoint:
        time.sleep(0.3)
        return put(folder, step, files)

    def listen(event: str, data: Mapping[str, Any]) -> None:
        told.extend([data["step"]] if event == "best" else [])

    found = iter((2.0, 1.0, 3.0))
    monkeypatch.setattr(checkpoint, "put", slow)
    monkeypatch.setattr(training, "losses", lambda *_: {"loss": next(found)})
    train = {**recipe["train"], "evaluate_every": 2}
    tunesmith.train({**recipe, "train": train}, data=DATA, out=tmp_path / "run", listen=listen)
    best, last = checkpoint.found(tmp_path / "run" / "checkpoints")
    assert (told, best.step, last.step) == ([4], 4, 6)
    saved = checkpoint.read(best)["engine"]["parameters"]
    model = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {t.numpy().tobytes() for t in model.values()} == {t.numpy().tobytes() for t in saved.values()}
