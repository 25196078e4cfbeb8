"""The screen: a terminal, or a file of plain lines 80 columns wide."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

PLAIN_WIDTH = 80


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process; whoever prints decides what a reader's leaving means."""
        raise  # rich calls this where it caught the error


def screen(stream: TextIO) -> Console:
    """A console on `stream` that prints text as it is: no markup, no emoji codes, no colours of its own."""
    terminal = is_terminal(stream)
    return _Console(
        file=stream,
        width=None if terminal else PLAIN_WIDTH,
        force_terminal=terminal,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether lines on `stream` can be drawn over."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal
