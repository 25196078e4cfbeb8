"""Tokens that a recipe adds: one token each, trained with the adapter alone, and there wherever the adapter goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api
from tunesmith.errors import InputError

ADDED = ["<call>", "</call>"]
ROWS: list[dict[str, Any]] = [{"prompt": f"colour {i}?", "completion": f"<call>c{i % 2}</call>"} for i in range(12)]


def recipe_of(folder: Path, **method: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "objective": "sft",
        "method": {"name": "lora", "rank": 4, "tokens": ADDED, **method},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 4},
    }


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("tokens") / "run"
    return api.train(recipe_of(tiny_llama), data={"train": ROWS[:8], "test": ROWS[8:]}, out=to).path


def test_the_plan_counts_their_rows_once_where_embeddings_are_tied(tiny_llama: Path) -> None:
    counted = [
        api.plan(recipe_of(tiny_llama, tokens=tokens), data={"train": ROWS}).parameters["trainable"]
        for tokens in (ADDED, [])
    ]
    assert counted[0] - counted[1] == len(ADDED) * 32


def test_peft_loads_them_on_a_base_that_is_made_as_wide(run: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("a<call>b</call>")["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == ["a", "<call>", "b", "</call>"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, str(run / "model")).eval()
    ours = api.load(run)
    policy = ours.policy
    policy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, logits, rtol=1e-4, atol=1e-4)
    rows = policy.model.get_input_embeddings().weight
    assert policy.model.get_output_embeddings().weight.equal(rows)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_llama).get_input_embeddings().weight
    assert torch.equal(rows[: len(untrained)], untrained)
    moved = rows[len(untrained) :] - untrained.mean(0)
    assert bool((moved.abs().amax(1) > 1e-3).all())
    with ours.method.reference(policy):
        torch.testing.assert_close(policy.model.get_input_embeddings().weight[-2:], untrained.mean(0).expand(2, -1))


def test_a_merged_model_has_them_too(run: Path, tmp_path: Path) -> None:
    done = api.export(run, tmp_path / "merged", merge=True)
    assert done.check is not None
    assert done.check.agreement == 1
    assert done.check.largest < 1e-4
    answers = [api.predict(folder, ROWS[8:]) for folder in (run, tmp_path / "merged")]
    assert [p.output for p in answers[0]] == [p.output for p in answers[1]]


def test_they_are_merged_beside_a_start_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 4, "init": "pissa", "tokens": list(ADDED)}
    run = api.train(recipe_of(tiny_llama) | {"method": method}, data={"train": ROWS}, out=tmp_path / "pissa").path
    done = api.export(run, tmp_path / "merged", merge=True)
    assert done.check is not None
    assert done.check.largest < 1e-4


def test_a_run_goes_on_from_one_that_has_them(run: Path, tmp_path: Path) -> None:
    recipe = recipe_of(run) | {"method": "lora"}
    assert (api.train(recipe, data={"train": ROWS}, out=tmp_path / "more").path / "model/tunesmith.json").is_file()


def test_an_output_with_a_bias_is_refused(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.methods.peft_adapter import token_rows
    from tunesmith.models.policy import Policy, Tokens

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    policy = Policy(model, "decoder", Tokens((1,), 0, (5, 3)), packed=True)
    assert token_rows(policy) == {"model.embed_tokens": [3, 5]}
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with pytest.raises(InputError, match="has a bias"):
        token_rows(policy)
