"""What the six probes share: tiny random models, and the unchanged loop with a watch that only keeps what it saw.

A probe proves that a way of training fits the contracts of `types.py`: everything special about it is
an objective, a source or a rule of the probe's own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tunesmith import loop
from tunesmith.data.source import Batching, DataSource, ExampleList
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.engine import checkpoint
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.models.policy import Policy, Tokens
from tunesmith.protocols import GradientRule, Objective, Source
from tunesmith.types import Example, GradientMode, Part, Prediction, Row, Step, StepStats

VOCABULARY = 61


def llama(*, dropout: float = 0.0) -> Policy:
    """A random Llama of two layers, the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    torch.manual_seed(11)
    return Policy(LlamaForCausalLM(config), "decoder", Tokens((1,), 0), packed=True)


def tokens(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """`count` random tokens, none of them special."""
    return np.random.default_rng(seed).integers(2, VOCABULARY, count).astype(np.int32)


class Bare:
    """The parts of an objective that a run over ready examples never calls."""

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds("a probe", "lm", frozenset(), frozenset({"decoder"}))
    Options: ClassVar[type[Any]] = object

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def fit(self, rows: Iterable[Row]) -> None: ...
    def adopt(self, description: Mapping[str, Any]) -> None: ...
    def describe(self) -> dict[str, Any]:
        return {}

    def heads(self) -> list[HeadSpec]:
        return []

    def example(self, row: Row, renderer: Any) -> Example:
        raise NotImplementedError

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Any, spec: Any) -> list[Prediction]:
        raise NotImplementedError

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"loss": float(step.examples)}


def per_example(loss_N: Tensor) -> Part:
    """One unit of weight 1 for each example."""
    return Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N)))


class Seen:
    """A watch that keeps losses and gradients, stops when told, and saves a checkpoint where it stops."""

    def __init__(self, stop_after: int | None = None, save_to: Path | None = None) -> None:
        self.stop_after, self.save_to = stop_after, save_to
        self.losses: list[float] = []
        self.columns: list[dict[str, float]] = []
        self.stats: list[StepStats] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.engine: NativeEngine | None = None

    def record(self, step: Step, stats: StepStats, columns: dict[str, float]) -> None:
        assert self.engine is not None
        self.losses.append(stats.loss)
        self.columns.append(columns)
        self.stats.append(stats)
        named = self.engine.trainable.items()
        self.gradients.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})

    def finished(self, step: Step) -> bool:
        assert self.engine is not None
        if step.number != self.stop_after:
            return False
        if self.save_to is not None:
            checkpoint.write(self.save_to, step.number, {"engine": self.engine.state(), "source": step.state})
        return True


def source_of(examples: Sequence[Example], policy: Policy, **given: Any) -> DataSource:
    """Steps over `examples`; `given` goes to Batching and DataSource."""
    batching = {"epochs": None, "max_steps": 1, "batch_size": len(examples), "batch_tokens": None}
    batching |= {"micro_batch_size": None, "micro_batch_tokens": 10**6}
    batching |= {key: given.pop(key) for key in list(given) if key in batching}
    return DataSource(
        ExampleList(examples), Batching(**batching), seed=0, packed=policy.packed, pad_id=policy.tokens.pad, **given
    )


def run(
    source: Source,
    policy: Policy,
    objective: Objective,
    *,
    mode: GradientMode = "plain",
    rules: Sequence[GradientRule] = (),
    seen: Seen | None = None,
    resume: Path | None = None,
) -> Seen:
    """The loop over `source`; `resume` is a folder whose newest checkpoint is taken up first."""
    seen = seen or Seen()
    groups = [{"params": [p for p in policy.parameters() if p.requires_grad]}]
    optimization = Optimization(1e-2, "linear", 0, 0.01, source.total_steps)
    engine = seen.engine = NativeEngine(policy, groups, optimization, seed=3, mode=mode, rules=rules)
    if resume is not None:
        states = checkpoint.read(checkpoint.found(resume)[-1])
        engine.restore(states["engine"])
        source.restore(states["source"])
    loop.train(source, policy, objective, engine, rules, seen)
    return seen


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance`, relative to the largest number of all of them."""
    assert actual.keys() == expected.keys()
    scale = max(float(t.abs().max()) for t in expected.values())
    assert scale > 0
    apart = {name: float((actual[name] - expected[name]).abs().max()) / scale for name in expected}
    assert max(apart.values()) <= tolerance, sorted(apart.items(), key=lambda item: -item[1])[:3]


def gradient_of(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` to every trainable parameter that it reaches."""
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}
