"""One measured run of tunesmith for cpu_sft.py: job file in, result file out."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_clock import StepClock

from tunesmith.data.source import Batching, DataSource, ExampleList
from tunesmith.engine.native import NativeEngine, Optimization, seed_step
from tunesmith.gradients.clip import Clip
from tunesmith.kernels.accelerate import accelerate
from tunesmith.loop import train
from tunesmith.methods.lora import Lora
from tunesmith.models.fetch import resolve
from tunesmith.models.load import load_backbone
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.sft import Sft
from tunesmith.settings import MICRO_TOKENS
from tunesmith.types import Example, Piece, Step, StepStats


class Clock:
    """A watch that notes the time, the loss and the tokens of each step."""

    def __init__(self) -> None:
        self.steps = StepClock()
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def record(self, step: Step, stats: StepStats, columns: dict[str, float]) -> None:
        self.losses.append(stats.loss)
        self.tokens.append(stats.tokens)

    def finished(self, step: Step) -> bool:
        self.steps.tick()
        return False


def example(row: dict[str, list[int]]) -> Example:
    return Example((Piece(np.array(row["input_ids"], np.int32), np.array(row["mask"], np.float32)),))


def policy_of(job: dict[str, Any]) -> Policy:
    policy = Policy(
        load_backbone(resolve(job["model"]), "fp32", "lm"), "decoder", Tokens((job["pad"],), job["pad"]), packed=True
    )
    policy.share_prefixes = job["system"] != "tunesmith-unshared"
    seed_step(job["seed"], 0)
    Lora(Lora.Options(rank=job["rank"], alpha=job["alpha"]), 0.0).attach(policy)
    accelerate(policy)
    return policy


def loss_on(policy: Policy, engine: NativeEngine, rows: list[Example], pad: int) -> float:
    """The loss of one step before any training; the gradient is thrown away."""
    source = DataSource(
        ExampleList(rows), Batching(1, 1, len(rows), None, None, 1 << 40), seed=0, packed=True, pad_id=pad
    )
    return engine.forward_backward(Sft(None), policy, next(iter(source.steps(policy)))).loss


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    policy = policy_of(job)
    rows = [example(row) for row in job["rows"]]
    rate = Optimization(job["learning_rate"], "constant", 0, 0.0, job["steps"])
    groups = [{"params": [p for p in policy.parameters() if p.requires_grad]}]
    engine = NativeEngine(policy, groups, rate, seed=job["seed"])
    batching = Batching(None, job["steps"], job["batch_size"], None, None, MICRO_TOKENS["cpu"])
    source = DataSource(ExampleList(rows), batching, seed=job["seed"], packed=True, pad_id=job["pad"])
    grouped = [example(row) for row in job["grouped_rows"][: job["batch_size"]]]
    on_grouped = loss_on(policy, engine, grouped, job["pad"])
    clock = Clock()
    train(source, policy, Sft(None), engine, [Clip(1.0)], clock)
    return {
        "seconds": clock.steps.seconds,
        "others": clock.steps.others,
        "tokens": clock.tokens,
        "losses": clock.losses,
        "loss_on_grouped_first_step": on_grouped,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": sum(p.numel() for p in groups[0]["params"]),
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
