"""The command line: parses, calls the API, prints. One file a verb; nothing heavy is imported before one runs."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

from tunesmith.cli.arguments import parse
from tunesmith.cli.failures import Terminated, drop_output, fail
from tunesmith.cli.quiet import third_parties_quiet
from tunesmith.cli.verb import Call

READER_LEFT = 141  # what a shell reports of any program whose reader went away: 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` are those after the program's name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    call = Call(json="--json" in given, debug="--debug" in given)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters is no reason to fail
    try:
        with _terminable(), third_parties_quiet():
            code = _run(given, call)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        drop_output()
        return READER_LEFT
    except (Exception, KeyboardInterrupt) as error:
        try:
            return fail(error, call)
        except BrokenPipeError:
            drop_output()
            return READER_LEFT


def _run(given: Sequence[str], call: Call) -> int:
    parsed = parse(given)
    if isinstance(parsed, str):
        sys.stdout.write(parsed)
        return 0
    verb, options = parsed
    return verb.run(options, call)


@contextmanager
def _terminable() -> Generator[None]:
    """SIGTERM unwinds like an interrupt, so that locks are given back; training has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
