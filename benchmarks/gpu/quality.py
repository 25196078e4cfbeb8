"""What fewer bits cost: validation loss along the same run on CLINC150, by SmolLM2-135M-Instruct.

    python benchmarks/gpu/quality.py FOLDER_OF_CLINC150 [--model smollm2-135m-instruct] [--only lora] [--out QUALITY.md]

LoRA with the frozen base in bf16 and in fp8, and full fine-tuning by AdamW in float32 and in 8 bits. Utterances are
prompts and their intents are answers; the runs of a pair see the same rows in the same order. Their reports, with the
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

STEPS, EVERY, HELD = 300, 50, 600  # steps, between two validations, rows of one
ASK = "What is the intent of this request?\n\n"
PAIRS = {  # a method -> what two runs differ in, the one with more bits first
    "lora": {"base in bf16": "precision=bf16", "base in fp8": "precision=fp8"},
    "full": {"adamw": "optimizer=adamw", "adamw_8bit": "optimizer=adamw_8bit"},
}


def rows(file: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [{"prompt": ASK + row["text"], "completion": row["label"].replace("_", " ")} for row in lines]


def losses(method: str, change: str, asked: argparse.Namespace) -> dict[int, float]:
    """Validation loss by step."""
    key, _, value = change.partition("=")
    recipe: dict[str, Any] = {
        "model": asked.model,
        "objective": "sft",
        "method": method,
        "precision": "bf16",
        "train": {"max_steps": STEPS, "batch_size": 32, "evaluate_every": EVERY, "save_every": STEPS},
        "place": {"device": "cuda"},
    }
    data = {split: rows(asked.folder / f"{split}.jsonl") for split in ("train", "validation")}
    data["validation"] = data["validation"][:: max(1, len(data["validation"]) // HELD)]
    (recipe["train"] if key == "optimizer" else recipe)[key] = value
    run = api.train(recipe, data=data, out=asked.runs / f"{method}-{value}")
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}


def table(method: str, asked: argparse.Namespace) -> list[str]:
    """One pair's curves."""
    names = list(PAIRS[method])
    more, less = (losses(method, change, asked) for change in PAIRS[method].values())
    return [
        f"## Method {method}\n",
        f"| step | {names[0]} | {names[1]} | {names[1]} to {names[0]} |",
        "|---:|---:|---:|---:|",
        *(f"| {n} | {more[n]:.4f} | {less[n]:.4f} | {less[n] / more[n] - 1:+.2%} |" for n in more),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "QUALITY.md")
    asked = parser.parse_args()
    lines = [
        "# Validation loss on CLINC150 in more and in fewer bits\n",
        f"Made by `benchmarks/gpu/quality.py` on {datetime.date.today()}; {torch.cuda.get_device_name()}, torch "
        f"{torch.__version__}. SmolLM2-135M-Instruct; the runs of a table see the same rows in the same order.\n",
    ]
    for method in [asked.only] if asked.only else PAIRS:
        lines += table(method, asked)
        asked.out.write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
