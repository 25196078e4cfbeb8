"""Probe: two epochs over each rollout (PPO, arXiv 1707.06347, equation 7), killed and resumed to the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe import Bare, Seen, assert_same, gradient_of, llama, run, tokens
from tunesmith.data.pack import collate
from tunesmith.models.policy import Policy
from tunesmith.types import Batch, Example, Part, Piece, SampleSpec, Step, Terms, Want

PROMPTS = [tokens(3 + n % 3, n).tolist() for n in range(8)]
EPOCHS, HALVES, ROLLOUTS = 2, 2, 3
STEPS = EPOCHS * HALVES  # of one rollout
LONGEST = 6


class Ppo(Bare):
    """-min(r A, clip(r, 0.8, 1.2) A) a token; the annotated old log-probs stand in a padded row an example."""

    def annotate(self, policy: Policy, batch: Batch) -> Batch:
        policy.eval()
        with torch.no_grad():
            logprob_U = policy.score(batch, Want(logprobs=True)).logprob_U
        assert logprob_U is not None
        batch.columns["old"] = torch.zeros(len(batch.examples), LONGEST + 1)
        batch.columns["old"][self.there(batch)] = logprob_U
        return batch

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"surrogate": sum(float(batch.weight_BT.sum()) for batch in step.batches)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        assert scores.weight_U is not None
        assert scores.example_U is not None
        ratio_U = (scores.logprob_U - batch.columns["old"][self.there(batch)]).exp()
        advantage_U = batch.columns["advantage"][scores.example_U]
        loss_U = -torch.minimum(ratio_U * advantage_U, ratio_U.clamp(0.8, 1.2) * advantage_U)
        apart = float((ratio_U.detach() - 1).abs().sum())
        return Terms(
            {"surrogate": Part(loss_U, scores.weight_U, scores.example_U)},
            {"apart": (apart, len(ratio_U)), "reward": (float(batch.columns["reward"].sum()), len(batch.examples))},
        )

    def there(self, batch: Batch) -> torch.Tensor:
        return torch.arange(LONGEST + 1) < batch.columns["units"][:, None]


class Rollouts:
    """Samples all prompts, then takes `EPOCHS` orders of them; between rollouts its state is one integer."""

    total_steps = ROLLOUTS * STEPS

    def __init__(self, annotator: Ppo) -> None:
        self.annotator = annotator
        self.done, self.rollout = 0, dict[str, torch.Tensor]()
        self.sampled = 0

    def restore(self, state: Mapping[str, Any]) -> None:
        self.done, self.rollout = state["step"], dict(state["rollout"])

    def steps(self, policy: Policy) -> Iterator[Step]:
        while self.done < self.total_steps:
            self.rollout = self.rollout or self.sample(policy)
            number, (epoch, half) = self.done + 1, divmod(self.done % STEPS, HALVES)
            order = np.random.default_rng([epoch, self.done // STEPS]).permutation(len(PROMPTS))
            parts = np.array_split(np.array_split(order, HALVES)[half], 2)
            batches = [self.batch(policy, self.rollout, part) for part in parts]
            self.done, self.rollout = number, self.rollout if number % STEPS else {}
            yield Step(number, batches, {"step": number, "rollout": self.rollout})

    def sample(self, policy: Policy) -> dict[str, torch.Tensor]:
        self.sampled += 1
        answers = policy.sample(PROMPTS, SampleSpec(LONGEST, temperature=1.0, seed=self.done))
        ids = [a.token_ids + list(policy.tokens.end) * a.finished for a in answers]
        units = torch.tensor([len(i) for i in ids])
        answer_NT = torch.tensor([i + [0] * (LONGEST + 1 - len(i)) for i in ids])
        rollout = {"answer": answer_NT, "units": units, "reward": (answer_NT >= 30).sum(1) / units}
        whole = self.batch(policy, rollout, np.arange(len(PROMPTS)))
        return rollout | {"old": self.annotator.annotate(policy, whole).columns["old"]}

    def batch(self, policy: Policy, rollout: Mapping[str, torch.Tensor], chosen: np.ndarray) -> Batch:
        examples: list[Example] = []
        for index in chosen.tolist():
            answer = rollout["answer"][index, : int(rollout["units"][index])].tolist()
            weights = np.array([0.0] * len(PROMPTS[index]) + [1.0] * len(answer), np.float32)
            examples.append(Example((Piece(np.array(PROMPTS[index] + answer, np.int32), weights),)))
        columns = {name: rollout[name].numpy()[chosen] for name in rollout if name != "answer"}
        columns["advantage"] = columns["reward"] - rollout["reward"].numpy().mean()
        return collate(examples, chosen.tolist(), packed=True, pad_id=policy.tokens.pad, columns=columns)


def trained(policy: Policy, seen: Seen | None = None, resume: Path | None = None) -> tuple[Seen, Rollouts]:
    objective = Ppo()
    source = Rollouts(objective)
    return run(source, policy, objective, seen=seen, resume=resume), source


def test_the_ratio_is_1_where_a_rollout_begins_and_moves_from_there() -> None:
    seen, source = trained(llama())
    apart = [stats.metrics["apart"] for stats in seen.stats]
    assert source.sampled == ROLLOUTS
    assert len(apart) == ROLLOUTS * STEPS
    for number, distance in enumerate(apart):
        assert distance < 1e-5 if number % STEPS == 0 else distance > 1e-2, (number, distance)
    # Where every ratio is 1 the gradient is the plain policy gradient: - A * grad log p.
    policy = llama()
    step = next(iter(Rollouts(Ppo()).steps(policy)))
    loss = torch.zeros(())
    for batch in step.batches:
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        loss = loss - (scores.logprob_U * batch.columns["advantage"][scores.example_U]).sum()
    assert_same(seen.gradients[0], gradient_of(policy, loss / Ppo().normalisers(step)["surrogate"]), 1e-5)


@pytest.mark.parametrize("killed_after", range(1, STEPS + 2))
def test_killed_and_resumed_ends_in_the_same_bits(killed_after: int, tmp_path: Path) -> None:
    whole, resumed = llama(), llama()
    expected, _ = trained(whole)
    trained(llama(), Seen(killed_after, tmp_path))
    torch.manual_seed(killed_after)  # what generators hold when a process begins is nobody's business
    rest, source = trained(resumed, resume=tmp_path)
    assert rest.losses == expected.losses[killed_after:]
    assert_same(resumed.state_dict(), whole.state_dict(), 0.0)
    # Inside a rollout its tokens are carried over, not drawn again from parameters that have moved.
    assert source.sampled == ROLLOUTS - (killed_after + STEPS - 1) // STEPS
    assert sum(file.stat().st_size for file in tmp_path.glob("step-*/source.*")) < 4096
