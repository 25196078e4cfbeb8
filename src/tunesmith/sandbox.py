"""A stranger's Python program, run where it can do no harm; refused where this machine cannot contain it.

The containment is `sandbox_worker.py`'s: Linux namespaces, a file system built from nothing, limits of resources and a
filter of system calls. This side starts it, watches its clock and memory, and ends it. It keeps a program from the
machine, the network and other programs; it does not judge one that looks for its own verdict in its process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tunesmith.errors import RefusedError

WATCH_MILLISECONDS = 50
GRACE_SECONDS = 2.0
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take: wall time, memory of each process and of all, processes and threads, files."""

    seconds: float = 10.0
    memory: int = 2048 * MIB
    processes: int = 32
    file: int = 16 * MIB
    files: int = 64 * MIB

    @property
    def rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_FSIZE": self.file,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a program came to its end without an exception; if not, what ended it."""

    passed: bool
    why: str


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Runs the text as `__main__` in a process of its own, in an empty folder, without input, output or network.

    It sees the interpreter's own folders and packages, and may write to its folder alone, which is gone afterwards.
    Raises RefusedError where the machine cannot contain it.
    """
    if sys.platform != "linux":
        raise _uncontained(f"it needs Linux, and this is {sys.platform}")
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as root:
        asked = {
            "program": program,
            "root": root,
            "shown": _shown(),
            "path": [path for path in sys.path if path.startswith(tuple(f"{home}/" for home in _shown()))],
            "scratch_bytes": limits.files,
            "rlimits": limits.rlimits,
        }
        process = subprocess.Popen(
            # Neither the worker's folder (its file names are common words) nor .pth files are looked at.
            [sys.executable, "-P", "-S", "-s", str(Path(__file__).with_name("sandbox_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
        try:
            told = _watched(process, json.dumps(asked).encode(), limits)
        finally:
            _end(process)
    if isinstance(told, str):
        return Outcome(False, told)
    if "broken" in told:
        raise _uncontained(str(told["broken"]))
    return Outcome(bool(told["passed"]), str(told["why"]))


@functools.cache
def check() -> None:
    """RefusedError where this machine cannot contain a program; asked once."""
    run("")


def _watched(process: subprocess.Popen[bytes], asked: bytes, limits: Limits) -> dict[str, Any] | str:
    """The worker's answer; or which limit the program ran into."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(asked)
        process.stdin.close()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN | select.POLLHUP)
    while not poll.poll(WATCH_MILLISECONDS):
        if time.monotonic() > deadline:
            return f"it took more than {limits.seconds:g} s"
        if _resident(process.pid) > limits.memory:
            return f"its processes took more than {limits.memory // MIB} MiB"
    answer = process.stdout.read()
    return json.loads(answer) if answer else {"broken": f"its process ended with {process.wait()}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the first process inside, and all there with it; those outside then end by themselves, or are made to.

    So each is waited for by its own parent, and none is left to a first process of a container that waits for nobody.
    """
    assert process.stdout is not None
    with contextlib.suppress(psutil.Error):
        for builder in psutil.Process(process.pid).children():
            for first in builder.children():
                first.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _resident(pid: int) -> int:
    """Bytes of memory that a process and all below it hold."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _shown() -> list[str]:
    """What of the file system the program reads: the system's libraries, and the interpreter with its packages."""
    found: list[str] = []
    for path in [*SYSTEM, sys.base_prefix, sys.prefix]:
        if os.path.lexists(path) and not any(path == home or path.startswith(f"{home}/") for home in found):
            found.append(path)
    return found


def _uncontained(why: str) -> RefusedError:
    return RefusedError(
        f"code that a model wrote cannot be contained on this machine: {why}",
        "measure on Linux where user namespaces are allowed (in a container: unshare and mount), "
        "or leave evaluate.code out",
    )
