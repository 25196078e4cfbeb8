"""Multiple choice: rows, the loss against a slow version, and runs."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.data.formats import convert
from tunesmith.errors import InputError

FORMAT = "question+choices+label"
ASKED = {"question": "who?", "choices": ["Ada", "Bob", "1"]}


@pytest.mark.parametrize(("label", "answer"), [(0, 0), (2, 2), ("Bob", 1), ("1", 2)])
def test_the_right_choice_by_its_position_or_its_text(label: Any, answer: int) -> None:
    value = {"question": "who?", "choices": ["Ada", "Bob", "1"], "answer": answer}
    assert convert({**ASKED, "label": label, "context": None}, FORMAT, {}, "f:1") == value
    assert convert({**ASKED, "label": label, "context": "x"}, FORMAT, {}, "f:1") == {**value, "context": "x"}


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ({"label": 3}, "label: int 3 is none of the 3 choices"),
        ({"label": -1}, "label: int -1 is none of the 3 choices"),
        ({"label": True}, "label: bool True is none of the 3 choices"),
        ({"label": "0"}, "label: str '0' is none of the 3 choices"),
        ({"choices": ["a"], "label": 0}, "choices: there is nothing to choose from: 1 of them"),
        ({"choices": ["a", " "], "label": 0}, r"choices\[1\]: a choice must be text, this is str ' '"),
        ({"choices": ["a", 7], "label": 0}, r"choices\[1\]: a choice must be text, this is int 7"),
        ({"choices": ["a", "b", "a"], "label": 0}, "choices: the choice 'a' is given twice"),
    ],
)
def test_rows_that_cannot_be_read(raw: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        convert({**ASKED, **raw}, FORMAT, {}, "f.jsonl:1")
