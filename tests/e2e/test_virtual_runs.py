"""Runs whose virtual tokens train: planned, trained, loaded, gone on with, chatted with and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith import api, loaded
from tunesmith.errors import InputError

METHODS = ("prompt", "p_tuning", "prefix")
ROWS = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(24)]
ROWS, HELD = ROWS[:20], ROWS[20:]
LABELLED = [{"text": f"a {('red', 'green')[i % 2]} {i}", "label": ("red", "green")[i % 2]} for i in range(40)]
LABELLED, ASKED = LABELLED[:20], LABELLED[20:]


def recipe(model: Path | str, method: str, **options: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "sft",
        "method": {"name": method, "virtual_tokens": 4, **options},
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.05},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"limit": 4, "max_new_tokens": 4},
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_loaded_as_it_was_measured_and_goes_on(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    data = {"train": ROWS, "test": HELD}
    first = api.train(recipe(tiny_llama, method), data=data, out=tmp_path / "first")
    measured = {r["metric"]: r["value"] for r in first.records if r["model"] == "tuned" and r["group"] == "all"}
    again = loaded.load(first.path)
    answers = again.predict(HELD)
    nll = sum(a.scores["nll"] for a in answers) / sum(a.scores["tokens"] for a in answers)
    assert nll == pytest.approx(measured["loss"], rel=1e-6)
    assert again.card["context_length"] == 512 - 4
    asked = recipe(first.path, method)
    asked["method"] = method
    second = api.train(asked, data=data, out=tmp_path / "second")
    before, after = (load_file(p / "model" / "adapter_model.safetensors") for p in (first.path, second.path))
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    assert not before["prompt_embeddings"].equal(after["prompt_embeddings"])
    assert api.chat(first.path, max_new_tokens=3).ask("colour 1?").tokens <= 3
    with pytest.raises(InputError, match="no adapter that could be merged"):
        api.export(first.path, tmp_path / "merged", merge=True)
    with pytest.raises(InputError, match=f"one whole model, and method {method} cannot be merged into its base"):
        api.export(first.path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    exported = api.export(first.path, tmp_path / "copy")
    assert load_file(exported.path / "adapter_model.safetensors")["prompt_embeddings"].equal(
        before["prompt_embeddings"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_learns_labels_with_them(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_bert, method) | {"objective": "classify", "evaluate": {"metrics": ["accuracy"]}}
    asked["train"] = {"max_steps": 40, "batch_size": 10, "learning_rate": 0.02}
    result = api.train(asked, data={"train": LABELLED, "test": ASKED}, out=tmp_path / "run")
    found = {r["metric"]: r["value"] for r in result.records if r["model"] == "tuned" and r["group"] == "all"}
    assert found["accuracy"] >= 0.9
    assert [a.output for a in loaded.load(result.path).predict([{"text": r["text"]} for r in ASKED])].count(
        "red"
    ) == pytest.approx(10, abs=2)


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_count_against_the_context(method: str, tiny_llama: Path) -> None:
    planned = api.plan(recipe(tiny_llama, method), data={"train": ROWS})
    assert planned.training.sequence_length == 512 - 4
    too_long = recipe(tiny_llama, method)
    too_long["train"]["sequence_length"] = 510
    with pytest.raises(InputError, match="sees 512 tokens, 4 of them virtual") as refused:
        api.plan(too_long, data={"train": ROWS})
    assert "508 or less" in str(refused.value.remedy)
    with pytest.raises(InputError, match="puts 512 tokens before each text"):
        api.plan(recipe(tiny_llama, method, virtual_tokens=512), data={"train": ROWS})


def test_what_an_encoder_adds_to_each_text_counts_in_the_cost(tiny_bert: Path, tiny_llama: Path) -> None:
    """An encoder runs them for each text; a decoder once, for they look at nothing behind them."""

    def seconds(model: Path, tokens: int, objective: str, rows: list[dict[str, Any]]) -> float:
        asked = recipe(model, "prompt", virtual_tokens=tokens) | {"objective": objective, "evaluate": {}}
        return api.plan(asked, data={"train": rows}).prediction.seconds

    assert seconds(tiny_bert, 100, "classify", LABELLED) > 3 * seconds(tiny_bert, 1, "classify", LABELLED)
    assert seconds(tiny_llama, 100, "sft", ROWS) < 1.5 * seconds(tiny_llama, 1, "sft", ROWS)


def test_a_start_from_text_wants_a_text_of_tokens(tiny_llama: Path) -> None:
    for options in ({"init": "text"}, {"text": "sort it"}, {"init": "text", "text": ""}):
        with pytest.raises(InputError, match="belong together"):
            api.plan(recipe(tiny_llama, "prompt", **options), data={"train": ROWS})
    plan = api.plan(recipe(tiny_llama, "prompt", init="text", text="sort it"), data={"train": ROWS})
    assert plan.parameters["trainable"] == 4 * 32
