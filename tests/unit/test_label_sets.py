"""Classification with several labels a row: the loss against a slow version, answers and their scores, whole runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinds import policy_of
from tunesmith import api
from tunesmith.comparing import compare
from tunesmith.data.pack import collate
from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError
from tunesmith.evaluation.class_metrics import details
from tunesmith.evaluation.metrics import applicable
from tunesmith.models.heads import Head
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.label_sets import SMALLEST, LabelSets
from tunesmith.rundir import read_json
from tunesmith.types import Example, LabelCounts, Piece, Prediction, Row, Step, Want

WORDS = {"red": "warm", "green": "calm", "blue": "cold"}


def _row(labels: list[str], where: str = "here") -> Row:
    return Row({"text": "x", "labels": labels}, where)


def _rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Each colour in a text tells a label; some texts name none."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for index in range(count):
        named = [colour for colour in WORDS if draw.random() < 0.4]
        text = f"{' and '.join(named) or 'nothing'} {1000 * seed + index}"
        found.append({"text": text, "labels": [WORDS[colour] for colour in named]})
    return found


@settings(deadline=None, max_examples=15)
@given(st.data(), st.sampled_from(["bert", "llama"]), st.integers(1, 130))
def test_the_loss_is_the_mean_binary_cross_entropy_of_labels(data: st.DataObject, family: str, count: int) -> None:
    labels = [f"label {index:03}" for index in range(count)]
    sets = data.draw(st.lists(st.sets(st.sampled_from(labels), max_size=5), min_size=1, max_size=4))
    objective = Classify(Classify.Options())
    objective.adopt({"labels": labels, "multi_label": True})
    policy = policy_of(family)
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.heads["label"].linear.weight)
    policy.eval()
    scheme = LabelSets(labels, 0.5)
    examples = [
        Example((Piece(np.arange(3, 4 + n).astype(np.int32)),), scheme.columns(_row(sorted(own))))
        for n, own in enumerate(sets)
    ]
    batch = collate(examples, range(len(examples)), packed=True, pad_id=0)
    terms = objective.terms(policy, batch)
    pooled = policy.score(batch, Want(pooled=True)).pooled_SD
    assert pooled is not None
    right, hits, named = 0, 0, 0
    for index, own in enumerate(sets):
        logits = policy.heads["label"].linear(pooled[index].float()).detach().double()
        shares = [1 / (1 + math.exp(-float(logit))) for logit in logits]
        slow = -sum(math.log(p if label in own else 1 - p) for label, p in zip(labels, shares, strict=True)) / count
        assert float(terms.parts["binary_cross_entropy"].loss_U[index].detach()) == pytest.approx(slow, rel=1e-4)
        said = {label for label, p in zip(labels, shares, strict=True) if p >= 0.5}
        right, hits, named = right + (said == own), hits + len(said & own), named + len(said) + len(own)
    assert terms.metrics == {"accuracy": (right, len(sets)), "micro_f1": (2 * hits, named)}
    assert objective.normalisers(Step(1, [batch], {})) == {"binary_cross_entropy": len(sets)}


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sets(st.integers(0, 199)), min_size=1, max_size=5), st.integers(1, 200))
def test_a_store_keeps_the_labels_in_few_columns(
    tmp_path_factory: pytest.TempPathFactory, sets: list[set[int]], count: int
) -> None:
    scheme = LabelSets([str(index) for index in range(count)], 0.5)
    known = [{place for place in own if place < count} for own in sets]
    pairs = [
        (Example((Piece(np.array([5], dtype=np.int32)),), scheme.columns(row)), row)
        for own in known
        for row in [_row([str(place) for place in own])]
    ]
    store = TokenStore.build(tmp_path_factory.mktemp("store") / "s", pairs)
    assert len(store.columns) == math.ceil(count / 63)
    batch = collate([store.example(i) for i in range(len(store))], range(len(store)), packed=True, pad_id=0)
    expected = [[place in own for place in range(count)] for own in known]
    assert scheme.targets(batch.columns).tolist() == expected


def test_an_answer_is_all_labels_from_the_threshold_on() -> None:
    scheme = LabelSets(["a", "b", "é"], 0.25)
    found = scheme.prediction(_row(["é", "a"]), torch.tensor([0.25, 0.1, 0.9]).logit())
    assert (found.output, found.reference, found.multi_label) == ('["a", "é"]', '["a", "é"]', True)
    assert found.scores == pytest.approx({"nll": -math.log(0.25 * 0.9 * 0.9), "tokens": 3}, rel=1e-5)
    assert found.probabilities == pytest.approx({"a": 0.25, "b": 0.1, "é": 0.9}, rel=1e-5)
    none = scheme.prediction(Row({"text": "x"}, "here"), torch.full((3,), -5.0))
    assert (none.output, none.reference, none.scores) == ("[]", None, {})
    unseen = scheme.prediction(_row(["z"]), torch.full((3,), -200.0))
    assert unseen.scores == pytest.approx({"nll": -math.log(SMALLEST), "tokens": 4})


@pytest.mark.parametrize(
    ("counts", "answer"),
    [({"a": 6, "b": 3, "c": 7}, ["a", "c"]), ({"a": 4, "b": 4}, ["a"]), ({"b": 5, "c": 3}, ["b"])],
    ids=["those of more than half", "a tie", "the most frequent"],
)
def test_the_unread_answer(counts: dict[str, int], answer: list[str]) -> None:
    scheme = LabelSets(["a", "b", "c"], 0.5)
    (found,) = scheme.unread(LabelCounts(counts, 10), [_row(["b"])])
    assert found.answered == answer
    shares = {label: counts.get(label, 0) / 10 for label in "abc"}
    assert found.probabilities == shares
    assert found.scores["nll"] == pytest.approx(-math.log((1 - shares["a"]) * shares["b"] * (1 - shares["c"])))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([_row(["a", "b"]), _row(["b", "a"])], r"one list of labels \(a, b\)"),
        ([_row([]), _row([])], r"one list of labels \(none\)"),
    ],
    ids=["all alike", "no label at all"],
)
def test_rows_that_tell_nothing_apart_are_refused(rows: list[Row], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Classify(Classify.Options()).fit(rows)


def test_a_threshold_without_lists_of_labels_is_refused() -> None:
    rows = [Row({"text": "x", "label": label}, "here") for label in "ab"]
    with pytest.raises(InputError, match="threshold does nothing where each row has one label"):
        Classify(Classify.Options(threshold=0.3)).fit(rows)


def test_a_list_of_labels_is_refused_where_training_had_one_each(tiny_bert: Path, tmp_path: Path) -> None:
    one = [{"text": f"{label} {i}", "label": label} for i in range(8) for label in "ab"]
    recipe = {"model": str(tiny_bert), "objective": "classify", "method": "head", "train": {"max_steps": 1}}
    run = api.train(recipe, data={"train": one}, out=tmp_path / "run").path
    with pytest.raises(InputError, match="this row has a list of labels"):
        api.predict(run, _rows(2))
    with pytest.raises(InputError, match=r"rows\[0\]: this row has a score, and the training rows have one label each"):
        api.evaluate(run, [{"text": "a 1", "score": 1.5}])


def test_one_label_is_refused_where_training_had_lists() -> None:
    objective = Classify(Classify.Options())
    objective.fit([_row(["red"]), _row([])])
    with pytest.raises(InputError, match="this row has one label, and the training rows have lists"):
        objective.answers.columns(Row({"text": "x", "label": "red"}, "here"))


def test_one_label_may_be_there_or_not() -> None:
    objective = Classify(Classify.Options())
    objective.fit([_row(["toxic"]), _row([])])
    assert objective.describe() == {"labels": ["toxic"], "multi_label": True}


def test_label_sets_have_no_confusion_and_no_confidence() -> None:
    rows = [
        Prediction(json.dumps(["a"]), json.dumps(own), "x", {}, {"a": 0.7, "b": 0.2}, multi_label=True)
        for own in (["a"], [], ["a", "b"])
    ]
    asked = ["micro_f1", "accuracy", "macro_f1", "roc_auc", "ece"]
    assert applicable(asked, rows) == ["micro_f1", "accuracy", "macro_f1", "roc_auc"]
    assert details(rows, ["a", "b"]) == {"labels": ["a", "b"]}
    empty = [Prediction("[]", "[]", "x", {}, {"a": 0.1}, multi_label=True)] * 2
    assert applicable(asked, empty) == ["accuracy"]


@pytest.mark.parametrize("method", ["full", "head"])
def test_a_run_learns_is_measured_resumed_and_told(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    recipe = {
        "model": str(tiny_llama),
        "objective": {"name": "classify", "threshold": 0.4},
        "method": method,
        "train": {"epochs": 10, "batch_size": 8, "learning_rate": 1e-2},
        "evaluate": {"keep": 40},
    }
    result = api.train(recipe, data={"train": _rows(160), "test": _rows(40, seed=1)}, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records if r["group"] == "all"}
    assert values["tuned", "micro_f1"] > max(0.75, values["majority", "micro_f1"])
    assert "ece" not in {metric for _, metric in values}
    assert {r["group"] for r in result.records} >= {"label=warm", "label=calm", "label=cold"}
    learned = read_json(result.path / "model" / "tunesmith.json")["objective"]["learned"]
    assert learned == {"labels": ["calm", "cold", "warm"], "multi_label": True}
    asked = [{"text": "nothing 5000", "labels": []}, {"text": "red and blue 5001", "labels": ["warm"]}]
    answers = api.predict(result.path, asked)
    for answer in answers:
        assert answer.probabilities is not None
        assert answer.answered == [label for label, share in answer.probabilities.items() if share >= 0.4]
    assert [answer.reference for answer in answers] == ["[]", '["warm"]']
    assert api.predict(result.path, [{"text": "nothing 5000"}])[0].reference is None
    again = api.evaluate(result.path, _rows(40, seed=1), name="again")
    repeated = {(r["model"], r["metric"]): r["value"] for r in again.records if r["data"] == "again"}
    assert repeated["tuned", "micro_f1"] == values["tuned", "micro_f1"]
    compared = compare(result.path, base=True)
    assert {test.metric for test in compared.tests} == {"micro_f1", "accuracy", "roc_auc", "loss"}
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert "Each class, lowest recall first" in page
    assert "What is taken for what" not in page
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "whose probability is 0.4 or more, or none" in card
    assert "logits.sigmoid().tolist()) if p >= 0.4" in card
    assert "always gives one of its labels" not in card
