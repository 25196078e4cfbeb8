"""Probe: in-batch negatives over a step of 8 micro-batches, by cached gradients (arXiv 2101.06983)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probe import Bare, assert_same, gradient_of, llama, per_example, run, source_of, tokens
from tunesmith.engine.native import seed_step
from tunesmith.models.policy import Policy
from tunesmith.protocols import Coupled
from tunesmith.types import Batch, Example, Piece, Step, Terms, Want

COUNT, SEED = 16, 3


class Contrast(Bare):
    """loss_i = -log softmax over all passages of cos(query_i, passage_j) / 0.1, at j = i."""

    def embed(self, policy: Policy, batch: Batch) -> Tensor:
        pooled_SD = policy.score(batch, Want(pooled=True)).pooled_SD
        assert pooled_SD is not None
        return F.normalize(pooled_SD, dim=-1)

    def couple(self, embeddings_SD: Tensor, step: Step) -> Terms:
        role_S = [segment.role for batch in step.batches for segment in batch.segments]
        query_ND = embeddings_SD[[i for i, role in enumerate(role_S) if role == "query"]]
        passage_ND = embeddings_SD[[i for i, role in enumerate(role_S) if role == "passage"]]
        own_N = torch.arange(len(query_ND))
        loss_N = F.cross_entropy(query_ND @ passage_ND.T / 0.1, own_N, reduction="none")
        return Terms({"loss": per_example(loss_N)})

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        return self.couple(self.embed(policy, batch), Step(0, [batch], {}))


def examples() -> list[Example]:
    roles = ("query", "passage")
    return [
        Example(tuple(Piece(tokens(2 + (7 * n + k) % 9, 2 * n + k), role=role) for k, role in enumerate(roles)))
        for n in range(COUNT)
    ]


def cached(policy: Policy) -> Any:
    objective = Contrast()
    assert isinstance(objective, Coupled)
    return run(source_of(examples(), policy, micro_batch_size=2), policy, objective, mode="cached")


def test_eight_micro_batches_give_the_gradient_of_one() -> None:
    policy = llama()
    whole, seen = run(source_of(examples(), policy), policy, Contrast()), cached(llama())
    assert seen.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
    assert_same(seen.gradients[0], whole.gradients[0], 1e-5)
    # Negatives of a micro-batch alone make an easier loss: the step really was coupled.
    assert run(source_of(examples(), policy, micro_batch_size=2), llama(), Contrast()).losses[0] < 0.5 * whole.losses[0]


def test_both_passes_drop_out_the_same_units() -> None:
    """The oracle keeps the graphs of all micro-batches at once, each drawn from its own seed."""
    seen = cached(llama(dropout=0.4))
    policy = llama(dropout=0.4).train()
    (step,) = source_of(examples(), policy, micro_batch_size=2).steps(policy)
    assert len(step.batches) == 8
    embedded: list[Tensor] = []
    for index, batch in enumerate(step.batches):
        seed_step(SEED, step.number, index)
        embedded.append(Contrast().embed(policy, batch))
    loss = Contrast().couple(torch.cat(embedded), step).parts["loss"].loss_U.mean()
    assert seen.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same(seen.gradients[0], gradient_of(policy, loss), 1e-5)
    assert seen.losses[0] != pytest.approx(cached(llama()).losses[0], rel=1e-3)
