"""What can go wrong, each with one line of cause, one of remedy, and the exit code that says whose turn it is."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class TunesmithError(Exception):
    """A failure the user can act on.

    `cause` says what is wrong and where; `remedy` says how to mend it. The command line prints
    both and exits with `exit_code`; a traceback is shown only with `--debug`.
    """

    exit_code: int = 2

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[TunesmithError], tuple[str, str]]:
        return type(self), (self.cause, self.remedy)  # by default `remedy` would be lost on the way to another process

    def __str__(self) -> str:
        return f"{self.cause} ({self.remedy})"


class InputError(TunesmithError):
    """The user's input is wrong: a recipe, a data file, an argument, a folder."""

    exit_code = 2


class RefusedError(TunesmithError):
    """Stopped for safety: unsafe files, leaking data, a non-finite loss, a run that changed."""

    exit_code = 3


class ResourceError(TunesmithError):
    """Out of a resource: disk, memory, a device, a network, or a lock held by another process."""

    exit_code = 4


class StoppedError(TunesmithError):
    """The run was asked to stop, saved itself, and can be resumed."""

    exit_code = 75


@contextmanager
def placed(where: str) -> Generator[None]:
    """What goes wrong inside is said with its place."""
    try:
        yield
    except TunesmithError as error:
        if where in error.cause:
            raise
        raise type(error)(f"{where}: {error.cause}", error.remedy) from None
