"""TRL's SFTTrainer with PEFT and liger-kernel on the benchmark's work; prints one line of JSON."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import peers
import torch
import workload
from marks import Marks
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = peers.arguments()
    parser.add_argument("--half", action="store_true", help="weights that train are in bf16, with no master in fp32")
    asked = parser.parse_args()
    shape = workload.SHAPES[asked.shape]
    full = asked.method == "full"
    dtype = torch.float32 if full and not asked.half else torch.bfloat16
    model = workload.build(shape, dtype, attn_implementation="sdpa")
    chosen = workload.lengths(asked.rows, asked.tokens, asked.steps, asked.lengths)
    adapter = LoraConfig(
        r=workload.RANK,
        lora_alpha=2 * workload.RANK,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    clock = peers.Clock(Marks(asked.warm_up))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(use_liger_kernel=True, **peers.settings(asked, Path(folder), len(chosen[0]))),
            train_dataset=peers.dataset(shape, chosen),
            processing_class=peers.tokenizer(shape),
            peft_config=None if full else adapter,
            callbacks=[clock],
        )
        trainer.train()
    weights = ", weights in bf16" if asked.half else ""
    named = f"TRL + liger{', full' if full else ''}{weights}, {'no recompute' if asked.no_recompute else 'defaults'}"
    print(
        json.dumps(
            {
                "name": named,
                **peers.told(asked, shape, clock, chosen),
                "trained": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
                "versions": {name: version(name) for name in ("trl", "liger-kernel", "peft", "transformers")},
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
