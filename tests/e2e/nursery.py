"""A process with everything imported, which forks a child for each command line and kills it where it is told.

Reads one case as a line of JSON and answers with one: {"out": folder, "words": [...], "how": ..., "at": n,
"save": k, "cache": folder}. `how` is "" (to the end), or

- "operation": SIGKILL at the n-th write, sync, rename or removal since save k began (k = 0: since the start),
  with half of its bytes written or one of its files removed;
- "ahead": the same of the thread that saves alone, and only when training has come to the next save;
- "seconds": SIGKILL from outside after so many seconds;
- "validation", "evaluating", "saving": SIGKILL inside the n-th of these;
- "full": the n-th write since save k began, and every later one, finds the disk full;
- "term": SIGTERM at step n.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

OPERATIONS = ("write_bytes", "sync_file", "rename", "sync_folder", "rmtree")
AHEAD = 8  # the step of the save behind the third
LONGEST = 120.0  # seconds for one child


class Counter:
    """What has been done to the disk in this process, by save; ends the process at the chosen moment."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.case = case
        self.saves = 0
        self.step = 0
        self.lock = threading.Lock()
        self.done: list[tuple[int, str]] = []  # the save that an operation came in or after, and its name

    def since(self, name: str = "") -> int:
        """Operations (called `name`, or all) since the chosen save began."""
        return sum(save >= self.case["save"] and name in ("", done) for save, done in self.done)

    def watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            aside = threading.current_thread() is not threading.main_thread()
            if aside or self.case["how"] != "ahead":
                with self.lock:
                    self.judge(name, given)
            return real(*given, **named)

        return operation

    def judge(self, name: str, given: tuple[Any, ...]) -> None:
        """Counts an operation, and does what the case is about where it has come to that."""
        how, at = self.case["how"], self.case["at"]
        self.done.append((self.saves, name))
        reached = self.saves >= self.case["save"]
        if how in ("operation", "ahead") and reached and self.since() == at:
            while how == "ahead" and self.step < AHEAD:
                time.sleep(0.001)
            half(name, given)
            end(self.case)
        if how == "full" and reached and name == "write_bytes" and self.since(name) >= at:
            half(name, given)
            raise OSError(errno.ENOSPC, "No space left on device")


def half(name: str, given: tuple[Any, ...]) -> None:
    """What a kill in the middle of an operation leaves."""
    if name == "write_bytes":
        given[0].write(given[1][: len(given[1]) // 2])
        given[0].flush()
    if name == "rmtree" and given[0].is_dir():
        next(iter(sorted(p for p in given[0].rglob("*") if p.is_file()))).unlink()


def end(case: Mapping[str, Any]) -> None:
    note_children(case, os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


def note_children(case: Mapping[str, Any], pid: int) -> None:
    """Remembers the processes that `pid` has started, so that none may outlive it."""
    with suppress(psutil.Error):
        found = [(p.pid, p.create_time()) for p in psutil.Process(pid).children(recursive=True)]
        Path(case["out"]).with_suffix(".children").write_text(json.dumps(found))


def prepare(case: Mapping[str, Any]) -> Counter:
    """Puts the counter, and what ends this process, in place."""
    from tunesmith import rundir, training
    from tunesmith.engine import checkpoint
    from tunesmith.report.live import View

    counter = Counter(case)
    for name in OPERATIONS[:-1]:
        setattr(rundir, name, counter.watched(name, getattr(rundir, name)))
    shutil.rmtree = counter.watched("rmtree", shutil.rmtree)
    snapshot, losses, listen = checkpoint.snapshot, training.losses, View.listen
    seen = {"validation": 0, "evaluating": 0, "saving": 0}

    def counted_snapshot(states: Any) -> Any:  # when the save before is behind it
        counter.saves += 1
        return snapshot(states)

    def at(name: str) -> None:
        seen[name] += 1
        if case["how"] == name and seen[name] == case["at"]:
            end(case)

    def counted_losses(*given: Any, **named: Any) -> Any:
        at("validation")
        return losses(*given, **named)

    def heard(self: View, event: str, data: Mapping[str, Any]) -> None:
        listen(self, event, data)
        counter.step = data["step"] if event == "step" else counter.step
        if event == "phase" and data["name"] in seen:
            at(data["name"])
        if event == "step" and case["how"] == "term" and data["step"] == case["at"]:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoint.snapshot, training.losses, View.listen = counted_snapshot, counted_losses, heard  # type: ignore[method-assign]
    return counter


def child(case: Mapping[str, Any]) -> None:
    """One command, in a process of its own; never returns."""
    code = 99
    try:
        out = Path(case["out"])
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TUNESMITH_CACHE"] = case["cache"]
        from tunesmith.cli import main

        counter = prepare(case)
        code = main(case["words"])
        out.with_suffix(".trace").write_text(json.dumps(counter.done))
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one case; its exit status as subprocess gives it, its seconds, and what outlived it."""
    noted = Path(case["out"]).with_suffix(".children")
    noted.unlink(missing_ok=True)
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        child(case)
    killed = False
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.perf_counter() - begun
        if gone:
            break
        if not killed and (seconds > LONGEST or (case["how"] == "seconds" and seconds >= case["at"])):
            note_children(case, pid)
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    children = json.loads(noted.read_text()) if noted.exists() else []
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "children": len(children),
        "strays": [pid for pid, born in children if outlives(pid, born)],
    }


def outlives(pid: int, born: float) -> bool:
    """Whether a process is there a while after its parent was killed."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            process = psutil.Process(pid)
            if process.create_time() != born or process.status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.01)
    return True


def warm(recipe: str) -> None:
    """Imports what every child needs and plans once; computes no gradient, so that a fork is safe."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tunesmith.api
    import tunesmith.cli.train
    import tunesmith.report.live  # noqa: F401
    from tunesmith.cli import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(["plan", recipe])


if __name__ == "__main__":
    warm(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
