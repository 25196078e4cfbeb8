"""A chat on the screen: nothing in an answer reaches the terminal as an order."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.chatting import Reply
from tunesmith.report.talk import JsonTalk, PlainTalk, TerminalTalk, talk

REPLY = Reply("a", True, False, 1, 512, 0.1, 0)
EVIL = "\x1b]0;pwned\x07\x1b[2Jred\r\x9b31m\u202e"


class Terminal(io.StringIO):
    """A stream that says it is a terminal, on which orders can be counted."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_the_form_follows_the_stream() -> None:
    plain = io.StringIO()
    assert isinstance(talk(Terminal(), plain), TerminalTalk)
    assert isinstance(talk(plain, plain), PlainTalk)
    assert isinstance(talk(Terminal(), plain, as_json=True), JsonTalk)


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_escape_sequences_are_written_out(stream: io.StringIO) -> None:
    on = talk(stream, stream)
    on.begin("tuned")
    for character in EVIL:
        on.text(character)
    on.end(REPLY, [])
    on.labels({EVIL: 0.9, "green": 0.1})
    on.begin("base", {"tuned": EVIL})
    on.text(EVIL)
    on.end(REPLY, [EVIL])
    on.fail(EVIL, EVIL)
    shown = stream.getvalue()
    assert "red" in shown
    assert "\\x1b]0;pwned\\x07" in shown
    assert not [order for order in ("\x07", "red\r", "\x9b", "\u202e", "\x1b]", "\x1b[2J") if order in shown]


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"]) | st.sampled_from("\n\t\u200d")))
def test_what_is_harmless_is_not_touched(text: str) -> None:
    stream = io.StringIO()
    on = PlainTalk(stream, stream)
    on.text(text)
    shown = stream.getvalue()
    assert shown == text or any(c not in text for c in shown)
    if all(c.isprintable() or c in "\n\t\u00a0\u202f\u3000\u200d" for c in text):
        assert shown == text


def test_a_file_gets_the_answers_and_stderr_the_rest() -> None:
    answers, notes = io.StringIO(), io.StringIO()
    on = talk(answers, notes)
    on.begin("tuned")
    on.text("red")
    on.end(REPLY, ["(cut)"])
    on.note("hello")
    on.fail("why", "what to do")
    assert answers.getvalue() == "red\n"
    assert notes.getvalue() == "(cut)\nhello\nerror: why\nremedy: what to do\n"


def test_two_answers_stand_side_by_side() -> None:
    stream = Terminal()
    on = talk(stream, stream)
    on.begin("base", {"tuned": "red"})
    on.text("I think that it is blue.")
    on.end(REPLY, [])
    last = [line for line in stream.getvalue().splitlines() if "red" in line][-1]
    assert "I think that it is blue." in last.split("red")[1]


def test_json_is_a_line_an_answer_with_its_exact_text() -> None:
    answers, notes = io.StringIO(), io.StringIO()
    on = talk(answers, notes, as_json=True)
    on.begin("base")
    on.text("not twice")
    on.end(Reply(EVIL, False, True, 3, 9, 0.5, 2), ["(stopped)"])
    on.labels({"green": 0.25, "red": 0.75})
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert lines[0] == {
        "model": "base", "text": EVIL, "finished": False, "stopped": True,
        "tokens": 3, "limit": 9, "seconds": 0.5, "left_out": 2,
    }  # fmt: skip
    assert lines[1] == {"label": "red", "probabilities": {"red": 0.75, "green": 0.25}}
    assert len(lines) == 2
    on.tags([("Ada", "B-PER"), ("came", "O")], "first")
    last = json.loads(answers.getvalue().splitlines()[-1])
    assert last == {"model": "first", "tokens": ["Ada", "came"], "tags": ["B-PER", "O"]}


def test_words_stand_beside_their_tags() -> None:
    for stream in (io.StringIO(), Terminal()):
        talk(stream, stream).tags([("Ada", "B-PER"), (EVIL, "O")], "first")
        shown = stream.getvalue()
        assert "first" in shown.splitlines()[0]
        assert ["Ada", "B-PER"] in [line.split() for line in shown.splitlines()]
        assert EVIL not in shown


def test_labels_that_are_chosen_are_all_shown_and_told_from_the_others() -> None:
    shares = {f"label {i}": 0.9 - 0.1 * i for i in range(9)}
    stream = io.StringIO()
    talk(stream, stream).labels(shares, None, [f"label {i}" for i in range(7)])
    shown = stream.getvalue().splitlines()
    assert [line.startswith("\u2713") for line in shown] == [True] * 7 + [False]
    assert shown[-1].split() == ["2", "more", "\u2264", "0.200"]
    answers = io.StringIO()
    talk(answers, answers, as_json=True).labels({"green": 0.25, "red": 0.75}, None, [])
    assert json.loads(answers.getvalue()) == {"labels": [], "probabilities": {"red": 0.75, "green": 0.25}}


def test_only_the_first_labels_are_shown_and_the_rest_is_summed() -> None:
    stream = io.StringIO()
    talk(stream, stream).labels({f"label {i}": 0.1 for i in range(10)})
    shown = stream.getvalue().splitlines()
    assert len(shown) == 6
    assert shown[0].split()[:3] == ["label", "0", "0.100"]
    assert shown[-1].split() == ["5", "more", "0.500"]
