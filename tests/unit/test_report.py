"""What is shown: text of unknown origin is harmless, tables fit, and a view cannot end a run."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest

from tunesmith.report.figures import duration, gibibytes
from tunesmith.report.live import Pace, View
from tunesmith.report.results import results_tables, weaknesses
from tunesmith.report.screen import screen
from tunesmith.report.visible import shortened, visible


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose reader has left."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


def step(number: int, total: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "step": number,
        "total_steps": total,
        "loss": loss,
        "seconds": 0.5,
        "tokens_per_second": 1234.5,
        "examples_per_second": 8.0,
        "peak_memory_bytes": 3 * 2**30,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 日本", "plain ünï 日本"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\rb\x00", "a\\rb\\x00"),
        ("\u202eab", "\\u202eab"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_shortened_is_one_line_of_at_most_the_limit() -> None:
    assert shortened("a\n  b", 10) == "a b"
    assert shortened("x" * 11, 10) == "x" * 9 + "…"


def test_pace_is_the_mean_of_constant_numbers_and_counts_down() -> None:
    pace = Pace()
    for _ in range(3):
        pace.take(2.0, 0.5)
    assert pace.smoothed == pytest.approx(2.0)
    assert pace.left(10) == pytest.approx(5.0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (90000, "25:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_memory_is_told_as_nothing() -> None:
    assert [gibibytes(count) for count in (3 * 2**30, 0.05 * 2**30, 2**25, 2**18)] == [
        "3.0 GiB",
        "0.1 GiB",
        "32.0 MiB",
        "0.2 MiB",
    ]


def test_a_long_training_is_about_twenty_plain_lines_with_the_first_and_the_last() -> None:
    stream = io.StringIO()
    with View(stream) as view:
        for number in range(1, 1001):
            view.listen("step", step(number, 1000))
    lines = stream.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("step 1/1000  loss 2.0000 (smoothed 2.0000)  1,234 tokens/s")
    assert lines[-1].startswith("step 1000/1000")
    assert "0:00 left  3.0 GiB" in lines[-1]


def test_a_terminal_gets_a_bar_that_is_taken_away_and_samples_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with View(stream) as view:
        for number in (1, 2):
            view.listen("step", step(number, 2))
        view.listen("sample", {"where": "/somewhere/cache/test.jsonl:3", "reference": "green", "output": "blu\x1b[0m"})
        view.listen("validation", {"step": 2, "loss": 1.5, "best": True})
    text = stream.getvalue()
    assert "step 2/2" in text
    assert "\x1b[2K" in text  # a line of the bar, erased
    assert "blu\\x1b[0m" in text
    assert "test.jsonl:3" in text
    assert "/somewhere" not in text  # a folder of a cache says nothing to whoever looks on
    assert text.index("green") < text.index("validation after step 2: loss 1.5000 (the best so far)")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with View(stream) as view:
        view.listen("step", step(1, 1))
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_view_that_cannot_be_written_falls_silent(
    error: OSError, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Broken(error)
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    with View(stream) as view:
        view.listen("phase", {"name": "training", "total_steps": 3})
        written = stream.writes
        view.listen("step", step(1, 3))
    assert stream.writes == written == 1


def record(model: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    limits = {"low": 0.9 * value, "high": 1.1 * value}
    return {
        "model": model,
        "data": "test",
        "group": "all",
        "metric": metric,
        "value": value,
        "n": 1000,
        **limits,
        **more,
    }


def test_results_fit_into_80_columns_whatever_their_size() -> None:
    records = [
        record(model, metric, value)
        for metric, value in (("json_field_accuracy", 0.5), ("perplexity", 98765.4), ("loss", 1.5e9))
        for model in ("base", "tuned")
    ]
    effects = [
        {"data": "test", "metric": metric, "difference": -1e4, "low": -2e4, "high": None, "p": 1e-9}
        for metric in ("json_field_accuracy", "perplexity", "loss")
    ]
    stream = io.StringIO()
    for table in results_tables(records, effects):
        screen(stream).print(table)
    assert max(len(line.rstrip()) for line in stream.getvalue().splitlines()) <= 80
    assert "…" not in stream.getvalue()
    assert stream.getvalue().count(" 1,000") == 3, "the last column is there, whole"
    assert "unknown" in stream.getvalue()
    assert "<0.001" in stream.getvalue()


def test_each_data_set_and_group_has_its_table() -> None:
    records = [record("tuned", "loss", 1.0, data=data, group=group) for data in "ab" for group in ("all", "new")]
    assert len(results_tables(records, [])) == 4


def test_what_numbers_cannot_say_is_said() -> None:
    assert "nothing was measured" in weaknesses([])[0]
    assert "no test set" in weaknesses([record("tuned", "loss", 1.0, data="validation")])[0]
    assert weaknesses([record("tuned", "loss", 1.0)]) == []
