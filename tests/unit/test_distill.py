"""A student against its teacher: the loss written out, what is kept, what is refused, and whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.shrinking import shrink
from tunesmith.types import Example

COLOURS = ("red", "green", "blue")
ROWS = [{"prompt": f"colour {i}?", "completion": COLOURS[i % 3]} for i in range(18)]
HELD = [{"prompt": f"which colour is {i}?", "completion": COLOURS[i % 3]} for i in range(6)]


def recipe(model: Path, teacher: Path | None, **objective: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        **({"teacher": str(teacher)} if teacher else {}),
        "objective": {"name": "distill", **objective},
        "method": "full",
        "train": {"max_steps": 3, "batch_size": 6, "learning_rate": 1e-3},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 4},
    }


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows the colours somewhat."""
    asked = recipe(tiny_llama, None) | {"objective": "sft", "method": {"name": "lora", "rank": 8}}
    asked["train"] = {"max_steps": 30, "batch_size": 18, "learning_rate": 0.02}
    return api.train(asked, data={"train": ROWS}, out=tmp_path_factory.mktemp("teacher") / "run").path


@pytest.fixture(scope="module")
def student(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shrink(str(tiny_llama), 1, tmp_path_factory.mktemp("student") / "model").path


def by_hand(student: Any, teacher: Any, examples: list[Example], options: dict[str, Any]) -> dict[str, float]:
    """The parts of the loss from whole logits of plain models, one sequence at a time."""
    share, heat = options.get("teacher_share", 0.5), options.get("temperature", 1.0)
    nll, apart, angle, count = 0.0, 0.0, 0.0, 0
    for example in examples:
        (piece,) = example.pieces
        ids = torch.from_numpy(piece.input_ids_T).long()[None]
        assert piece.weights_T is not None
        trained = [t for t in range(1, ids.shape[1]) if piece.weights_T[t] > 0]
        with torch.no_grad():
            out, other = (m(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
        q, p = ((o.logits[0] / heat).log_softmax(-1) for o in (out, other))
        for t in trained:
            nll -= float(out.logits[0, t - 1].log_softmax(-1)[ids[0, t]])
            apart += heat**2 * float(divided(p[t - 1], q[t - 1], options))
            states = [o.hidden_states[-1][0, t - 1] for o in (out, other)]
            angle += 1 - float(torch.cosine_similarity(*states, 0))
            count += 1
    return {
        "nll": (1 - share) * nll / count,
        "divergence": share * apart / count,
        "hidden": options.get("hidden", 0.0) * angle / count,
    }


def divided(p: Tensor, q: Tensor, options: dict[str, Any]) -> Tensor:
    if k := options.get("top_k"):
        top = p.topk(k).indices
        p, q = ((torch.cat([x[top].exp(), 1 - x[top].exp().sum(0, keepdim=True)])).log() for x in (p, q))
    if options.get("divergence", "forward_kl") == "reverse_kl":
        p, q = q, p
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "reverse_kl", "temperature": 2.0, "teacher_share": 1.0},
        {"top_k": 5, "teacher_share": 0.7, "temperature": 1.5},
        {"hidden": 0.3},
    ],
    ids=str,
)
def test_the_first_loss_is_the_one_written_by_hand(
    options: dict[str, Any], teacher: Path, student: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    asked = recipe(student, teacher, **options)
    asked["train"] |= {"max_steps": 1, "batch_size": len(ROWS), "micro_batch_size": 5}
    result = api.train(asked, data={"train": ROWS, "validation": HELD}, out=tmp_path / "run")
    whole = tmp_path / "teacher"
    api.export(teacher, whole, merge=True)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (student, whole)]
    _, assets = api._planned(*api.read_recipe(asked, (), {"train": ROWS, "validation": HELD}), lambda *_: None)  # pyright: ignore[reportPrivateUsage]
    store = assets.prepared.train
    expected = by_hand(*models, [store.example(i) for i in range(len(store))], options)
    first = json.loads((result.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(sum(expected.values()), rel=1e-4)


def test_a_student_is_measured_by_its_answers_alone_and_loads_without_its_teacher(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    asked = recipe(student, moved)
    result = api.train(asked, data={"train": ROWS, "test": HELD}, out=tmp_path / "run")
    shutil.rmtree(moved)
    assert {r["metric"] for r in result.records} >= {"exact_match", "loss", "perplexity"}
    tuned = result.record("loss")["value"]
    assert tuned < result.record("loss", model="base")["value"]
    again = api.predict(result.path, HELD)
    assert sum(p.scores["nll"] for p in again) / sum(p.scores["tokens"] for p in again) == pytest.approx(tuned)
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["teacher"]["name"] == str(moved)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}], ids=str)
def test_micro_batches_and_padded_rows_change_nothing(
    options: dict[str, Any], teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[list[float]] = []
    for name, size, packs in (("a", 6, True), ("b", 2, True), ("c", 3, False)):
        asked = recipe(student, teacher, **options)
        asked["train"]["micro_batch_size"] = size
        with monkeypatch.context() as patch:
            if not packs:  # the student alone: the teacher's run says of itself that it packs
                patch.setattr("tunesmith.facts.is_packable", lambda meta: False)
            path = api.train(asked, data={"train": ROWS}, out=tmp_path / name).path
        losses.append([json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_teacher_may_be_a_plain_base(tiny_llama: Path, student: Path, tmp_path: Path) -> None:
    asked = recipe(student, tiny_llama, teacher_share=1.0)
    planned = api.plan(asked, data={"train": ROWS})
    assert planned.teacher is not None
    assert planned.teacher["base"] == str(tiny_llama)
    path = api.train(asked, data={"train": ROWS}, out=tmp_path / "run").path
    losses = [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_what_cannot_be_a_teacher_is_refused_before_weights_load(
    tiny_llama: Path, tiny_bert: Path, tiny_t5: Path, teacher: Path, student: Path, tmp_path: Path
) -> None:
    def refused(asked: dict[str, Any], cause: str) -> None:
        with pytest.raises(InputError, match=cause):
            api.plan(asked, data={"train": ROWS})

    refused(recipe(student, None), "the recipe names none")
    refused(recipe(student, teacher) | {"objective": "sft"}, "learns from the rows alone")
    refused(recipe(student, tiny_t5), "is of kind encoder-decoder")
    refused(recipe(student, teacher, beta=0.3), "beta is the mixture of jsd")
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(described))
    refused(recipe(student, other), "has another tokenizer")
    asked = recipe(tiny_bert, None) | {"objective": "classify", "method": "head"}
    del asked["evaluate"]
    rows = [{"text": f"{i}", "label": COLOURS[i % 2]} for i in range(8)]
    classifier = api.train(asked, data={"train": rows}, out=tmp_path / "classifier").path
    refused(recipe(student, classifier), "tells no token's probability")


def test_hidden_states_of_two_widths_are_not_compared(teacher: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    narrow = tmp_path / "narrow"
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.head_dim = 16, 4
    LlamaForCausalLM(config).save_pretrained(narrow)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(narrow)
    with pytest.raises(InputError, match="32 numbers wide in the teacher and 16"):
        api.train(recipe(narrow, teacher, hidden=1.0), data={"train": ROWS}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
