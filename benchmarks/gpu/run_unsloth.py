"""Unsloth with TRL's SFTTrainer on the benchmark's work; prints one line of JSON."""

from __future__ import annotations

# Unsloth patches what is imported behind it.
from unsloth import FastLanguageModel  # isort: skip

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peers
import torch
import workload
from marks import Marks
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = peers.arguments()
    parser.add_argument("--four-bits", action="store_true")
    asked = parser.parse_args()
    shape = workload.SHAPES[asked.shape]
    chosen = workload.lengths(asked.rows, asked.tokens, asked.steps, asked.lengths)
    clock = peers.Clock(Marks(asked.warm_up))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        workload.build(shape, torch.bfloat16).save_pretrained(base)
        peers.tokenizer(shape).save_pretrained(base)
        torch.cuda.empty_cache()
        model, tokenizer = loaded(asked, base)
        trainer = SFTTrainer(
            model,
            SFTConfig(optim="adamw_torch_fused", **peers.settings(asked, Path(folder) / "run", len(chosen[0]))),
            train_dataset=peers.dataset(shape, chosen),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    named = f"Unsloth{', full' if asked.method == 'full' else ''}{', 4 bits' if asked.four_bits else ''}"
    print(
        json.dumps(
            {
                "name": f"{named}, {'no recompute' if asked.no_recompute else 'defaults'}",
                **peers.told(asked, shape, clock, chosen),
                "trained": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
                "versions": {name: version(name) for name in ("unsloth", "trl", "peft", "transformers")},
            }
        ),
        flush=True,
    )


def loaded(asked: argparse.Namespace, base: Path) -> tuple[Any, Any]:
    """Model and tokenizer as Unsloth loads them, with adapters or to be trained in full."""
    recompute: Any = False if asked.no_recompute else "unsloth"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=asked.tokens if asked.rows == "mixture" else int(asked.rows),
        dtype=torch.bfloat16,
        load_in_4bit=asked.four_bits,
        full_finetuning=asked.method == "full",
        use_gradient_checkpointing=recompute,
    )
    if asked.method == "lora":
        model = FastLanguageModel.get_peft_model(
            model,
            r=workload.RANK,
            lora_alpha=2 * workload.RANK,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing=recompute,
        )
    return model, tokenizer


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
