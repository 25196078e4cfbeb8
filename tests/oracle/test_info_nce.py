"""The contrastive loss of a step, and the ranks of a search, against loops over queries and passages."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinds import policy_of
from tunesmith.data.pack import collate, place
from tunesmith.data.source import ExampleList, batches
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.evaluation.validate import losses
from tunesmith.objectives.retrieve import NEGATIVE, POSITIVE, QUERY, Retrieve
from tunesmith.types import Batch, Example, Piece, Step

OPTIMIZATION = Optimization(1e-3, "constant", 0.0, 0.0, 1)


def _text(number: int) -> list[int]:
    """The tokens of text `number`: unlike those of any other."""
    return [3 + number % 90, 3 + number // 90, 5, 7][: 3 + number % 2]


def _examples(rows: list[tuple[int, list[int], list[int]]]) -> list[Example]:
    """Of (query, its passages, its negatives), each a number that stands for a text."""

    def piece(role: str, number: int) -> Piece:
        return Piece(np.array(_text(number), np.int32), role=role)

    return [
        Example((piece(QUERY, q), *(piece(POSITIVE, p) for p in own), *(piece(NEGATIVE, n) for n in against)))
        for q, own, against in rows
    ]


def _objective(**options: Any) -> Retrieve:
    return Retrieve(Retrieve.Options(**options))


def _slow(
    rows: list[tuple[int, list[int], list[int]]], vector: dict[int, Tensor], temperature: float, both: bool
) -> list[Tensor]:
    """The losses of the rows, said with sets of texts; `vector` has one of each text."""
    passages = {p for _, own, against in rows for p in (*own, *against)}
    found: list[Tensor] = []
    known = {q: {p for other, own, _ in rows if other == q for p in own} for q, _, _ in rows}

    def e(q: int, p: int) -> Tensor:
        return (vector[q] @ vector[p] / temperature).exp()

    for q, own, _ in rows:
        each: list[Tensor] = []
        for p in set(own):
            wrong = sum((e(q, n) for n in passages - known[q]), torch.zeros((), dtype=torch.float64))
            loss = -(e(q, p) / (e(q, p) + wrong)).log()
            if both:
                others = {o for o, _, _ in rows if p not in known[o]}
                back = sum((e(o, p) for o in others), torch.zeros((), dtype=torch.float64))
                loss = (loss - (e(q, p) / (e(q, p) + back)).log()) / 2
            each.append(loss)
        found.append(torch.stack(each).mean())
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(200, 204),
            st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True),
            st.lists(st.integers(0, 9), max_size=2, unique=True),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.05, 0.5, 2.0]),
    st.booleans(),
    st.sampled_from(["bert", "llama"]),
    st.integers(1, 4),
)
def test_the_loss_is_that_of_the_sets_of_texts(
    rows: list[tuple[int, list[int], list[int]]], temperature: float, both: bool, family: str, size: int
) -> None:
    """Rows may share queries and passages, one's passage may be another's negative; cut anywhere into micro-batches."""
    objective, policy = _objective(temperature=temperature, symmetric=both), policy_of(family)
    policy.eval()
    examples = _examples(rows)
    starts = range(0, len(rows), size)
    made = [collate(examples[at : at + size], range(len(rows))[at : at + size], packed=True, pad_id=0) for at in starts]
    vectors = torch.cat([objective.embed(policy, batch) for batch in made]).detach().double().requires_grad_()
    terms = objective.couple(vectors, Step(1, made, {}))
    loss_N = terms.parts["contrastive"].loss_U
    vector: dict[int, Tensor] = {}
    texts = [n for q, own, against in rows for n in (q, *own, *against)]
    for at, number in enumerate(texts):
        vector.setdefault(number, vectors[at])
    wanted = _slow(rows, vector, temperature, both)
    assert loss_N.tolist() == pytest.approx([float(loss.detach()) for loss in wanted], rel=1e-5, abs=1e-6)
    (ours,) = torch.autograd.grad(loss_N.sum(), vectors, retain_graph=True)
    (theirs,) = torch.autograd.grad(torch.stack(wanted).sum(), vectors)
    for number in vector:  # of a text that stands there twice, ours may be told of another place
        places = [at for at, text in enumerate(texts) if text == number]
        assert torch.allclose(ours[places].sum(0), theirs[places].sum(0), atol=1e-5 + 1e-4 * float(theirs.abs().max()))
    vector = {number: value.detach() for number, value in vector.items()}
    ranks = 0.0
    for q, own, _ in rows:
        known = {p for other, more, _ in rows if other == q for p in more}
        passages = {p for _, more, against in rows for p in (*more, *against)}
        best = max(float(vector[q] @ vector[p]) for p in own)
        ranks += 1 / (1 + sum(float(vector[q] @ vector[n]) >= best for n in passages - known))
    assert terms.metrics["batch_mrr"] == (pytest.approx(ranks, abs=1e-6), len(rows))


def _drawn(count: int, seed: int = 0) -> list[tuple[int, list[int], list[int]]]:
    """As many queries, some of them twice, over a quarter as many passages."""
    draw = random.Random(seed)
    return [(1000 + draw.randrange(count), [draw.randrange(count // 4)], []) for _ in range(count)]


def _gradient(mode: Any, batch_list: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    policy = policy_of("bert")
    engine = NativeEngine(policy, [{"params": list(policy.parameters())}], OPTIMIZATION, seed=3, mode=mode)
    stats = engine.forward_backward(_objective(), policy, Step(1, batch_list, {}))
    return stats.loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_cached_gradients_of_a_batch_of_1024_are_the_uncached_ones() -> None:
    examples = _examples(_drawn(1024))
    whole = collate(examples, range(1024), packed=True, pad_id=0)
    parts = [
        collate(examples[i : i + 96], range(i, min(i + 96, 1024)), packed=True, pad_id=0) for i in range(0, 1024, 96)
    ]
    assert len(parts) == 11
    loss, wanted = _gradient("plain", [whole])
    cached_loss, found = _gradient("cached", parts)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    norm = float(torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt())
    apart = torch.stack([(found[name] - g).square().sum() for name, g in wanted.items()]).sum().sqrt()
    assert norm > 0.1
    assert float(apart) / norm < 1e-5
    # The parts alone, each against its own passages, have another gradient: the step really was coupled.
    alone_loss, alone = _gradient("plain", parts)
    assert alone_loss < 0.9 * loss
    assert float(torch.stack([(alone[n] - g).square().sum() for n, g in wanted.items()]).sum().sqrt()) / norm > 0.02


def test_one_micro_batch_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    embed = Retrieve.embed

    def counted(self: Retrieve, policy: Any, batch: Batch) -> Tensor:
        seen.append(len(batch.examples))
        return embed(self, policy, batch)

    monkeypatch.setattr(Retrieve, "embed", counted)
    examples = _examples(_drawn(8))
    one = [collate(examples, range(8), packed=True, pad_id=0)]
    two = [
        collate(examples[:4], range(4), packed=True, pad_id=0),
        collate(examples[4:], range(4, 8), packed=True, pad_id=0),
    ]
    assert _gradient("cached", one)[0] == pytest.approx(_gradient("cached", two)[0], rel=1e-6)
    assert seen == [8, 4, 4, 4, 4]


def test_the_loss_of_validation_does_not_depend_on_the_micro_batch() -> None:
    examples = ExampleList(_examples(_drawn(40)))
    policy, objective = policy_of("bert"), _objective()
    whole = collate([examples.example(i) for i in range(40)], range(40), packed=True, pad_id=0)
    policy.eval()
    wanted = float(objective.terms(policy, place(whole, policy.device)).parts["contrastive"].loss_U.mean().detach())
    for tokens in (10, 100, 100_000):
        assert len(list(batches(examples, tokens, packed=True, pad_id=0))) > (1 if tokens < 1000 else 0)
        assert losses(policy, objective, examples, tokens)["loss"] == pytest.approx(wanted, rel=1e-5)
    assert math.isfinite(wanted)
