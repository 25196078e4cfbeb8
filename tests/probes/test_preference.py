"""Probe: DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) with the adapter switched off as its reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probe import Bare, assert_same, gradient_of, llama, per_example, run, source_of, tokens
from tunesmith.methods.lora import Lora
from tunesmith.models.policy import Policy
from tunesmith.protocols import Method
from tunesmith.types import Batch, Example, Piece, Terms, Want

BETA = 0.3
ROLES = ("chosen", "rejected")
PAIRS = [(tokens(4, n), tokens(3 + n % 4, 20 + n), tokens(2 + n % 3, 40 + n)) for n in range(6)]


class Dpo(Bare):
    """loss = -log sigmoid(beta * ((chosen - rejected) - (the reference's chosen - rejected)))."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def annotate(self, policy: Policy, batch: Batch) -> Batch:
        policy.eval()
        with torch.no_grad(), self.method.reference(policy):
            sums = self.sums(policy, batch)
        batch.columns |= {f"reference_{role}": sums[role] for role in ROLES}
        return batch

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        sums = self.sums(policy, batch)
        gained = {role: sums[role] - batch.columns[f"reference_{role}"] for role in ROLES}
        margin_N = BETA * (gained["chosen"] - gained["rejected"])
        right = float((margin_N > 0).sum())
        return Terms({"loss": per_example(-F.logsigmoid(margin_N))}, {"accuracy": (right, float(len(margin_N)))})

    def sums(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """Log-probability of each example's answer, by role."""
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        assert scores.example_U is not None
        segment_U = batch.streams["input"].segment_ids_BT[batch.weight_BT != 0]
        found = {role: scores.logprob_U.new_zeros(len(batch.examples)) for role in ROLES}
        for role in ROLES:
            of_role_S = torch.tensor([s.role == role for s in batch.segments])
            found[role] = found[role].index_add(0, scores.example_U, scores.logprob_U * of_role_S[segment_U])
        return found


def adapted() -> tuple[Policy, Lora]:
    policy, method = llama(), Lora(Lora.Options(rank=4), 0.0)
    method.attach(policy)
    return policy, method


def examples() -> list[Example]:
    made: list[Example] = []
    for prompt, *answers in PAIRS:
        pieces = [np.concatenate([prompt, answer]) for answer in answers]
        weights = [np.arange(len(piece)) >= len(prompt) for piece in pieces]
        parts = zip(pieces, weights, ROLES, strict=True)
        made.append(Example(tuple(Piece(p, w.astype(np.float32), role) for p, w, role in parts)))
    return made


def by_hand(policy: Policy, base: Policy) -> Tensor:
    """The same loss from whole logits, one sequence at a time; `base` was never adapted."""
    losses: list[Tensor] = []
    for prompt, chosen, rejected in PAIRS:
        margin = torch.zeros(())
        for sign, answer in ((1, chosen), (-1, rejected)):
            ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
            for model, factor in ((policy.model, sign), (base.model, -sign)):
                model.set_attn_implementation("eager")
                logprob_TV = model(input_ids=ids[None]).logits[0].log_softmax(-1)
                margin = margin + factor * sum(logprob_TV[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
        losses.append(-F.logsigmoid(BETA * margin))
    return torch.stack(losses).mean()


def test_the_first_loss_is_log_2_and_gradients_are_those_written_by_hand() -> None:
    policy, method = adapted()
    objective = Dpo(method)
    source = source_of(examples(), policy, micro_batch_size=4, max_steps=3, annotator=objective)
    seen = run(source, policy, objective)
    assert seen.losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert seen.stats[-1].metrics["accuracy"] == 1.0
    trained, _ = adapted()
    loss = by_hand(trained, llama().requires_grad_(False))
    assert float(loss.detach()) == pytest.approx(seen.losses[0], abs=1e-6)
    assert_same(seen.gradients[0], gradient_of(trained, loss), 1e-5)
    # Away from the reference too, the loss is that of the weights as they are.
    trained.load_state_dict(policy.state_dict())
    loss = by_hand(trained, llama())
    more = run(source_of(examples(), policy, annotator=objective), policy, objective)
    assert more.losses[0] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert_same(more.gradients[0], gradient_of(trained, loss), 1e-4)
    assert more.losses[0] < 0.5
