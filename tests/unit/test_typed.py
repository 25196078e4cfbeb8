"""What is typed becomes turns: lines, blocks, and pastes where the terminal does not mark them."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tunesmith.cli import typed


def from_pipe(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    reader, found = typed.Typed(), list[str]()
    while (turn := reader.turn()) is not None:
        found.append(turn)
    return found


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("", []),
        ("a\nb\n", ["a", "b"]),
        ("a\n\nb", ["a", "", "b"]),
        ('"""a\nb"""\nc\n', ["a\nb", "c"]),
        ('"""\na\n\nb\n"""\nc\n', ["a\n\nb", "c"]),
        ('"""a"""\nb\n', ["a", "b"]),
        ('"""a\nthe file ends', ["a\nthe file ends"]),
    ],
)
def test_lines_and_blocks(text: str, turns: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_pipe(text, monkeypatch) == turns


def test_lines_that_come_at_once_are_a_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, waiting = iter(["one", "two", "three", "four"]), iter([True, True, False, False])

    def ready(read: Sequence[Any], *_: Any) -> tuple[Sequence[Any], list[Any], list[Any]]:
        return (read if next(waiting) else []), [], []

    monkeypatch.setattr(typed, "_line_editing", lambda: False)
    monkeypatch.setattr(typed.select, "select", ready)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    reader = typed.Typed()
    reader.terminal = True
    assert [reader.turn(), reader.turn()] == ["one\ntwo\nthree", "four"]
