"""A pytest plugin: a run of all tests fails where an error of docs/errors.md was raised by none of them.

Errors are noted while tests run, with the place that made each.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from error_sites import SOURCE, Site, find

LOG = "TUNESMITH_RAISED"  # names the file that all processes of a run append to
FRAMES = 4  # from where an error is made up to who gave its texts
Place = tuple[str, int]
WHAT_TO_DO = """Each error needs a test that raises it and runs in seconds on a CPU: a row in a table of
tests/unit/test_refusals.py or tests/e2e/test_bad_input.py, or a test beside the code."""

# ---------------------------------------------------------------- while tests run


def pytest_configure(config: pytest.Config) -> None:
    """A run of everything is watched; its workers find the log in their environment."""
    if not hasattr(config, "workerinput"):
        os.environ.pop(LOG, None)
        if _is_whole(config):
            handle, os.environ[LOG] = tempfile.mkstemp(prefix="tunesmith-raised-")
            os.close(handle)
    if LOG in os.environ:
        record(os.environ[LOG])


def _is_whole(config: pytest.Config) -> bool:
    some = ("keyword", "ignore", "ignore_glob", "deselect", "collectonly")
    return (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and config.getoption("markexpr") in ("", "not slow", "not slow and not gpu")
        and not any(map(config.getoption, some))
    )


def record(log: str) -> None:
    """From here on every error that is made in this process (and in its forks) is noted in the file `log`."""
    from tunesmith.cli.failures import Failure
    from tunesmith.errors import TunesmithError
    from tunesmith.recipe_problems import Problem
    from tunesmith.rules import Conflict

    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    known: set[str] = set()

    def note(cause: str, frame: FrameType | None) -> None:
        line = json.dumps([cause[:2000], list(_places(frame))])
        if line not in known:
            known.add(line)
            os.write(written, f"{line}\n".encode())  # in one piece: several processes append

    for kind, index in ((TunesmithError, 0), (Problem, 1), (Failure, 0), (Conflict, 1)):
        kind.__init__ = _noting(kind.__init__, index, note)


def _noting(
    made: Callable[..., None], index: int, note: Callable[[str, FrameType | None], None]
) -> Callable[..., None]:
    def init(self: Any, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        here = inspect.currentframe()
        note(str(given[index]) if len(given) > index else "", here and here.f_back)

    return init


def _places(frame: FrameType | None) -> Iterator[Place]:
    """Files and lines of the source, from the innermost frame outwards."""
    found = 0
    while frame is not None and found < FRAMES:
        file = frame.f_code.co_filename
        if file.startswith(f"{SOURCE}{os.sep}"):
            found += 1
            yield Path(file).relative_to(SOURCE).as_posix(), frame.f_lineno
        frame = frame.f_back


# ---------------------------------------------------------------- after that


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Judges a run of everything that passed."""
    if hasattr(session.config, "workerinput") or LOG not in os.environ:
        return
    log = Path(os.environ.pop(LOG))
    missing = judge(log) if exitstatus == pytest.ExitCode.OK else []
    log.unlink()
    if missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.section("errors that no test raises", red=True)
        reporter.write("\n".join([*missing, WHAT_TO_DO, ""]))


def judge(log: Path) -> list[str]:
    """The errors that none raised, in lines."""
    noted = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    missing = unraised(find(), (cause for cause, _ in noted), ((file, line) for _, at in noted for file, line in at))
    return [f"src/tunesmith/{site.place}: {site.cause!r}" for site in missing]


def unraised(sites: Iterable[Site], causes: Iterable[str], places: Iterable[Place]) -> list[Site]:
    """The sites that nothing noted came from; a rule's are known by its words, the others by their lines."""
    said, seen = "\n".join(causes), set(places)
    return [
        site
        for site in sites
        if not (
            re.search(_pattern(site.cause), said)
            if site.rule
            else any((site.file, line) in seen for line in range(site.line, site.last + 1))
        )
    ]


def _pattern(cause: str) -> str:
    return ".+?".join(re.escape(part) for part in re.split("‹[^›]*›", cause))
