"""What the contestants that train with TRL's trainer share: rows, tokenizer, settings, the clock."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import workload
from datasets import Dataset
from marks import Marks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback


class Clock(TrainerCallback):
    """Marks each optimizer step; the logged losses."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.end()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def tokenizer(shape: dict[str, Any]) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(shape["vocab_size"] - 1)} | {"[PAD]": shape["vocab_size"] - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="[PAD]", eos_token="w1"
    )


def dataset(shape: dict[str, Any], chosen: list[list[int]]) -> Dataset:
    rows = [
        ids.tolist() for step, part in enumerate(chosen) for ids in workload.examples(part, shape["vocab_size"], step)
    ]
    return Dataset.from_dict({"input_ids": rows})


def settings(asked: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Of SFTConfig, for `rows` examples a step."""
    return {
        "output_dir": str(folder),
        "max_steps": asked.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,  # Unsloth's default is 2, of which a step would be counted as half
        "learning_rate": workload.LEARNING_RATES[asked.method],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **({"gradient_checkpointing": False} if asked.no_recompute else {}),
    }


def told(asked: argparse.Namespace, shape: dict[str, Any], clock: Clock, chosen: list[list[int]]) -> dict[str, Any]:
    """What a contestant prints of its run, beside its name and versions."""
    return {
        "rows": asked.rows,
        "shape": asked.shape,
        **clock.marks.numbers(shape, chosen, asked.method),
        "losses": [round(loss, 4) for loss in clock.losses[:3] + clock.losses[-1:]],
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--shape", choices=list(workload.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", default="4096")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--no-recompute", action="store_true")
    return parser
