"""What a run leaves in model/ is loaded as it is by PEFT, and answers as tunesmith does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api, demo
from tunesmith.models.fetch import resolve

ROWS = 50


def answers_of_peft(base: Path, model: Path, chats: list[list[dict[str, str]]], tokens: int) -> list[str]:
    """Greedy answers by PEFT and transformers alone, one conversation at a time, in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(model))
    loaded.eval()
    found: list[str] = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = loaded.generate(**ids, max_new_tokens=tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_peft_gives_the_same_greedy_answers(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Colour of {i}?", "completion": ("red", "green", "blue")[i % 3]} for i in range(60)]
    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": "lora",
        "train": {"epochs": 2, "learning_rate": 1e-2},
        "precision": "fp32",  # the base is loaded in fp32 above
        "evaluate": {"max_new_tokens": 8},
    }
    result = api.train(
        recipe, data={"train": rows, "test": [{"prompt": "Which?", "completion": "red"}]}, out=tmp_path / "r"
    )
    questions = [f"Colour of {100 + i} {'now' * (i % 4)}?" for i in range(ROWS)]
    ours = [answer.output for answer in api.predict(result.path, [{"prompt": q} for q in questions], max_new_tokens=8)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    assert len(set(ours)) > 1
    assert ours == answers_of_peft(tiny_llama, result.path / "model", chats, 8)


@pytest.mark.slow
def test_peft_gives_the_same_greedy_answers_on_a_real_base(model_cache: Path, tmp_path: Path) -> None:
    """smollm2-135m-instruct, half trained on the demo's rows, so that its answers are not all of one form."""
    rows = demo.rows(quick=False)
    recipe: dict[str, Any] = {
        **demo.recipe(quick=False),
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3},
        "precision": "fp32",
        "evaluate": {"base": False, "limit": 1, "max_new_tokens": 48},
    }
    result = api.train(recipe, data={"train": rows["train"], "test": rows["test"]}, out=tmp_path / "r")
    chats = [row["messages"][:-1] for row in rows["test"][:ROWS]]
    ours = [answer.output for answer in api.predict(result.path, [{"messages": c} for c in chats], max_new_tokens=48)]
    assert len(set(ours)) > 5
    assert ours == answers_of_peft(resolve(recipe["model"]).folder, result.path / "model", chats, 48)
