"""Keys of rows: what counts as the same, and duplicates and shared rows found exactly."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.checks import as_keys, contradicting, duplicates, normalise, row_keys, shared


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  Where IS\n\tmy card? ", "where is my card?"),
        ("Straße", "STRASSE"),
        ("\uff46\uff55\uff4c\uff4c\u3000\uff41", "full a"),
        ("cafe\u0301", "CAFÉ"),
        ("ﬁne", "FINE"),
    ],
)
def test_normalise(text: str, same: str) -> None:
    assert normalise(text) == normalise(same)
    assert normalise(text) == normalise(text).strip()


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_ascii_needs_no_unicode_normalisation(text: str) -> None:
    assert normalise(text) == normalise(text + "\u00e9").removesuffix("é").rstrip()


def conversation(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_conversations_are_shared_by_what_comes_before_the_last_answer() -> None:
    one = row_keys(conversation(("system", "S"), ("user", "Hi"), ("assistant", "A")))
    assert one[0] == row_keys(conversation(("system", "s "), ("user", "hi"), ("assistant", "B")))[0]
    assert one[1] != row_keys(conversation(("system", "s "), ("user", "hi"), ("assistant", "B")))[1]
    assert one[0] != row_keys(conversation(("user", "S"), ("user", "Hi"), ("assistant", "A")))[0]
    assert one[0] != row_keys(conversation(("system", "S Hi"), ("user", "x"), ("assistant", "A")))[0]
    unanswered = row_keys(conversation(("system", "S"), ("user", "Hi")))
    assert unanswered == (one[0], one[0])


def test_other_answers_are_part_of_the_answer() -> None:
    one = conversation(("user", "Hi"), ("assistant", "A"))
    two, three = ({**one, "other_answers": others} for others in (["B"], ["B", "C"]))
    assert row_keys(one)[0] == row_keys(two)[0] == row_keys(three)[0]
    assert len({row_keys(row)[1] for row in (one, two, three)}) == 3


def test_tools_and_tool_calls_tell_rows_apart() -> None:
    plain = conversation(("user", "Hi"), ("assistant", "A"))
    assert row_keys(plain)[0] != row_keys({**plain, "tools": [{"name": "f"}]})[0]
    calls = [{"function": {"name": "f"}}]
    called = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    }
    other = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    assert row_keys(called)[0] == row_keys(other)[0]
    assert row_keys(called)[1] != row_keys(other)[1]


def test_an_answer_to_nothing_is_told_by_the_answer() -> None:
    a = row_keys(conversation(("system", "Write a poem."), ("assistant", "A")))
    b = row_keys(conversation(("system", "Write a poem."), ("assistant", "B")))
    assert a[0] == a[1]
    assert a[0] != b[0]


def test_labels_belong_to_the_answer() -> None:
    one, other = row_keys({"text": "a", "label": "x"}), row_keys({"text": "A", "label": "y"})
    assert one[0] == other[0] == row_keys({"text": "a"})[0]
    assert one[1] != other[1]
    assert row_keys({"text": "a", "labels": ["x", "y"]}) == row_keys({"text": "a", "labels": ["y", "x"]})
    assert all(len(key) == 16 for key in one)


_KEYS = st.lists(st.binary(min_size=1, max_size=1).map(lambda b: b.ljust(16, b"\0")), max_size=30)


@given(_KEYS, _KEYS)
def test_duplicates_and_shared_against_sets(mine: list[bytes], theirs: list[bytes]) -> None:
    keys, others = as_keys(b"".join(mine)), as_keys(b"".join(theirs))
    assert duplicates(keys).tolist() == [i for i, key in enumerate(mine) if key in mine[:i]]
    assert shared(keys, others).tolist() == [i for i, key in enumerate(mine) if key in set(theirs)]


@given(_KEYS, st.randoms())
def test_contradictions_against_sets(mine: list[bytes], random: Random) -> None:
    answers = [random.choice([b"a", b"b"]).ljust(16) for _ in mine]
    found = contradicting(as_keys(b"".join(mine)), as_keys(b"".join(answers)))
    said = {key: {a for k, a in zip(mine, answers, strict=True) if k == key} for key in mine}
    wanted = [[i for i, k in enumerate(mine) if k == key] for key in sorted(said) if len(said[key]) > 1]
    assert [group.tolist() for group in found] == wanted


def test_keys_that_end_in_zero_bytes_stay_apart() -> None:
    keys = as_keys(b"a".ljust(16, b"\0") + b"a".rjust(16, b"\0") + b"a\0b".ljust(16, b"\0"))
    assert duplicates(keys).tolist() == []
    assert np.array_equal(shared(keys, keys[1:]), [1, 2])
