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
from marks import Marks

from tunesmith.data.pack import collate
from tunesmith.engine.native import OPTIMIZERS, NativeEngine, Optimization
from tunesmith.gradients.clip import Clip
from tunesmith.kernels.accelerate import accelerate
from tunesmith.kernels.nf4 import hold_in_nf4
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy, Tokens
from tunesmith.models.recompute import recompute
from tunesmith.objectives.sft import Sft
from tunesmith.types import Example, Piece, Step


def main() -> None:
    asked = arguments()
    if asked.gib:
        torch.cuda.set_per_process_memory_fraction(asked.gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    shape = workload.SHAPES[asked.shape]
    began = time.perf_counter()
    policy = build(shape, asked)
    taken = (
        {}
        if asked.unfused
        else accelerate(policy, fp8=asked.precision == "fp8", compiled=layers(policy.model).values())
    )
    recompute(policy.model, asked.again, asked.recompute)
    objective = Sft(Sft.Options())
    rate = workload.LEARNING_RATES[asked.method]
    optimization = Optimization(rate, "constant", 0.0, 0.0, asked.steps, asked.optimizer)
    engine = NativeEngine(
        policy, [{"params": [p for p in policy.parameters() if p.requires_grad]}], optimization, seed=17
    )
    clip = Clip(1.0)
    loaded = time.perf_counter() - began
    chosen = workload.lengths(asked.rows, asked.tokens, asked.steps, asked.lengths)
    steps = [batches(part, shape["vocab_size"], step, asked.micro_batches) for step, part in enumerate(chosen)]
    marks = Marks(asked.warm_up)
    losses: list[float] = []
    late: list[Any] = []

    def one(index: int) -> None:
        stats = engine.forward_backward(objective, policy, Step(index + 1, steps[index], {}))
        norm = clip.before_step(engine, index + 1)["grad_norm"]
        engine.step()
        late.append((stats, norm))
        look(up_to=1)  # as a run does: at the step before, while the device is at this one

    def look(up_to: int) -> None:
        while len(late) > up_to:
            stats, norm = late.pop(0)
            losses.append(stats.loss)
            float(norm)

    half = "the feed-forward half of " if asked.again == "feed" else ""
    away = " from the host's memory" if asked.again == "away" else ""
    recomputed = f", {half}{asked.recompute} layers recomputed{away}" if asked.recompute else ""
    recomputed += f", {asked.micro_batches} micro-batches" if asked.micro_batches > 1 else ""
    unfused = ", unfused" if asked.unfused else ""
    method = ", full" if asked.method == "full" else ""
    method += ", adamw_8bit" if asked.optimizer == "adamw_8bit" else ""
    marks.begin()
    for index in range(asked.steps):
        one(index)
        marks.end()
    look(up_to=0)
    print(
        json.dumps(
            {
                "name": f"tunesmith {asked.precision}{method}{recomputed}{unfused}",
                "rows": asked.rows,
                "shape": asked.shape,
                **marks.numbers(shape, chosen, asked.method),
                "load_s": round(loaded, 2),
                "losses": [round(loss, 4) for loss in losses[:3] + losses[-1:]],
                "kernels": taken,
            }
        ),
        flush=True,
    )
    if asked.profile:
        profile(lambda: one(asked.steps - 1), asked.profile)


def build(shape: dict[str, Any], asked: argparse.Namespace) -> Policy:
    full = asked.method == "full"
    whole = full and asked.optimizer == "adamw"
    model = workload.build(shape, torch.float32 if whole else torch.bfloat16)
    if asked.precision == "int4":
        hold_in_nf4(model, "cuda")
        torch.cuda.empty_cache()
    policy = Policy(model, "decoder", Tokens((), 0), packed=True, autocast=torch.bfloat16)
    chosen = Full(Full.Options(), 0.0) if full else Lora(Lora.Options(rank=workload.RANK), 0.0)
    chosen.attach(policy)
    return policy


def batches(part: list[int], vocabulary: int, step: int, micro_batches: int) -> list[Any]:
    rows = workload.examples(part, vocabulary, step)
    pieces = [Example((Piece(ids, (ids >= 0).astype("float32")),)) for ids in rows]
    size = -(-len(pieces) // micro_batches)
    parts = [pieces[at : at + size] for at in range(0, len(pieces), size)]
    return [collate(each, range(len(each)), packed=True, pad_id=0) for each in parts]


def profile(work: Any, to: Path) -> None:
    """Kernels by time, and where the device stood idle, into a file."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        work()
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=110)
    events = sorted(
        (e for e in seen.events() or [] if e.device_type == torch.profiler.DeviceType.CUDA),
        key=lambda e: e.time_range.start,
    )
    free = events[0].time_range.start
    gaps: list[tuple[float, str, str]] = []
    before = ""
    for event in events:
        gaps.append((event.time_range.start - free, before, event.name))
        free, before = max(free, event.time_range.end), event.name
    lines = [f"{len(events)} on the device in {(free - events[0].time_range.start) / 1e3:.1f} ms (two steps),"]
    lines.append(f"idle {sum(max(0.0, gap) for gap, *_ in gaps) / 1e3:.1f} ms; the longest:")
    lines += [f"{gap / 1e3:.2f} ms: {a[:60]} .. {b[:60]}" for gap, a, b in sorted(gaps, reverse=True)[:25]]
    to.write_text("\n".join(lines) + "\n\n" + table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["bf16", "fp8", "int4"], default="bf16")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--shape", choices=list(workload.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", default="4096", help="length of every example, or mixture")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--recompute", type=int, default=0, help="so many layers run again in the backward")
    parser.add_argument("--again", choices=["feed", "whole", "away"], default="whole", help="what of them does")
    parser.add_argument("--micro-batches", type=int, default=1, help="that a step's examples come in")
    parser.add_argument("--gib", type=float, help="as a card of so many GiB would run it")
    parser.add_argument("--unfused", action="store_true", help="without our kernels")
    parser.add_argument("--profile", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
