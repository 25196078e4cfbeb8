"""One measured run of TRL's SFTTrainer for cpu_sft.py, in TRL's own environment: job file in, result file out."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from step_clock import StepClock
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

# What a user would set who wants speed without examples that see each other. Like lengths stand together already
# (`grouped_rows`): over all rows, where `group_by_length` does it within 50 batches and needs thousands of rows.
BEST = {"gradient_checkpointing": False}


class Clock(TrainerCallback):
    """Notes the time of each step, and the losses that the trainer logs."""

    def __init__(self) -> None:
        self.steps = StepClock()
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps.restart()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.tick()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Counted:
    """The trainer's own collator, which notes the tokens of each batch without and with its padding."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.padded: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        self.tokens.append(sum(len(e["input_ids"]) for e in examples))
        self.trained.append(int((batch["labels"] != -100).sum()))
        self.padded.append(batch["input_ids"].numel())
        return batch


def trainer_of(job: dict[str, Any], folder: str) -> SFTTrainer:
    best = job["system"] == "trl-best"
    settings = SFTConfig(
        output_dir=folder,
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        completion_only_loss=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=job["seed"],
        train_sampling_strategy="sequential",  # both orders are random already, and known to the other side
        **(BEST if best else {}),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["base"])
    data = Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": row["mask"]}
            for row in job["grouped_rows" if best else "ordered_rows"]
        ]
    )
    adapter = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, folder)
        clock, counted = Clock(), Counted(trainer.data_collator)
        trainer.data_collator = counted
        trainer.add_callback(clock)
        trainer.train()
    assert next(trainer.model.parameters()).dtype == torch.float32
    steps = len(clock.steps.seconds)
    return {
        "seconds": clock.steps.seconds,
        "others": clock.steps.others,
        "tokens": counted.tokens[:steps],
        "trained_tokens": counted.trained[:steps],
        "padded_tokens": counted.padded[:steps],
        "losses": clock.losses,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "settings": {
            key: str(getattr(trainer.args, key))
            for key in ("gradient_checkpointing", "train_sampling_strategy", "packing", "padding_free", "loss_type")
        }
        | {"optim": str(trainer.args.optim), "attention": trainer.model.config._attn_implementation},
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft", "datasets")},
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
