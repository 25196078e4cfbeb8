"""Text of unknown origin, made harmless for a terminal."""

from __future__ import annotations


def visible(text: str, keep: str = "\t") -> str:
    """Control characters written out (an escape sequence in a data file must not reach the terminal)."""
    return "".join(c if c.isprintable() or c in keep else _written(c) for c in text)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of a text on one line; what is left out is said."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode()
