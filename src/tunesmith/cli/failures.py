"""What went wrong, in two lines and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from dataclasses import dataclass

from tunesmith.cli.verb import Call, json_text
from tunesmith.errors import TunesmithError
from tunesmith.plugins import PLUGIN
from tunesmith.report.visible import visible

INTERRUPTED, TERMINATED, RESUMABLE, RESOURCE, FAULT = 130, 143, 75, 4, 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the process stood."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`cause` may have several lines, one a problem."""

    cause: str
    remedy: str
    exit_code: int


def fail(error: BaseException, call: Call) -> int:
    """Prints what went wrong: on stderr, or as JSON on stdout with --json. Returns the exit code."""
    failure = explain(error, call)
    if call.debug:
        traceback.print_exception(error)
    if call.json:
        found = {"error": failure.cause, "remedy": failure.remedy, "exit_code": failure.exit_code}
        sys.stdout.write(json_text(found) + "\n")
        sys.stdout.flush()
        return failure.exit_code
    for problem in failure.cause.splitlines():
        sys.stderr.write(f"error: {visible(problem)}\n")
    sys.stderr.write(f"remedy: {visible(' '.join(failure.remedy.splitlines()))}\n")
    sys.stderr.flush()
    return failure.exit_code


def explain(error: BaseException, call: Call) -> Failure:
    """Cause, remedy and exit code of anything that can be raised."""
    if isinstance(error, TunesmithError):
        return Failure(error.cause, error.remedy, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(call, isinstance(error, Terminated))
    if _memory_ran_out(error):
        remedy = "lower train.micro_batch_size or train.sequence_length, or free memory" + _then_resume(call)
        return Failure(f"out of memory ({type(error).__name__})", remedy, RESOURCE)
    if isinstance(error, OSError) and _disk_is_full(error):
        named = f" while writing {error.filename}" if error.filename else ""
        return Failure(f"the disk is full{named}", "free space" + _then_resume(call), RESOURCE)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return Failure(
            f"{error.filename}: {error.strerror}", _look_at(str(error.filename)) + _then_resume(call), RESOURCE
        )
    lines = str(error).strip().splitlines()
    said = f": {lines[0]}" if lines else ""
    if (place := _in_a_plugin(error)) is not None:
        return Failure(f"--plugin {place} fails: {type(error).__name__}{said}", "mend the file" + _then_resume(call), 2)
    return Failure(
        f"tunesmith failed: {type(error).__name__}{said}",
        "run it again with --debug for the traceback, and report it",
        FAULT,
    )


def _in_a_plugin(error: BaseException) -> str | None:
    """The file and line of a user's own file that an error went through, the innermost; None for one of ours."""
    places = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(PLUGIN)
    ]
    return places[-1] if places else None


def drop_output() -> None:
    """Nobody reads stdout any more: what is still buffered goes nowhere, quietly."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file has nothing that would be flushed at exit
        return


def _interrupted(call: Call, terminated: bool) -> Failure:
    cause = "asked to end by SIGTERM" if terminated else "interrupted"
    if (again := _again(call)) is not None:
        return Failure(cause, f"go on with {again}", RESUMABLE)
    return Failure(cause, "nothing was left half done; run it again", TERMINATED if terminated else INTERRUPTED)


def _again(call: Call) -> str | None:
    """The command that goes on with what was done; None where nothing was."""
    if call.run is None:
        return None
    if call.repeats:
        return "the same command"
    return f"`tunesmith resume {shlex.quote(str(call.run))}`" if (call.run / "manifest.json").is_file() else None


def _then_resume(call: Call) -> str:
    again = _again(call)
    return f", then go on with {again}" if again else ""


def _look_at(path: str) -> str:
    from tunesmith.models.cache import cache_dir

    inside = path.startswith(str(cache_dir()))
    return "check the path, its rights and the disk" + (", or set TUNESMITH_CACHE to another folder" if inside else "")


def _memory_ran_out(error: BaseException) -> bool:
    """Python's own error, torch's of a device (by name: torch is not imported for this), and torch's of the CPU."""
    by_name = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or by_name or "can't allocate memory" in str(error)


def _disk_is_full(error: OSError) -> bool:
    from tunesmith.rundir import FULL

    return error.errno in FULL
