"""TRL's SFTTrainer with PEFT and liger-kernel on the benchmark's work; prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import workload
from datasets import Dataset
from marks import Marks
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


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


def main() -> None:
    asked = arguments()
    shape = workload.SHAPES[asked.shape]
    torch.manual_seed(workload.SEED)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16, attn_implementation="sdpa")
    chosen = workload.lengths(asked.rows, asked.tokens, asked.steps, asked.lengths)
    rows = [
        ids.tolist() for step, part in enumerate(chosen) for ids in workload.examples(part, shape["vocab_size"], step)
    ]
    words = {f"w{i}": i for i in range(shape["vocab_size"] - 1)} | {"[PAD]": shape["vocab_size"] - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="[PAD]", eos_token="w1"
    )
    clock = Clock(Marks(asked.warm_up))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=asked.steps,
            per_device_train_batch_size=len(chosen[0]),
            learning_rate=workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=True,
            disable_tqdm=True,
            use_liger_kernel=True,
            train_sampling_strategy="sequential",
            **({"gradient_checkpointing": False} if asked.no_recompute else {}),
        )
        adapter = LoraConfig(
            r=workload.RANK,
            lora_alpha=2 * workload.RANK,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[clock],
        )
        trainer.train()
    dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    print(
        json.dumps(
            {
                "name": "TRL + liger" + (", no recompute" if asked.no_recompute else ", defaults"),
                "rows": asked.rows,
                **clock.marks.numbers(shape, chosen),
                "losses": [round(loss, 4) for loss in clock.losses[:3] + clock.losses[-1:]],
                "adapters": sorted(dtypes),
                "versions": {name: version(name) for name in ("trl", "liger-kernel", "peft", "transformers")},
            }
        ),
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(workload.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", default="4096")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--no-recompute", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
