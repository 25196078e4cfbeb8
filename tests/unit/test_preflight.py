"""What cannot be measured is told before training."""

from __future__ import annotations

import pytest

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.preflight import check_groups, check_metrics
from tunesmith.objectives.classify import majority
from tunesmith.recipe_evaluation import Evaluate
from tunesmith.types import Prediction, Row


def chat(answer: str | None, where: str = "test.jsonl:1") -> Row:
    asked = [{"role": "user", "content": "q"}]
    return Row({"messages": asked + ([{"role": "assistant", "content": answer}] if answer is not None else [])}, where)


def text(where: str = "test.jsonl:1") -> Row:
    return Row({"text": "t"}, where)


def label(name: str) -> Row:
    return Row({"text": "t", "label": name}, "test.jsonl:1")


def test_what_can_be_measured_passes() -> None:
    check_metrics(
        ["exact_match", "rouge_l", "macro_f1", "loss", "json_valid"], [], "test", [chat("a"), chat("b")], None
    )
    check_metrics(["loss", "perplexity"], [], "test", [text()], None)
    guesses = majority({"a": 2, "b": 1}, [label("a"), label("b")])
    check_metrics(["accuracy", "roc_auc", "ece"], [], "test", [label("a"), label("b")], guesses)
    assert check_metrics([], ["exact_match", "loss"], "test", [text()], None) == ["loss"]


@pytest.mark.parametrize(
    ("metric", "row", "cause"),
    [
        ("acuracy", chat("a"), "unknown metric 'acuracy'"),
        ("exact_match", text(), "exact_match needs a reference, and test.jsonl:1 has none"),
        (
            "ece",
            chat("a"),
            "ece is of labels that were learned and choices of each row's own, and the answer to test.jsonl:1 is of",
        ),
        ("schema_valid", chat("plain"), "schema_valid needs"),
    ],
)
def test_what_cannot_is_refused(metric: str, row: Row, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        check_metrics([metric], [], "test", [row], None)
    assert caught.value.cause.startswith(cause)


GIVEN = {
    "text": Prediction("a", "b", "f:1"),
    "label": Prediction("a", "b", "f:1", probabilities={"a": 0.9, "b": 0.1}),
    "number": Prediction("1", "2", "f:1", {"predicted": 1.0, "expected": 2.0}),
    "passages": Prediction("a", "b", "f:1", {"rank": 1.0, "nll": 1.0, "tokens": 1.0}),
    "tags": Prediction("O O", "O B-X", "f:1", {"words": 2.0}),
    "choices": Prediction("a", "b", "f:1", {"choices": 2.0, "nll": 1.0, "tokens": 1.0}, {"a": 0.9, "b": 0.1}),
}


@pytest.mark.parametrize(
    ("kind", "metric", "fits"),
    [
        ("label", "rouge_l", False),
        ("label", "perplexity", False),
        ("label", "rmse", False),
        ("passages", "accuracy", False),
        ("number", "macro_f1", False),
        ("text", "rmse", False),
        ("text", "mrr", False),
        ("choices", "macro_f1", False),
        ("choices", "roc_auc", False),
        ("choices", "brier", True),
        ("tags", "macro_f1", False),
        ("tags", "exact_match", True),
        ("tags", "entity_f1", True),
        ("label", "accuracy", True),
        ("text", "macro_f1", True),
        ("passages", "loss", True),
    ],
)
def test_a_metric_is_of_answers_of_its_kind(kind: str, metric: str, fits: bool) -> None:
    """One rule, whatever the metric; the remedy names those that are."""
    if fits:
        assert check_metrics([metric], [], "test", [], [GIVEN[kind]]) == [metric]
        return
    with pytest.raises(InputError, match=f"^{metric} is of .*, and the answer to f:1 is of ") as refused:
        check_metrics([metric], [], "test", [], [GIVEN[kind]])
    assert "choose one of " in refused.value.remedy
    assert metric not in refused.value.remedy.partition(": ")[2].split(", ")
    named = refused.value.remedy.partition(": ")[2].split(", ")
    assert ("loss" in named) == (kind != "tags")
    assert all(kind in getattr(METRICS.get(name), "of", [kind]) for name in named)


def test_a_row_without_an_answer_among_others_is_named_even_if_no_metric_is() -> None:
    with pytest.raises(InputError, match=r"1 of 3 rows of hard have no answer to compare with, such as f:2"):
        check_metrics([], [], "hard", [chat("a", "f:1"), chat(None, "f:2"), chat("b", "f:3")], None)


@pytest.mark.parametrize(
    ("values", "least", "cause"),
    [
        (["a" * 30], 20, "and all rows to measure have 'a' there"),
        (["abcdefghijklmnopqrstuvwxyz"], 1, None),
        (["abcdefghijklmnopqrstuvwxyz"], None, "no value has 20 rows or more to measure; the most frequent has 1"),
        (["aaabb"], 4, "no value has 4 rows or more to measure; the most frequent has 3"),
        (["aaaab"], 4, None),
        (["aaaa", "bb"], 4, "and all rows to measure have 'a' there"),
        (["aaaa", "bbbba"], 4, None),
        ([], 4, None),
    ],
)
def test_a_column_that_makes_no_groups_is_refused(values: list[str], least: int | None, cause: str | None) -> None:
    sets = [[Row({"text": "t"}, "here", {"of": value}) for value in of_set] for of_set in values]
    asked = Evaluate.model_validate({"by": "of", "smallest_group": least})
    if cause is None:
        check_groups(asked, sets)
        return
    with pytest.raises(InputError, match=f"evaluate.by is 'of', .*{cause}"):
        check_groups(asked, sets)


def test_labels_are_no_groups() -> None:
    rows = [Row({"text": "t", "label": value}, "here", {"kind": value}) for value in "ab" * 20]
    with pytest.raises(InputError, match=r"evaluate\.by is 'kind', which is each row's label"):
        check_groups(Evaluate.model_validate({"by": "kind"}), [rows])
    rows[0] = Row({"text": "t", "label": "a"}, "here", {"kind": "b"})
    check_groups(Evaluate.model_validate({"by": "kind"}), [rows])
