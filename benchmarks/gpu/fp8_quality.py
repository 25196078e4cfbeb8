"""A frozen base in fp8 against bf16: validation loss along the same LoRA run on CLINC150, by SmolLM2-135M-Instruct.

    python benchmarks/gpu/fp8_quality.py FOLDER_OF_CLINC150 [--model smollm2-135m-instruct] [--out FP8.md]

Utterances are prompts and their intents are answers; the two runs differ in `precision` alone. Their reports, with the
curves, stay in --runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from tunesmith import api

STEPS, EVERY = 400, 40
ASK = "What is the intent of this request?\n\n"


def rows(file: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [{"prompt": ASK + row["text"], "completion": row["label"].replace("_", " ")} for row in lines]


def losses(precision: str, asked: argparse.Namespace) -> dict[int, float]:
    """Validation loss by step."""
    recipe = {
        "model": asked.model,
        "objective": "sft",
        "method": {"name": "lora", "rank": 16},
        "precision": precision,
        "train": {"max_steps": STEPS, "batch_size": 32, "evaluate_every": EVERY, "save_every": STEPS},
        "place": {"device": "cuda"},
        "evaluate": {"limit": 200, "base": False},
    }
    data = {split: rows(asked.folder / f"{split}.jsonl") for split in ("train", "validation")}
    run = api.train(recipe, data=data, out=asked.runs / precision)
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "FP8.md")
    asked = parser.parse_args()
    whole, fewer = losses("bf16", asked), losses("fp8", asked)
    lines = [
        "# Validation loss on CLINC150 with the frozen base in bf16 and in fp8\n",
        f"Made by `benchmarks/gpu/fp8_quality.py` on {datetime.date.today()}; {torch.cuda.get_device_name()}, torch "
        f"{torch.__version__}. SmolLM2-135M-Instruct, LoRA r=16, the same rows in the same order.\n",
        "| step | bf16 | fp8 | fp8 to bf16 |",
        "|---:|---:|---:|---:|",
        *(f"| {n} | {whole[n]:.4f} | {fewer[n]:.4f} | {fewer[n] / whole[n] - 1:+.2%} |" for n in whole),
    ]
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
