"""Regression: its loss against a slow version, its unit, and whole runs that beat the mean of training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinds import policy_of
from tunesmith import api
from tunesmith.data.pack import collate
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.objectives.regress import Regress
from tunesmith.types import Example, Piece, Row, Step, Want

WORDS = ("poor", "fair", "good", "fine")


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The score is told by one word of each text."""
    draw = random.Random(start)
    words = [draw.randrange(4) for _ in range(count)]
    return [{"text": f"it was {WORDS[k]} {1000 * start + i}", "score": 100.0 + 10 * k} for i, k in enumerate(words)]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(-50, 50)), min_size=2, max_size=6),
    st.sampled_from(["bert", "llama"]),
)
def test_the_loss_is_the_squared_error_of_standardised_scores(asked: list[tuple[int, float]], family: str) -> None:
    scores = [score for _, score in asked]
    if np.std(scores) < 1e-3:
        return
    objective = Regress(Regress.Options())
    objective.fit([Row({"text": "x", "score": score}, "here") for score in scores])
    policy = policy_of(family)
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.nn.init.normal_(policy.heads["score"].linear.weight)
    policy.eval()
    examples = [
        Example((Piece(np.arange(3, 3 + n).astype(np.int32)),), {"score": (s - objective.mean) / objective.scale})
        for n, s in asked
    ]
    batch = collate(examples, range(len(examples)), packed=True, pad_id=0)
    part = objective.terms(policy, batch).parts["squared_error"]
    pooled = policy.score(batch, Want(pooled=True)).pooled_SD
    assert pooled is not None
    weight, bias = policy.heads["score"].linear.weight[0], policy.heads["score"].linear.bias[0]
    for index, score in enumerate(scores):
        told = float((pooled[index].float() @ weight + bias).detach())
        wanted = (told - (score - np.mean(scores)) / np.std(scores)) ** 2
        assert float(part.loss_U[index].detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert objective.normalisers(Step(1, [batch], {})) == {"squared_error": len(examples)}


@pytest.mark.parametrize("own", [{"label": "red"}, {"labels": ["red"]}])
def test_rows_with_labels_are_told_to_be_of_another_kind_and_those_that_ask_are_read(own: dict[str, Any]) -> None:
    objective = Regress(Regress.Options())
    objective.fit([Row({"text": "x", "score": score}, "a") for score in (1.0, 3.0)])
    with pytest.raises(InputError, match="f:2: this row has a label, and the training rows have a score each"):
        objective.unread([Row({"text": "x"}, "f:1"), Row({"text": "x", **own}, "f:2")], None)
    assert [p.output for p in objective.unread([Row({"text": "x"}, "f:1")], None) or []] == ["2"]


def test_scores_that_are_all_alike_are_refused() -> None:
    with pytest.raises(InputError, match="all 2 training rows have the score 3"):
        Regress(Regress.Options()).fit([Row({"text": "x", "score": 3.0}, "a"), Row({"text": "y", "score": 3.0}, "b")])


@pytest.mark.parametrize("method", ["full", "head"])
def test_a_run_beats_the_mean_in_the_unit_of_its_rows(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    recipe = {
        "model": str(tiny_llama),
        "objective": "regress",
        "method": method,
        "train": {"epochs": 12, "batch_size": 8, "learning_rate": 1e-2},
    }
    result = api.train(recipe, data={"train": _rows(160), "test": _rows(60, start=1)}, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert values["mean", "mae"] == pytest.approx(10.0, abs=1.5)  # of 100, 110, 120 and 130 their mean is off by 10
    assert values["tuned", "mae"] < 0.6 * values["mean", "mae"]
    assert values["tuned", "pearson"] > 0.7
    assert (values["mean", "pearson"], values["mean", "spearman"]) == (0.0, 0.0)
    effect = next(e for e in result.effects if e["metric"] == "mae")
    assert effect["p"] < 0.01
    answered = api.predict(result.path, [{"text": "it was poor 3"}, {"text": "it was fine 3"}])
    low, high = (float(answer.output) for answer in answered)
    assert 95 < low < high < 140
    again = api.evaluate(result.path, _rows(30, start=2), name="more")
    assert {r["model"] for r in again.records if r["data"] == "more"} == {"mean", "tuned"}
    plan = json.loads((result.path / "plan.json").read_text())
    assert any("mean of the training rows" in text for text in plan["substitutions"])


def test_a_second_run_goes_on_in_the_unit_of_the_first(tiny_llama: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": str(tiny_llama),
        "objective": "regress",
        "method": "lora",
        "train": {"max_steps": 2, "batch_size": 4},
        "evaluate": {"base": False},
    }
    first = api.train(recipe, data={"train": _rows(20), "test": _rows(5, 1)}, out=tmp_path / "first")
    shifted = [{**row, "score": row["score"] + 50} for row in _rows(20, 3)]
    second = api.train(
        {**recipe, "model": str(first.path)}, data={"train": shifted, "test": _rows(5, 1)}, out=tmp_path / "second"
    )
    learned = [json.loads((run.path / "plan.json").read_text())["meaning"]["objective"][2] for run in (first, second)]
    assert learned[0] == learned[1]


def test_the_code_of_the_card_gives_the_same_number(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: dict[str, Any] = {
        "model": str(tiny_llama),
        "objective": {"name": "regress", "hidden": 8},
        "method": "full",
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
        "evaluate": {"base": False},
    }
    run = api.train(recipe, data={"train": _rows(40), "test": _rows(5, 1)}, out=tmp_path / "run").path
    card = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Meant to give each text a number" in card
    (answer,) = api.predict(run, [{"text": "it was good"}])
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        capsys.readouterr()
        filled = code.replace("path/to/this/folder", str(run / "model")).replace('"..."', '"it was good"')
        exec(compile(filled, "card", "exec"), {})
        assert float(capsys.readouterr().out) == pytest.approx(float(answer.output), rel=1e-4)


def test_a_score_beyond_all_squares_is_refused() -> None:
    with pytest.raises(InputError, match=r"a score as large as 1e\+300, whose square is no number"):
        Regress(Regress.Options()).fit([Row({"text": "x", "score": score}, "here") for score in (1e300, -1e300, 1.0)])
