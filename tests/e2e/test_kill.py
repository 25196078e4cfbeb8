"""A run that was killed, at any instant, goes on to the same bits as one that never was.

Every case is a real command in a process of its own that ends by SIGKILL (or by a signal, or a full
disk), and then a real `tunesmith resume` in another. Most are forked from two processes that have
imported everything (`nursery.py`), because a start of torch costs more than such a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tunesmith.rundir import sha256_file

pytestmark = pytest.mark.slow

NURSERY = Path(__file__).with_name("nursery.py")
PROCESSES = 2
STEPS = 12
COLOURS = ("red", "green", "blue")
SAVES = 3  # the save whose every operation is killed: it also removes an older checkpoint
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Case:
    """How a run ends; see nursery.py. `save` 0 counts from the start."""

    how: str
    at: float
    save: int = 0
    workers: int = 1
    own_cache: bool = False

    @property
    def name(self) -> str:
        return f"{self.how}-{self.at}-after-save-{self.save}-workers-{self.workers}"


class Bench:
    """The recipe, the warm processes, and the uninterrupted run that every other is compared with."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        rows = [{"prompt": f"colour {i}?", "completion": COLOURS[i % 3]} for i in range(40)]
        tests = [{"prompt": f"which {i}?", "completion": COLOURS[i % 3]} for i in range(4)]
        for name, content in (("train", rows), ("test", tests)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        self.recipe.write_text(
            f"model: {model}\ndata: {{train: train.jsonl, validation: 0.15, test: test.jsonl}}\nobjective: sft\n"
            "method: {name: lora, rank: 4}\nevaluate: {max_new_tokens: 4}\nprecision: fp32\nplace: {threads: 1}\n"
            f"train: {{max_steps: {STEPS}, batch_size: 8, micro_batch_size: 4, learning_rate: 0.01, dropout: 0.1, "
            "save_every: 2, evaluate_every: 4}\n"
        )
        self.environment = {**os.environ, "TUNESMITH_CACHE": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
        self.free: Queue[subprocess.Popen[str]] = Queue()
        self.started = [
            subprocess.Popen(
                [sys.executable, str(NURSERY), str(self.recipe)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.environment,
            )
            for _ in range(PROCESSES)
        ]
        for process in self.started:
            self.free.put(process)
        done = self.fork(Case("", 0), folder / "reference", "train")
        assert done["code"] == 0, self.log(folder / "reference")
        self.expected = bits(folder / "reference")
        self.trace: list[tuple[int, str]] = json.loads((folder / "reference.trace").read_text())

    def train_words(self, out: Path, workers: int = 1) -> list[str]:
        return ["train", str(self.recipe), f"place.workers={workers}", "--out", str(out)]

    def crossval_words(self, out: Path) -> list[str]:
        return ["crossval", str(self.recipe), "train.max_steps=4", "--folds", "2", "--out", str(out)]

    def fork(self, case: Case, out: Path, verb: str) -> dict[str, Any]:
        """One command in a child of a warm process."""
        words = {
            "train": self.train_words(out, case.workers),
            "resume": ["resume", str(out)],
            "crossval": self.crossval_words(out),
        }[verb]
        cache = out.with_suffix(".cache") if case.own_cache else self.folder / "cache"
        line = {"out": str(out), "words": words, "how": case.how, "at": case.at, "save": case.save, "cache": str(cache)}
        process = self.free.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        finally:
            self.free.put(process)
        assert not answer["strays"], f"{case}: processes {answer['strays']} outlived their parent"
        return answer

    def python(self, *words: str) -> subprocess.Popen[str]:
        """One command in a process of its own from the start."""
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def log(self, out: Path) -> str:
        return out.with_suffix(".log").read_text()[-3000:]

    def finish(self, case: Case, out: Path) -> None:
        """Goes on with what a case left, and compares."""
        if not (out / "manifest.json").exists():  # it had not become a run yet, so the same command begins it again
            assert self.fork(Case("", 0), out, "resume")["code"] == 2
            done = self.fork(Case("", 0, workers=case.workers), out, "train")
        else:
            done = self.fork(Case("", 0, own_cache=case.own_cache), out, "resume")
        assert done["code"] == 0, f"{case}: {self.log(out)}"
        self.same(out, str(case))

    def same(self, out: Path, what: str) -> None:
        """The same bits as the uninterrupted run, its report, and nothing half made."""
        assert bits(out) == self.expected, what
        assert (out / "report.html").is_file(), what
        left = [str(p) for p in out.rglob(".*") if p.suffix in (".part", ".gone", ".old")]
        assert not left, f"{what}: {left}"
        shutil.rmtree(out)

    def killed(self, case: Case) -> dict[str, Any]:
        """A run ended by SIGKILL and gone on with: what became of the killed one."""
        out = self.folder / case.name
        done = self.fork(case, out, "train")
        assert done["code"] == KILLED or (case.how == "seconds" and done["code"] == 0), f"{case}: {self.log(out)}"
        self.finish(case, out)
        return done

    def all_killed(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Each of them asserts that the run which goes on ends in the reference's bits (`same`)."""
        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(self.killed, cases))

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


def bits(run: Path) -> dict[str, str]:
    """sha256 of every file of the result, of the metrics and of what was measured."""
    files = [p for folder in ("model", "predictions") for p in (run / folder).rglob("*") if p.is_file()]
    files += [run / "metrics.jsonl", run / "evaluation.json", run / "comparison.json"]
    return {str(p.relative_to(run)): sha256_file(p) for p in sorted(files)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("kill"), tiny_llama)
    yield made
    made.close()


def test_the_reference_saves_validates_and_measures(bench: Bench) -> None:
    lines = [json.loads(line) for line in (bench.folder / "reference" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation" in line] == [4, 8, 12]
    assert "model/adapter_model.safetensors" in bench.expected
    assert "model/MODEL_CARD.md" in bench.expected
    assert "predictions/test.jsonl" in bench.expected
    assert {name for save, name in bench.trace if save == SAVES} == {
        "write_bytes",
        "sync_file",
        "rename",
        "sync_folder",
        "rmtree",
    }


@pytest.mark.parametrize("workers", [1, 4])
def test_killed_at_every_operation_of_a_save(bench: Bench, workers: int) -> None:
    operations = sum(save == SAVES for save, _ in bench.trace)  # the last ones append metrics of the steps after it
    assert operations > 40
    every = 4 if workers > 1 and os.environ.get("CI") else 1
    cases = [Case("operation", n, SAVES, workers) for n in range(1, operations + 1, every)]
    assert all(done["children"] for done in bench.all_killed(cases))  # one that renders templates, and it is gone


def test_killed_while_training_is_ahead_of_a_save(bench: Bench) -> None:
    operations = sum(save == SAVES for save, _ in bench.trace) - 5  # without the lines of two steps, and their sync
    bench.all_killed([Case("ahead", n, SAVES, workers=1 + 3 * (n % 2)) for n in range(1, operations + 1, 4)])


def test_killed_at_every_operation_after_the_last_save(bench: Bench) -> None:
    last = max(save for save, _ in bench.trace)
    operations = [name for save, name in bench.trace if save == last]
    first = len(operations) - operations[::-1].index("rmtree")  # behind the save's own clearing up
    assert len(operations) - first > 10
    bench.all_killed([Case("operation", n + 1, last) for n in range(first, len(operations))])


def test_killed_at_random_operations(bench: Bench) -> None:
    drawn = random.Random(1).sample(range(1, len(bench.trace) + 1), 10)
    bench.all_killed([Case("operation", n, workers=1 + 3 * (n % 2)) for n in drawn])


def test_killed_at_random_times_with_an_empty_cache(bench: Bench) -> None:
    out = bench.folder / "timed"
    seconds = bench.fork(Case("", 0, own_cache=True), out, "train")["seconds"]
    bench.same(out, "an empty cache")
    drawn = random.Random(2)
    cases = [Case("seconds", round(drawn.uniform(0.05, seconds), 4), workers=w, own_cache=True) for w in [1, 4] * 5]
    codes = [done["code"] for done in bench.all_killed(cases)]
    assert codes.count(KILLED) >= 5  # one that is quicker this time may end before its kill


@pytest.mark.parametrize("workers", [1, 4])
def test_killed_while_validating_measuring_and_saving_the_result(bench: Bench, workers: int) -> None:
    where = [("validation", 1), ("validation", 3), ("evaluating", 1), ("evaluating", 2), ("saving", 1)]
    bench.all_killed([Case(how, at, workers=workers) for how, at in where])


def test_killed_twice(bench: Bench) -> None:
    out = bench.folder / "twice"
    assert bench.fork(Case("operation", 20, 2), out, "train")["code"] == KILLED
    assert bench.fork(Case("operation", 30, 1), out, "resume")["code"] == KILLED
    assert bench.fork(Case("validation", 1), out, "resume")["code"] == KILLED
    bench.finish(Case("", 0), out)


def test_a_cross_validation_killed_in_each_of_its_runs_and_between(bench: Bench) -> None:
    whole = bench.folder / "crossval"
    assert bench.fork(Case("", 0, own_cache=True), whole, "crossval")["code"] == 0, bench.log(whole)
    operations = len(json.loads(whole.with_suffix(".trace").read_text()))
    parts = [Path(), Path("folds/1"), Path("folds/2")]
    expected = [bits(whole / part) for part in parts]

    def killed(at: int) -> None:
        out = bench.folder / f"crossval-{at}"
        assert bench.fork(Case("operation", at, own_cache=True), out, "crossval")["code"] == KILLED
        assert bench.fork(Case("", 0, own_cache=True), out, "crossval")["code"] == 0, f"{at}: {bench.log(out)}"
        assert [bits(out / part) for part in parts] == expected, at

    drawn = random.Random(3)
    spans = [range(n * operations // 6, (n + 1) * operations // 6) for n in range(6)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(killed, [*(drawn.choice(span) + 1 for span in spans), operations]))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_full_disk_at_every_write_of_a_save(bench: Bench, workers: int) -> None:
    writes = sum(save == SAVES and name == "write_bytes" for save, name in bench.trace)
    assert writes >= 9

    def check(case: Case) -> None:
        out = bench.folder / case.name
        done = bench.fork(case, out, "train")
        assert done["code"] == 4, bench.log(out)
        assert "the disk is full while writing" in bench.log(out)
        assert (out / "checkpoints" / "step-000004" / "hashes.json").is_file()
        bench.finish(case, out)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(check, [Case("full", n, SAVES, workers) for n in range(1, writes + 1, workers)]))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_sigterm_saves_and_exits_75(bench: Bench, step: int, workers: int) -> None:
    case = Case("term", step, workers=workers)
    out = bench.folder / case.name
    assert bench.fork(case, out, "train")["code"] == 75, bench.log(out)
    assert (out / "checkpoints" / f"step-{step:06d}" / "hashes.json").is_file()
    bench.finish(case, out)


@pytest.mark.parametrize("save", [2, 4])  # the first checkpoint, and one after the best
@pytest.mark.parametrize("file", ["engine.safetensors", "watch.json", "hashes.json"])
def test_a_damaged_last_checkpoint_is_refused_and_without_it_the_run_goes_on(
    bench: Bench, save: int, file: str
) -> None:
    out = bench.folder / f"damaged-{file}-{save}"
    assert bench.fork(Case("operation", 1, save), out, "train")["code"] == KILLED
    last = max((out / "checkpoints").glob("step-*"))
    content = bytearray((last / file).read_bytes())
    content[len(content) // 2] ^= 128
    (last / file).write_bytes(content)
    assert bench.fork(Case("", 0), out, "resume")["code"] == 3
    assert f"error: {last / file} is damaged" in bench.log(out)
    assert f"remedy: delete {last} to go on from the checkpoint before it" in bench.log(out)
    shutil.rmtree(last)
    bench.finish(Case("", 0), out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_process_ended_from_outside(bench: Bench, number: signal.Signals) -> None:
    out = bench.folder / f"real-{number.name}"
    with bench.python(*bench.train_words(out, workers=4)) as process:
        until = time.monotonic() + 60
        while not (out / "checkpoints" / "step-000002").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == (KILLED if number == signal.SIGKILL else 75), said
    assert not (out / "model").exists()
    with bench.python("resume", str(out)) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    bench.same(out, number.name)
