"""Rows that are to be answered: what of them is asked, and what they may leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tunesmith.data.given import check_kinds, to_answer
from tunesmith.errors import InputError
from tunesmith.types import Row

BLANK = [None, "", " \t", math.nan]


@pytest.mark.parametrize("blank", BLANK)
def test_a_row_without_its_answer_is_asked_whatever_stands_for_the_answer(blank: Any) -> None:
    rows = [{"body": "one", "queue": "card"}, {"body": "two", "queue": blank}, {"text": "three"}]
    values = [row.value for row in to_answer(rows, {"text": "body", "label": "queue"}, "text+label")]
    assert values == [{"text": "one", "label": "card"}, {"text": "two"}, {"text": "three"}]
    (asked,) = to_answer([{"prompt": "Why?", "completion": blank}], {})
    assert asked.value == {"messages": [{"role": "user", "content": "Why?"}]}


def test_an_empty_list_is_an_answer() -> None:
    (row,) = to_answer([{"text": "nothing of these", "labels": []}], {})
    assert row.value == {"text": "nothing of these", "labels": []}


def test_references_are_read_by_the_format_of_training() -> None:
    row = {"text": "Thanks!", "label": "joy", "labels": ["joy", "gratitude"], "score": 3}
    read = {name: to_answer([row], {}, name)[0].value for name in ("text+label", "text+labels", "text+score")}
    assert read == {
        "text+label": {"text": "Thanks!", "label": "joy"},
        "text+labels": {"text": "Thanks!", "labels": ["joy", "gratitude"]},
        "text+score": {"text": "Thanks!", "score": 3.0},
    }
    conversation = {"messages": [{"from": "human", "value": "Hi"}]}
    (asked,) = to_answer([conversation], {"conversations": "messages"}, "sharegpt")
    assert asked.value == {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_row_that_asks_nothing_is_refused_with_its_place() -> None:
    with pytest.raises(InputError, match=r"rows\[1\]: no known format has the columns label"):
        to_answer([{"text": "one"}, {"label": "card"}], {}, "text+label")


def test_a_text_that_asks_nothing_is_told_what_does_and_what_measures_it() -> None:
    """As of a run of `pretrain`, which was trained on such rows."""
    from tunesmith.objectives import OBJECTIVES

    rows = [Row({"text": "once upon a time"}, "f:1")]
    check_kinds(rows, OBJECTIVES.get("pretrain").needs, asking=False)
    with pytest.raises(InputError, match="f:1: a row of plain text asks nothing") as refused:
        check_kinds(rows, OBJECTIVES.get("pretrain").needs, asking=True)
    assert 'give {"prompt": ...}, which it goes on from' in refused.value.remedy
    assert "`tunesmith evaluate RUN --data FILE` measures" in refused.value.remedy
