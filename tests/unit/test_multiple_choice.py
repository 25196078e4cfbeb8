"""Multiple choice: rows, the loss against a slow version, and runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kinds import policy_of
from tunesmith import api, cli
from tunesmith.data.chat import Renderer
from tunesmith.data.formats import convert
from tunesmith.data.pack import collate, split
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.objectives.multiple_choice import MultipleChoice
from tunesmith.types import Example, Piece, Row, Step, Want

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


def _example(sizes: list[int], answer: int) -> Example:
    ids = [np.arange(3 + 10 * place, 3 + 10 * place + n).astype(np.int32) for place, n in enumerate(sizes)]
    return Example(tuple(Piece(own, role="choice") for own in ids), {"answer": answer})


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=5), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from(["bert", "llama"]),
    st.booleans(),
)
def test_the_loss_is_the_softmax_over_the_choices_of_each_row(
    drawn: list[list[int]], seed: int, family: str, packed: bool
) -> None:
    objective, policy = MultipleChoice(MultipleChoice.Options()), policy_of(family, packed=packed)
    policy.pooling = "last"
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.nn.init.normal_(policy.heads["choices"].linear.weight)
    policy.eval()
    draw = random.Random(seed)
    examples = [_example(sizes, draw.randrange(len(sizes))) for sizes in drawn]
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    terms = objective.terms(policy, batch)
    wanted, right = [], 0
    for example in examples:
        scores: list[torch.Tensor] = []
        for piece in example.pieces:
            alone = collate([Example((piece,))], [0], packed=packed, pad_id=0)
            hidden_BTD = policy.score(alone, Want(hidden=True)).hidden_BTD
            assert hidden_BTD is not None
            scores.append(policy.heads["choices"](hidden_BTD[0, -1])[0].detach())
        logits = torch.stack(scores)
        wanted.append(float(torch.logsumexp(logits, 0) - logits[example.columns["answer"]]))
        right += int(logits.argmax()) == example.columns["answer"]
    part = terms.parts["cross_entropy"]
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert part.example_U.tolist() == list(range(len(examples)))
    assert terms.metrics["accuracy"] == (right, len(examples))
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"cross_entropy": 2 * len(examples)}
    for alone in split(batch, [[i] for i in range(len(examples))], packed=packed, pad_id=0):
        again = objective.terms(policy, alone).parts["cross_entropy"].loss_U.tolist()
        assert again == pytest.approx([wanted[alone.examples[0]]], rel=1e-4, abs=1e-4)


COLOURS = ("red", "green", "blue", "white")


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The right choice is the one that the question spells out; three or four choices a row."""
    draw = random.Random(start)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        choices = draw.sample(COLOURS, draw.choice([3, 4]))
        right = draw.randrange(len(choices))
        rows.append({"question": f"{1000 * start + i} {choices[right][0] * 6}?", "choices": choices, "label": right})
    return rows


def test_what_is_read_of_a_row(tiny_bert: Path, tiny_llama: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=20)
    objective = MultipleChoice(MultipleChoice.Options())
    row = Row({"question": "who?", "choices": ["Ada", "B"], "answer": 1}, "f:1")
    plain = objective.example(row, renderer)
    assert [renderer.decode(p.input_ids_T) for p in plain.pieces] == ["[CLS]who?[SEP]Ada[SEP]", "[CLS]who?[SEP]B[SEP]"]
    assert ([p.typed_from for p in plain.pieces], plain.columns, plain.cut) == ([6, 6], {"answer": 1}, 0)
    long = objective.example(Row({**row.value, "context": "x" * 12}, "f:1"), renderer)
    assert [renderer.decode(p.input_ids_T) for p in long.pieces] == [
        "[CLS]xxxxxxxxx[SEP]who? Ada[SEP]",
        "[CLS]xxxxxxxxxxx[SEP]who? B[SEP]",
    ]
    assert long.cut == 4
    decoder = Renderer(AutoTokenizer.from_pretrained(tiny_llama))
    texts = [decoder.decode(p.input_ids_T) for p in objective.example(row, decoder).pieces]
    assert texts == ["who?\nAda<|im_end|>", "who?\nB<|im_end|>"]


def test_a_guess_is_even_and_repeats() -> None:
    objective = MultipleChoice(MultipleChoice.Options())
    rows = [Row(convert(row, FORMAT, {}, "f:1"), "f:1") for row in _rows(300)]
    first, again = (objective.unread(rows, None) or [] for _ in range(2))
    assert first == again
    for row, guess in zip(rows, first, strict=True):
        count = len(row.value["choices"])
        assert guess.probabilities == pytest.approx(dict.fromkeys(row.value["choices"], 1 / count))
        assert guess.scores["nll"] == pytest.approx(np.log(count))
    places = [row.value["choices"].index(guess.output) for row, guess in zip(rows, first, strict=True)]
    assert all(50 < places.count(place) < 130 for place in range(3))


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_run_beats_guesses(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "model": str(request.getfixturevalue(model)),
        "objective": "multiple_choice",
        "method": "full",
        "train": {"epochs": 15, "batch_size": 8, "learning_rate": 3e-3},
    }
    result = api.train(recipe, data={"train": _rows(120), "test": _rows(60, 1)}, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert values["tuned", "accuracy"] > 0.8
    assert values["chance", "accuracy"] < 0.6
    assert values["tuned", "loss"] < values["chance", "loss"]
    assert next(e for e in result.effects if e["metric"] == "accuracy")["p"] < 0.01
    row = {"question": "7 gggggg?", "choices": ["red", "green"]}
    (answer,) = api.predict(result.path, [row])
    assert answer.probabilities is not None
    assert (answer.output, list(answer.probabilities), answer.reference) == ("green", ["red", "green"], None)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    together = api.predict(result.path, [{**row, "question": f"{n} gggggg?"} for n in range(5)] + [row])
    assert together[-1].probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    again = api.evaluate(result.path, _rows(30, 2), name="more")
    assert {r["model"] for r in again.records if r["data"] == "more"} == {"chance", "tuned"}
    with pytest.raises(InputError, match="a question about a text is no question and choices to be read"):
        api.predict(result.path, [{"question": "Who?", "context": "Ada."}])
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "pipeline_tag: multiple-choice" in card
    assert "A model that chooses among answers, made from" in card
    code = (
        card.split("```python\n")[2].split("```")[0].replace('"path/to/this/folder"', repr(str(result.path / "model")))
    )
    capsys.readouterr()
    exec(code.replace('"...", ["...", "..."]', f"{row['question']!r}, {row['choices']!r}"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "green"
    assert cli.main(["chat", str(result.path), "--prompt", "Who?"]) == 2


def test_a_frozen_base_is_read_by_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = {"model": str(tiny_bert), "objective": "multiple_choice", "method": "head", "train": {"max_steps": 3}}
    run = api.train(recipe, data={"train": _rows(20), "test": _rows(6, 1)}, out=tmp_path / "run").path
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > rows[2]["loss"] > 0


@pytest.mark.parametrize(("metric", "fits"), [("macro_f1", False), ("exact_match", False), ("brier", True)])
def test_choices_are_no_classes(metric: str, fits: bool, tiny_bert: Path) -> None:
    """Each row has texts of its own to choose from."""
    recipe = {"model": str(tiny_bert), "objective": "multiple_choice", "method": "head", "train": {"max_steps": 1}}
    data = {"train": _rows(20), "test": _rows(6, 1)}
    if fits:
        assert api.plan({**recipe, "evaluate": {"metrics": [metric]}}, data=data).metrics == [metric]
        return
    with pytest.raises(InputError, match=f"{metric} is of .*, and the answer to .* is of choices of each row's own"):
        api.plan({**recipe, "evaluate": {"metrics": [metric]}}, data=data)


@pytest.mark.data
def test_questions_of_a_bias_benchmark(data_sets: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """BBQ has no training rows: a model of other questions is asked some of it."""
    recipe = {"model": str(tiny_bert), "objective": "multiple_choice", "method": "lora", "train": {"max_steps": 1}}
    run = api.train(recipe, data={"train": _rows(20)}, out=tmp_path / "run").path
    lines = (data_sets / "bbq_slice" / "test.jsonl").read_text(encoding="utf-8").splitlines()[::60]
    result = api.evaluate(run, [json.loads(line) for line in lines], name="bbq")
    values = {(r["model"], r["metric"]): (r["value"], r["n"]) for r in result.records}
    assert values["chance", "loss"] == (pytest.approx(np.log(3)), 24)
    assert 0 <= values["tuned", "accuracy"][0] <= 1
