"""1 x 8 = 8 x 1 and packed = unpacked, in loss and gradient, for several families of models."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from families import FAMILIES, REAL_VOCABULARY, examples_of, examples_of_text, policy_of
from tunesmith.data.pack import collate
from tunesmith.declared import HeadSpec
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.models.heads import Head
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.sft import Sft
from tunesmith.protocols import Objective
from tunesmith.types import Example, Piece, Step, Want

COUNT = 8


def gradients(
    family: str, objective_name: str, examples: list[Example], sizes: list[int], *, packed: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    policy = policy_of(family, packed=packed, vocabulary=REAL_VOCABULARY)
    objective: Objective = Sft(None)
    if objective_name == "classify":
        objective = Classify(None)
        objective.adopt({"labels": ["a", "b", "c"]})
        head = Head(HeadSpec("label", 3), policy.width)
        torch.manual_seed(1)
        torch.nn.init.normal_(head.linear.weight)
        policy.add_head(head)
    engine = NativeEngine(
        policy, [{"params": list(policy.parameters())}], Optimization(1e-3, "constant", 0, 0.0, 10), seed=0
    )
    batches, at = [], 0
    for size in sizes:
        batches.append(collate(examples[at : at + size], range(at, at + size), packed=packed, pad_id=0))
        at += size
    stats = engine.forward_backward(objective, policy, Step(1, batches, {}))
    return stats.loss, {n: p.grad.double() for n, p in engine.trainable.items() if p.grad is not None}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    assert a.keys() == b.keys()
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
    return apart / sum(float(g.square().sum()) for g in a.values()) ** 0.5


@pytest.mark.parametrize("examples", [examples_of(COUNT), examples_of_text(COUNT)], ids=["random", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_and_packing_leave_the_gradient_alone(family: str, examples: list[Example]) -> None:
    objective = "classify" if family == "bert" else "sft"
    loss, whole = gradients(family, objective, examples, [COUNT], packed=True)
    for sizes, packed in ([[1] * COUNT, True], [[3, 5], True], [[COUNT], False], [[1] * COUNT, False]):
        other_loss, other = gradients(family, objective, examples, sizes, packed=packed)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert difference(whole, other) < 1e-5, (sizes, packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_windows_of_a_row_count_as_one_row(family: str) -> None:
    pieces = [example.pieces[0] for example in examples_of(2 * COUNT)]
    sizes = np.cumsum([0, 1, 4, 2, 1, 3, 1, 2, 2])
    examples = [
        Example(tuple(Piece(p.input_ids_T) for p in pieces[a:b]), {"label": index % 3})
        for index, (a, b) in enumerate(pairwise(sizes))
    ]
    loss, whole = gradients(family, "classify", examples, [COUNT], packed=True)
    for batches, packed in ([[1] * COUNT, True], [[3, 5], True], [[COUNT], False], [[1] * COUNT, False]):
        other_loss, other = gradients(family, "classify", examples, batches, packed=packed)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert difference(whole, other) < 1e-5, (batches, packed)
    alone = [gradients(family, "classify", [example], [1], packed=True)[0] for example in examples]
    assert loss == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_in_the_row_changes_nothing(family: str) -> None:
    """The first example's hidden states are the same bits' worth whether or not others stand beside it."""
    from tunesmith.types import Want

    policy = policy_of(family).eval()
    examples = examples_of(4)
    alone = policy.score(collate(examples[:1], [0], packed=True, pad_id=0), Want(hidden=True)).hidden_BTD
    beside = policy.score(collate(examples, range(4), packed=True, pad_id=0), Want(hidden=True)).hidden_BTD
    assert alone is not None
    assert beside is not None
    torch.testing.assert_close(beside[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_a_model_that_ignores_the_bounds_is_found_out() -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    from tunesmith.models.policy import Policy, Tokens
    from tunesmith.types import Want

    config = DebertaV2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    policy = Policy(DebertaV2Model(config), "encoder", Tokens((1,), 0), packed=True)
    with pytest.raises((RuntimeError, TypeError)):
        policy.score(collate(examples_of(2), range(2), packed=True, pad_id=0), Want(hidden=True))


def test_beginnings_are_not_shared_once_training_drops_units_out() -> None:
    """What evaluation has decided of them does not hold for training: each copy draws for itself there."""
    policy = policy_of("llama")
    for layer in policy.model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))
    same = [Example((Piece(np.arange(3, 15 + n).astype(np.int32)),)) for n in range(2)]
    batch = collate(same, range(2), packed=True, pad_id=0)
    hidden: list[torch.Tensor] = []
    for train in (False, True, False):
        policy.train(train)
        found = policy.score(batch, Want(hidden=True)).hidden_BTD
        assert found is not None
        hidden.append((found[0, :11] - found[0, 12:23]).abs().max())
    assert hidden[0] == hidden[2] == 0.0
    assert hidden[1] > 0.01
