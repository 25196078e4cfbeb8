"""What a run leaves in model/ is loaded as it is by PEFT, and answers as tunesmith does."""

from __future__ import annotations

from pathlib import Path

import torch

from tunesmith import api

ROWS = 50


def test_peft_gives_the_same_greedy_answers(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"Colour of {i}?", "completion": ("red", "green", "blue")[i % 3]} for i in range(60)]
    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": "lora",
        "train": {"epochs": 2, "learning_rate": 1e-2},
        "precision": "fp32",  # the base is loaded in fp32 below
        "evaluate": {"max_new_tokens": 8},
    }
    result = api.train(
        recipe, data={"train": rows, "test": [{"prompt": "Which?", "completion": "red"}]}, out=tmp_path / "r"
    )
    questions = [f"Colour of {100 + i} {'now' * (i % 4)}?" for i in range(ROWS)]
    ours = [answer.output for answer in api.predict(result.path, [{"prompt": q} for q in questions], max_new_tokens=8)]
    tokenizer = AutoTokenizer.from_pretrained(result.path / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(result.path / "model")).eval()
    theirs: list[str] = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        theirs.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(ours)) > 1
    assert ours == theirs
