"""Markdown as the generated pages use it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

MADE = "<!-- Made by `make docs` from the source; change it there. -->"
MADE_PART = re.compile(r"<!-- made: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what would end a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """Inline code, whatever ticks are in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page(title: str, *parts: str) -> str:
    return "\n\n".join([MADE, f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"


def filled(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page written by hand, with what stands between `<!-- made: NAME -->` and `<!-- end -->` made anew."""
    return MADE_PART.sub(lambda found: f"<!-- made: {found[1]} -->\n{parts[found[1]]()}\n<!-- end -->", text)
