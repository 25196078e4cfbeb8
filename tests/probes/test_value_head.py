"""Probe: a value head beside LoRA; both losses from one forward, and one checkpoint for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from probe import Bare, Seen, assert_same, llama, run, source_of, tokens
from tunesmith.declared import HeadSpec
from tunesmith.methods.lora import Lora
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy
from tunesmith.types import Batch, Example, Part, Piece, Step, Terms, Want


class ActorCritic(Bare):
    """-log p of each token, and half the squared distance of its value to the example's return."""

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("value", 1)]

    def normalisers(self, step: Step) -> dict[str, float]:
        units = sum(float(batch.weight_BT.sum()) for batch in step.batches)
        return {"nll": units, "value": 2 * units}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        scores = policy.score(batch, Want(values=True, logprobs=True))
        weight_U, example_U = scores.weight_U, scores.example_U
        assert scores.logprob_U is not None
        assert scores.value_U is not None
        assert weight_U is not None
        assert example_U is not None
        error_U = scores.value_U - batch.columns["return"][example_U]
        return Terms(
            {"nll": Part(-scores.logprob_U, weight_U, example_U), "value": Part(error_U**2, weight_U, example_U)}
        )


def adapted() -> Policy:
    policy = llama()
    for spec in ActorCritic().heads():
        policy.add_head(Head(spec, policy.width))
    Lora(Lora.Options(rank=4), 0.1).attach(policy)
    return policy


def examples() -> list[Example]:
    return [
        Example((Piece(tokens(5 + n, n), np.array([0, 0, *[1.0] * (3 + n)], np.float32)),), {"return": n / 4 - 1})
        for n in range(8)
    ]


def trained(steps: int, policy: Policy, seen: Seen | None = None, resume: Path | None = None) -> Seen:
    source = source_of(examples(), policy, batch_size=4, micro_batch_size=2, max_steps=steps)
    return run(source, policy, ActorCritic(), seen=seen, resume=resume)


def test_both_parts_fall_and_only_adapter_and_head_move() -> None:
    policy = adapted()
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    seen = trained(12, policy)
    units, first = [n + 3 for n in range(8)], seen.stats[0].parts
    (step, *_) = source_of(examples(), policy, batch_size=4).steps(policy)
    chosen = step.batches[0].examples
    expected = sum(units[n] * (n / 4 - 1) ** 2 for n in chosen) / sum(units[n] for n in chosen) / 2
    assert first["value"] == pytest.approx(expected, rel=1e-6)  # a fresh head says 0 everywhere
    assert seen.losses[0] == pytest.approx(first["nll"] + first["value"], rel=1e-6)
    for part in first:
        halves = [sum(stats.parts[part] for stats in half) for half in (seen.stats[:6], seen.stats[6:])]
        assert halves[1] < 0.8 * halves[0], part
    moved = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    adapter = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert moved == adapter | {"heads.value.linear.weight", "heads.value.linear.bias"}
    assert len(adapter) == 2 * 2 * 7


def test_a_checkpoint_brings_back_adapter_head_and_its_buffers(tmp_path: Path) -> None:
    whole, killed, resumed = adapted(), adapted(), adapted()
    for policy in (whole, killed):
        policy.heads["value"].standardise(torch.randn(9, policy.width, generator=torch.Generator().manual_seed(0)))
    trained(8, whole)
    trained(8, killed, Seen(stop_after=5, save_to=tmp_path))
    trained(8, resumed, resume=tmp_path)
    assert_same(resumed.state_dict(), whole.state_dict(), 0.0)
    assert any(not torch.equal(v, killed.state_dict()[n]) for n, v in whole.state_dict().items())
