"""Probe: each example's gradient clipped to a bound before they are summed, as differential privacy needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from probe import Bare, assert_same, gradient_of, llama, per_example, run, source_of, tokens
from tunesmith.models.policy import Policy
from tunesmith.protocols import Engine
from tunesmith.types import Batch, Example, GradientMode, Piece, Step, Terms, Want

COUNT = 7


class Total(Bare):
    """Summed negative log-likelihood of each example: the normaliser is 1, so that gradients are whole."""

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"loss": 1.0}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        assert scores.example_U is not None
        nll_N = scores.logprob_U.new_zeros(len(batch.examples))
        return Terms({"loss": per_example(nll_N.index_add(0, scores.example_U, -scores.logprob_U))})


class Bounded:
    """g_i * min(1, bound / |g_i|) (Abadi et al. 2016, arXiv 1607.00133, algorithm 1), without the noise."""

    mode: ClassVar[GradientMode] = "per_example"

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.before: list[float] = []
        self.after: list[float] = []

    def example(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        self.before.append(norm(gradients))
        clipped = {n: g * min(1.0, self.bound / self.before[-1]) for n, g in gradients.items()}
        self.after.append(norm(clipped))
        return clipped

    def before_step(self, engine: Engine, number: int) -> dict[str, float]:
        return {"clipped": sum(b > self.bound for b in self.before) / len(self.before)}

    def after_step(self, engine: Engine, number: int) -> None: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def state(self) -> dict[str, Any]:
        return {}


def norm(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.stack([g.double().norm() for g in gradients.values()]).norm())


def examples() -> list[Example]:
    """Of 2 to 20 tokens, so that their gradients' norms differ much; the first has two segments."""
    made = [Example((Piece(ids := tokens(2 + 3 * n, n), np.ones(len(ids), np.float32)),)) for n in range(COUNT)]
    made[0] = Example((*made[0].pieces, *made[3].pieces))
    return made


def one_by_one(bound: float) -> tuple[dict[str, Tensor], list[float]]:
    """The sum of clipped gradients, each from its own forward of an unpacked batch, and the norms before."""
    total: dict[str, Tensor] = {}
    norms: list[float] = []
    for example in examples():
        policy = llama()
        (step,) = source_of([example], policy).steps(policy)
        own = gradient_of(policy, Total().terms(policy, step.batches[0]).parts["loss"].loss_U.sum())
        norms.append(norm(own))
        for name, gradient in own.items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient * min(1.0, bound / norms[-1])
    return total, norms


def test_clipped_gradients_are_summed_and_each_keeps_the_bound() -> None:
    _, norms = one_by_one(1.0)
    bound = float(np.median(norms))
    expected, _ = one_by_one(bound)
    rule = Bounded(bound)
    seen = run(source_of(examples(), llama(), micro_batch_size=3), llama(), Total(), mode="per_example", rules=[rule])
    assert len(rule.before) == COUNT  # one call an example, however they lay in micro-batches
    np.testing.assert_allclose(sorted(rule.before), sorted(norms), rtol=1e-5)
    assert max(rule.after) <= bound * (1 + 1e-6)
    assert seen.columns[0] == {"clipped": (COUNT - 1) / 2 / COUNT}
    assert_same(seen.gradients[0], expected, 1e-5)
