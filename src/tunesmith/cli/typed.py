"""What a person types: lines with their history, several lines at once, and what is pasted."""

from __future__ import annotations

import select
import sys
from typing import Any

BLOCK = '"""'
MORE = "... "
PASTED_SECONDS = 0.02  # a line that follows another within this was not typed


class Typed:
    """Turns from stdin. On a terminal with a prompt, arrow keys (readline) and pastes kept whole."""

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._brackets = self.terminal and _line_editing()

    def turn(self) -> str | None:
        """What was entered next, None at the end. A block from \"\"\" to \"\"\" is one turn, and so is a paste."""
        first = self._line("> ")
        if first is None:
            return None
        if first.lstrip().startswith(BLOCK):
            return self._block(first.lstrip().removeprefix(BLOCK))
        lines = [first]
        while self._pasted() and (line := self._line("")) is not None:
            lines.append(line)
        return "\n".join(lines)

    def _block(self, line: str | None) -> str:
        lines: list[str] = []
        while line is not None and not line.rstrip().endswith(BLOCK):
            lines.append(line)
            line = self._line(MORE)
        lines += [] if line is None else [line.rstrip().removesuffix(BLOCK)]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        try:
            if self.terminal:
                return input(prompt)
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        except EOFError:
            sys.stdout.write("\n")
            return None

    def _pasted(self) -> bool:
        """Whether more of a paste waits, where the terminal does not say itself what was pasted."""
        return self.terminal and not self._brackets and bool(select.select([sys.stdin], [], [], PASTED_SECONDS)[0])


def _line_editing() -> bool:
    """Loads readline where Python has it; True if it takes a paste of several lines as one."""
    try:
        import readline
    except ImportError:
        return False
    editor: Any = readline
    gnu = "libedit" not in (editor.__doc__ or "")
    if gnu:
        editor.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return gnu
