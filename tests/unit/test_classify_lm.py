"""Labels as answers of a language model: their tokens, the loss against a slow version, plans, and runs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_families import FAMILIES, tokenizer_of
from tunesmith import api, cli
from tunesmith.data.answer_choices import beginning, endings
from tunesmith.data.chat import Renderer
from tunesmith.data.pack import collate, split
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.classify_lm import ASKED, LISTED, UNLISTED, ClassifyLm
from tunesmith.types import Row, Step

LABELS = ("no", "not at all", "yes")
AROUND = ("Is it: ", "?\nSay no, not at all or yes.")
COLOURS = ("red", "green", "blue")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["a cat", "", "Straße 東京\n <think>"])
def test_a_label_behind_the_prompt_is_the_conversation(name: str, text: str) -> None:
    renderer = Renderer(tokenizer_of(name))
    prompt_T, cut = beginning(AROUND, text, LABELS, renderer)
    assert cut == 0
    for label, ids_T in zip(LABELS, endings(renderer, LABELS), strict=True):
        said = [{"role": "user", "content": text.join(AROUND)}, {"role": "assistant", "content": label}]
        whole = renderer.encode(said)
        stop = int(np.flatnonzero(whole.weights)[-1]) + 1
        assert [*prompt_T, *ids_T] == whole.input_ids[:stop].tolist()
        assert whole.weights[:stop].tolist() == [0.0] * len(prompt_T) + [1.0] * len(ids_T)
        assert ids_T[-1] in renderer.end_ids


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["chatml", "llama3", "mistral"]), st.text("ab é😀", max_size=60), st.integers(50, 120))
@example("chatml", "b  ", 50)
def test_of_a_long_text_the_end_is_cut_and_no_more_than_must_be(name: str, text: str, length: int) -> None:
    whole, renderer = Renderer(tokenizer_of(name)), Renderer(tokenizer_of(name), sequence_length=length)
    longest = max(len(ids_T) for ids_T in endings(whole, LABELS))
    full, _ = beginning(AROUND, text, LABELS, whole)
    bare, _ = beginning(AROUND, "", LABELS, whole)
    if len(bare) + longest > length:
        with pytest.raises(InputError, match=r"what is asked around a text has \d+ tokens more than"):
            beginning(AROUND, text, LABELS, renderer)
        return
    found, cut = beginning(AROUND, text, LABELS, renderer)
    assert len(found) + longest <= length
    if len(full) + longest <= length:
        assert (found.tolist(), cut) == (full.tolist(), 0)
        return
    assert cut > 0
    assert len(found) + longest > length - 6  # a character that would be halved has up to four tokens
    said = renderer.decode(found)
    assert AROUND[1] in said
    kept = said[said.index(AROUND[0]) + len(AROUND[0]) : said.index(AROUND[1])]
    assert text.startswith(kept)


def _fitted(labels: Any = LABELS, **options: Any) -> ClassifyLm:
    objective = ClassifyLm(ClassifyLm.Options(**options))
    objective.fit([Row({"text": "x", "label": label}, "f:1") for label in labels])
    return objective


def test_the_prompt_lists_labels_unless_there_are_many() -> None:
    before, after = _fitted().describe()["prompt"]
    assert f"{before}{{text}}{after}" == ASKED.replace("{labels}", "no, not at all, yes")
    many = _fitted([f"label {i}" for i in range(LISTED + 1)])
    assert "{text}".join(many.describe()["prompt"]) == UNLISTED
    own = _fitted(["{text}", "b"], prompt="{labels} or so: {text}.")
    assert own.describe() == {"labels": ["b", "{text}"], "prompt": ["b, {text} or so: ", "."]}
    again = ClassifyLm(ClassifyLm.Options())
    again.adopt(own.describe())
    assert again.describe() == own.describe()


def test_what_it_cannot_learn_is_refused() -> None:
    with pytest.raises(InputError, match="the training rows have lists of labels, and classify_lm gives"):
        ClassifyLm(ClassifyLm.Options()).fit([Row({"text": "x", "labels": ls}, "f:1") for ls in (["a"], ["b"])])
    with pytest.raises(InputError, match=r"objective.prompt has \{text\} 0 times"):
        _fitted(prompt="Which?")
    with pytest.raises(InputError, match=r"objective.prompt has \{text\} 2 times"):
        _fitted(prompt="{text} {text}")
    with pytest.raises(InputError, match="the training rows hold one label"):
        _fitted(["a", "a"])


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.text("abc \n", max_size=20), st.sampled_from(LABELS)), min_size=1, max_size=4),
    st.sampled_from(["sum", "mean"]),
    st.booleans(),
    st.booleans(),
)
def test_the_loss_is_the_softmax_over_each_label_alone(
    tiny_llama: Path, drawn: list[tuple[str, str]], score: str, packed: bool, share: bool
) -> None:
    """Each prompt with each label alone through the plain model of transformers."""
    objective, renderer = _fitted(score=score), Renderer(AutoTokenizer.from_pretrained(tiny_llama))
    examples = [objective.example(Row({"text": text, "label": label}, "f:1"), renderer) for text, label in drawn]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    policy = Policy(model, "decoder", Tokens((1,), 0), packed=packed).eval()
    policy.share_prefixes = share
    plain, wanted, right = AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), [], 0
    for (_, label), made in zip(drawn, examples, strict=True):
        prompt_T, *answers = (piece.input_ids_T.tolist() for piece in made.pieces)
        scores: list[torch.Tensor] = []
        for own in answers:
            logits_TV = plain(input_ids=torch.tensor([prompt_T + own])).logits[0].detach()
            places = range(len(prompt_T) - 1, len(prompt_T) + len(own) - 1)
            logprobs = torch.stack(
                [logits_TV[at].log_softmax(-1)[token] for at, token in zip(places, own, strict=True)]
            )
            scores.append(logprobs.sum() if score == "sum" else logprobs.mean())
        logits_K = torch.stack(scores)
        wanted.append(float(logits_K.logsumexp(0) - logits_K[LABELS.index(label)]))
        right += int(logits_K.argmax()) == LABELS.index(label)
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    terms = objective.terms(policy, batch)
    part = terms.parts["cross_entropy"]
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert part.example_U.tolist() == list(range(len(examples)))
    assert terms.metrics["accuracy"] == (right, len(examples))
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"cross_entropy": 2 * len(examples)}
    for alone in split(batch, [[i] for i in range(len(examples))], packed=packed, pad_id=0):
        again = objective.terms(policy, alone).parts["cross_entropy"].loss_U.tolist()
        assert again == pytest.approx([wanted[alone.examples[0]]], rel=1e-4, abs=1e-4)


def test_the_prompt_of_a_row_runs_once_where_it_runs_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, renderer = _fitted(), Renderer(AutoTokenizer.from_pretrained(tiny_llama))
    example = objective.example(Row({"text": "a cat", "label": "no"}, "f:1"), renderer)
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_llama), "decoder", Tokens((1,), 0), packed=True)
    ran: list[int] = []
    forward = policy._forward
    monkeypatch.setattr(policy, "_forward", lambda **kw: ran.append(kw["input_ids"].numel()) or forward(**kw))
    objective.terms(policy, collate([example], [0], packed=True, pad_id=0))
    assert ran == [sum(len(piece.input_ids_T) for piece in example.pieces)]


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(start)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        colour = draw.choice(COLOURS)
        rows.append({"text": f"{1000 * start + i} {colour[0] * 6}", "label": colour})
    return rows


def _recipe(model: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": {"name": "classify_lm", "prompt": "{text}?"},
        "method": "full",
        "precision": "fp32",
        "train": {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, **train},
    }


def test_micro_batches_and_packing_change_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[list[float]] = []
    for size, packs in ((None, True), (1, True), (3, True), (8, True), (None, False)):
        if not packs:
            monkeypatch.setattr("tunesmith.facts.is_packable", lambda meta: False)
        given = {} if size is None else {"micro_batch_size": size}
        recipe = _recipe(tiny_llama, max_steps=3, epochs=None, **given)
        plan = api.plan(recipe, data={"train": _rows(24)})
        assert (plan.placement.micro_batch_size, plan.placement.packed) == (size or 1, packs)
        run = api.train(recipe, data={"train": _rows(24)}, out=tmp_path / f"{size} {packs}").path
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("objective", ["classify", "classify_lm"])
def test_labels_that_training_never_saw_are_never_right_in_validation(
    tiny_llama: Path, tmp_path: Path, objective: str
) -> None:
    recipe = {
        **_recipe(tiny_llama, max_steps=2, epochs=None),
        "objective": objective,
        "data": {"allow": ["unknown_labels"]},
    }
    held = [*_rows(3, 1), {"text": "a new one", "label": "white"}]
    run = api.train(recipe, data={"train": _rows(24), "validation": held}, out=tmp_path / "run")
    values = {r["metric"]: r["value"] for r in run.records if (r["model"], r["group"]) == ("tuned", "all")}
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation"] for line in lines if "validation" in line][-1]
    assert last["loss"] == pytest.approx(values["loss"], rel=1e-3)
    assert last["accuracy"] == values["accuracy"] <= 0.75
    assert last["loss"] > -np.log(np.finfo(np.float32).tiny) / 4


def test_memory_counts_the_prompt_once_where_it_runs_once(tiny_llama: Path) -> None:
    plans = [
        api.plan(_recipe(tiny_llama, **given), data={"train": _rows(24)})
        for given in ({}, {"dropout": 0.1}, {"micro_batch_size": 1}, {"micro_batch_size": 2})
    ]
    predicted = [plan.prediction.tokens for plan in plans]
    assert predicted[0] == predicted[2]
    assert predicted[1] == predicted[3] == len(COLOURS) * predicted[0]


def test_a_run_beats_its_base(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"train": _rows(150), "validation": _rows(30, 2), "test": _rows(60, 1)}
    result = api.train(_recipe(tiny_llama), data=rows, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records if r["group"] == "all"}
    assert values["tuned", "accuracy"] > 0.9
    assert values["base", "accuracy"] < 0.6
    assert {"accuracy", "macro_f1", "roc_auc", "ece", "loss"} <= {metric for model, metric in values if model == "base"}
    assert next(e for e in result.effects if e["metric"] == "accuracy")["p"] < 0.01
    assert (result.path / "details.json").is_file()
    asked = [{"text": "7 gggggg"}, {"text": "8 rrrrrr"}]
    answers = api.predict(result.path, asked)
    assert [answer.output for answer in answers] == ["green", "red"]
    assert list(answers[0].probabilities or {}) == sorted(COLOURS)
    assert sum((answers[0].probabilities or {}).values()) == pytest.approx(1)
    assert api.predict(result.path, asked[1:])[0].probabilities == pytest.approx(answers[1].probabilities, abs=1e-5)
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    capsys.readouterr()
    exec(code.replace("path/to/this/folder", str(result.path / "model")).replace('"..."', '"7 gggggg"'), {})
    assert capsys.readouterr().out.splitlines()[-1] == "green"
    with pytest.raises(InputError, match="a conversation is no text to be read"):
        api.predict(result.path, [{"prompt": "Who?"}])
    exported = api.export(result.path, tmp_path / "copy")
    assert api.predict(exported.path, asked) == answers
    assert cli.main(["chat", str(result.path), "--prompt", "7 gggggg"]) == 0
    assert "green" in capsys.readouterr().out
    recipe = {**_recipe(tiny_llama), "evaluate": {"max_new_tokens": 4}}
    with pytest.raises(InputError, match="classify_lm generates nothing"):
        api.plan(recipe, data={"train": _rows(24)})
