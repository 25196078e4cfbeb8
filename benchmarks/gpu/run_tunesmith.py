"""tunesmith on the benchmark's work: Policy, NativeEngine and the real objective; prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import workload
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.data.pack import collate
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.gradients.clip import Clip
from tunesmith.kernels.accelerate import accelerate
from tunesmith.methods.lora import Lora
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.sft import Sft
from tunesmith.types import Example, Piece, Step


def main() -> None:
    asked = arguments()
    shape = workload.SHAPES[asked.shape]
    began = time.perf_counter()
    policy = build(shape)
    taken = {} if asked.unfused else accelerate(policy, fp8=asked.precision == "fp8")
    objective = Sft(Sft.Options())
    optimization = Optimization(workload.LEARNING_RATE, "constant", 0.0, 0.0, asked.steps)
    engine = NativeEngine(
        policy, [{"params": [p for p in policy.parameters() if p.requires_grad]}], optimization, seed=17
    )
    clip = Clip(1.0)
    loaded = time.perf_counter() - began
    chosen = workload.lengths(asked.rows, asked.tokens, asked.steps, asked.lengths)
    batches = [batch(part, shape["vocab_size"], step) for step, part in enumerate(chosen)]
    seconds: list[float] = []
    losses: list[float] = []

    def one(index: int) -> None:
        stats = engine.forward_backward(objective, policy, Step(index + 1, [batches[index]], {}))
        clip.before_step(engine, index + 1)
        engine.step()
        losses.append(stats.loss)

    for index in range(asked.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        one(index)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if index == asked.warm_up - 1:
            torch.cuda.reset_peak_memory_stats()
    timed, tokens = seconds[asked.warm_up :], [sum(part) for part in chosen[asked.warm_up :]]
    work = sum(workload.flop(shape, part) for part in chosen[asked.warm_up :])
    print(
        json.dumps(
            {
                "name": f"tunesmith {asked.precision}" + (" unfused" if asked.unfused else ""),
                "rows": asked.rows,
                "tokens_per_second": round(sum(tokens) / sum(timed)),
                "share_of_peak": round(work / sum(timed) / workload.PEAK, 4),
                "step_ms": round(1e3 * sorted(timed)[len(timed) // 2], 1),
                "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
                "first_step_s": round(seconds[0], 2),
                "load_s": round(loaded, 2),
                "losses": [round(loss, 4) for loss in losses[:3] + losses[-1:]],
                "steps": asked.steps,
                "warm_up": asked.warm_up,
                "tokens_per_step": round(sum(tokens) / len(tokens)),
                "kernels": taken,
                "torch": torch.__version__,
                "card": torch.cuda.get_device_name(),
            }
        ),
        flush=True,
    )
    if asked.profile:
        profile(lambda: one(asked.steps - 1), asked.profile)


def build(shape: dict[str, Any]) -> Policy:
    torch.manual_seed(workload.SEED)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    policy = Policy(model, "decoder", Tokens((), 0), packed=True, autocast=torch.bfloat16)
    Lora(Lora.Options(rank=workload.RANK), 0.0).attach(policy)
    return policy


def batch(part: list[int], vocabulary: int, step: int) -> Any:
    rows = workload.examples(part, vocabulary, step)
    pieces = [Example((Piece(ids, (ids >= 0).astype("float32")),)) for ids in rows]
    return collate(pieces, range(len(pieces)), packed=True, pad_id=0)


def profile(work: Any, to: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    to.write_text(seen.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=110))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--shape", choices=list(workload.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", default="4096", help="length of every example, or mixture")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--unfused", action="store_true", help="without our kernels")
    parser.add_argument("--profile", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
