"""The engine against numbers worked out by hand: schedules, skipped steps, refusals, halving, seeds, restoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tunesmith import training
from tunesmith.data.pack import collate
from tunesmith.engine.native import NativeEngine, Optimization, seed_step
from tunesmith.engine.schedule import multiplier, warmup_steps
from tunesmith.errors import RefusedError, ResourceError
from tunesmith.gradients.clip import Clip
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.sft import Sft
from tunesmith.types import Batch, Example, Part, Piece, Step, Terms

VOCABULARY = 31


def llama(dropout: float = 0.0, *, packed: bool = True) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    torch.manual_seed(4)
    return Policy(LlamaForCausalLM(config), "decoder", Tokens((1,), 0), packed=packed)


def engine_of(policy: Policy, **changes: Any) -> NativeEngine:
    given: dict[str, Any] = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0, "weight_decay": 0.0}
    optimization = Optimization(**{**given, "total_steps": 10, **changes})
    return NativeEngine(policy, [{"params": list(policy.parameters())}], optimization, seed=9)


def examples_of(count: int, trained: float = 1.0) -> list[Example]:
    draw = np.random.default_rng(0)
    made: list[Example] = []
    for index in range(count):
        ids = draw.integers(2, VOCABULARY, 3 + index).astype(np.int32)
        made.append(Example((Piece(ids, np.full(len(ids), trained, np.float32)),)))
    return made


def step_of(sizes: Sequence[int], *, number: int = 1, trained: float = 1.0, packed: bool = True) -> Step:
    examples, batches, at = examples_of(sum(sizes), trained), [], 0
    for size in sizes:
        batches.append(collate(examples[at : at + size], range(at, at + size), packed=packed, pad_id=0))
        at += size
    return Step(number, batches, {})


def gradients(engine: NativeEngine) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in engine.trainable.items() if p.grad is not None}


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference, relative to the largest number of `b`."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in b) / max(float(t.abs().max()) for t in b.values())


class Short(Sft):
    """A device that holds `room` examples at a time."""

    def __init__(self, room: int) -> None:
        super().__init__(None)
        self.room = room
        self.seen: list[int] = []

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        self.seen.append(len(batch.examples))
        terms = super().terms(policy, batch)
        if len(batch.examples) > self.room:
            raise torch.OutOfMemoryError("no room")
        return terms


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 2 of them warming up: decay runs over 8 and would reach 0 at step 11.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    found = [multiplier(schedule, step, 10, 2) for step in range(1, 11)]
    assert found == pytest.approx(expected, abs=1e-7)


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    assert [multiplier("linear", step, 4, 0) for step in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert multiplier("cosine", 1, 1, 0) == 1.0


def test_warmup_is_a_share_below_1_and_a_number_from_1_on() -> None:
    assert [warmup_steps(w, 50) for w in (0, 0.03, 0.1, 1, 5, 80)] == [0, 2, 5, 1, 5, 50]
    assert [multiplier("linear", step, 3, 3) for step in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_every_group_keeps_its_own_rate_under_the_schedule() -> None:
    policy = llama()
    first, *rest = policy.parameters()
    optimization = Optimization(0.2, "linear", 0, 0.0, 4)
    engine = NativeEngine(policy, [{"params": rest}, {"params": [first], "lr": 0.02}], optimization, seed=0)
    before = [first.detach().clone(), rest[0].detach().clone()]
    engine.forward_backward(Sft(None), policy, step_of([2], number=3))
    assert engine.learning_rate == pytest.approx(0.1)
    engine.step()
    # The first step of Adam moves every number by its rate: 0.5 x 0.02 and 0.5 x 0.2.
    moved = [float((now.detach() - then).abs().max()) for now, then in zip((first, rest[0]), before, strict=True)]
    assert moved == pytest.approx([0.01, 0.1], rel=1e-3)


# ---------------------------------------------------------------- what a step measures and refuses


def test_a_step_without_weight_is_skipped_and_moves_nothing() -> None:
    policy = llama()
    engine = engine_of(policy, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    step = step_of([2, 1], trained=0.0)
    stats = engine.forward_backward(Sft(None), policy, step)
    assert (stats.skipped, stats.loss, stats.parts, stats.tokens) == (True, 0.0, {"nll": 0.0}, step.tokens)
    assert not gradients(engine)
    assert engine.state()["moments"] == {}
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def test_a_micro_batch_without_weight_beside_others_adds_nothing() -> None:
    policy = llama()
    engine, alone, beside = engine_of(policy), step_of([2]), step_of([2])
    loss = engine.forward_backward(Sft(None), policy, alone).loss
    expected = gradients(engine)
    beside.batches.append(step_of([3], trained=0.0).batches[0])
    assert engine.forward_backward(Sft(None), policy, beside).loss == loss
    assert apart(gradients(engine), expected) == 0.0


def test_a_loss_that_is_not_finite_is_refused_before_anything_moves() -> None:
    class Broken(Sft):
        def terms(self, policy: Policy, batch: Batch) -> Terms:
            part = super().terms(policy, batch).parts["nll"]
            return Terms({"nll": Part(part.loss_U * (float("nan") if 2 in batch.examples else 1.0), *rest(part))})

    def rest(part: Part) -> tuple[Tensor, Tensor]:
        return part.weight_U, part.example_U

    policy = llama()
    engine = engine_of(policy)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    stats = engine.forward_backward(Broken(None), policy, step_of([2, 2], number=7))
    engine.step()
    with pytest.raises(RefusedError, match=r"^step 7: the loss is nan") as error:
        _ = stats.loss
    assert error.value.exit_code == 3
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
    assert not any(moment.any() for moments in engine.state()["moments"].values() for moment in moments.values())


def test_a_gradient_that_is_not_finite_is_refused_by_clip() -> None:
    """A finite loss can have a gradient that is not: sqrt at 0."""

    class Steep(Sft):
        def terms(self, policy: Policy, batch: Batch) -> Terms:
            part = super().terms(policy, batch).parts["nll"]
            return Terms({"nll": Part(part.loss_U + (part.loss_U * 0).sqrt(), part.weight_U, part.example_U)})

    policy = llama()
    engine = engine_of(policy)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    assert np.isfinite(engine.forward_backward(Steep(None), policy, step_of([2], number=5)).loss)
    norm = Clip(1.0).before_step(engine, 5)["grad_norm"]
    engine.step()
    with pytest.raises(RefusedError, match=r"^step 5: the gradient of model\..* is not finite"):
        float(norm)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_scaled_gradient_moves_parameters_as_far(optimizer: str, device: str) -> None:
    """Told twice of the same gradients, and scaled by hand; what was told of one step holds for no other."""
    moved: list[dict[str, Tensor]] = []
    for told in (True, False):
        policy = llama().to(device)
        engine = engine_of(policy, optimizer=optimizer, weight_decay=0.1)
        for number in (1, 2, 3):
            torch.manual_seed(number)
            for parameter in engine.trainable.values():
                factor = 0.125 if number == 2 and not told else 1.0
                parameter.grad = factor * torch.randn(parameter.shape).to(device)
            for factor in (0.5, 0.25) if number == 2 and told else ():
                engine.scale(torch.tensor(factor, device=device))
            engine.step()
        moved.append({n: p.detach().clone() for n, p in policy.named_parameters()})
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in moved[0])


def test_metrics_are_means_over_the_whole_step() -> None:
    class Counted(Sft):
        def terms(self, policy: Policy, batch: Batch) -> Terms:
            terms = super().terms(policy, batch)
            terms.metrics = {"size": (float(sum(batch.examples)), float(len(batch.examples))), "none": (0.0, 0.0)}
            return terms

    policy = llama()
    stats = engine_of(policy).forward_backward(Counted(None), policy, step_of([3, 1]))
    assert stats.metrics == {"size": (0 + 1 + 2 + 3) / 4}


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("packed", [True, False])
def test_halving_gives_the_gradient_of_the_whole(packed: bool) -> None:
    policy = llama(packed=packed)
    engine, step = engine_of(policy), step_of([3, 8], packed=packed)
    loss = engine.forward_backward(Sft(None), policy, step).loss
    expected = gradients(engine)
    short = Short(2)
    stats = engine.forward_backward(short, policy, step)
    assert short.seen == [3, 3, 2, 1, 2, 2, 2, 2]  # 8 do not fit, nor do 4; 2 do
    assert stats.loss == pytest.approx(loss, rel=1e-6)
    assert apart(gradients(engine), expected) < 1e-6
    short.seen.clear()
    engine.forward_backward(short, policy, step)
    assert short.seen == [2, 1, 2, 2, 2, 2]  # what did not fit once is not tried again


def test_halving_keeps_columns_roles_and_both_streams() -> None:
    from tunesmith.data import pack

    weights = np.array([0, 1, 0.5], np.float32)
    made = [
        Example(
            (
                Piece(np.arange(2, 4 + n).astype(np.int32), role="asked"),
                Piece(np.array([0, 5 + n, 1], np.int32), weights, "answer", "decoder"),
            ),
            {"reward": n / 2, "kind": n},
        )
        for n in range(3)
    ]
    whole = collate(made, [7, 8, 9], packed=False, pad_id=0, columns={"old": np.ones((3, 4), np.float32)})
    for part, alone in zip(pack.split(whole, [[0, 1], [2]], packed=False, pad_id=0), (made[:2], made[2:]), strict=True):
        numbers = part.examples
        expected = collate(
            alone, numbers, packed=False, pad_id=0, columns={"old": np.ones((len(numbers), 4), np.float32)}
        )
        assert part.segments == expected.segments
        assert part.columns.keys() == expected.columns.keys()
        for name, column in expected.columns.items():
            assert torch.equal(part.columns[name], column), name
        for name, stream in expected.streams.items():
            assert torch.equal(part.streams[name].input_ids_BT, stream.input_ids_BT)
            assert torch.equal(part.streams[name].segment_ids_BT, stream.segment_ids_BT)
        assert torch.equal(part.weight_BT, expected.weight_BT)
        assert torch.equal(part.target_BT * (part.weight_BT > 0), expected.target_BT * (expected.weight_BT > 0))
    assert [n for part in pack.split(whole, [[0, 1], [2]], packed=False, pad_id=0) for n in part.examples] == [7, 8, 9]
    whole.extra["images"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="images"):  # not silently without them
        pack.split(whole, [[0, 1], [2]], packed=False, pad_id=0)


def test_one_example_that_does_not_fit_ends_the_run() -> None:
    policy = llama()
    step = step_of([4])
    with pytest.raises(ResourceError, match=r"^step 1: one example of up to 6 tokens does not fit in memory") as error:
        engine_of(policy).forward_backward(Short(0), policy, step)
    assert error.value.exit_code == 4


# ---------------------------------------------------------------- randomness and state


def test_a_step_repeats_its_dropout_whatever_was_drawn_before() -> None:
    policy = llama(dropout=0.5)
    engine = engine_of(policy)
    losses = [engine.forward_backward(Sft(None), policy, step_of([4], number=n)).loss for n in (1, 2, 1)]
    torch.rand(100)
    losses.append(engine.forward_backward(Sft(None), policy, step_of([4], number=1)).loss)
    assert losses[0] == losses[2] == losses[3]
    assert losses[0] != losses[1]
    policy.eval()  # as an evaluation leaves it: the next step drops out again
    assert engine.forward_backward(Sft(None), policy, step_of([4], number=1)).loss == losses[0]
    assert engine_of(other := llama()).forward_backward(Sft(None), other, step_of([4])).loss != losses[0]


def test_seeds_differ_by_run_step_and_part() -> None:
    def drawn(*key: int) -> float:
        seed_step(*key)
        return float(torch.rand(()))

    keys = [(0, 1), (0, 2), (1, 1), (0, 1, 1), (0, 11), (1, 11)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(0, 1) == drawn(0, 1, 0)


def test_an_engine_restored_goes_on_to_the_same_bits() -> None:
    policy, other, third = llama(), llama(), llama()
    engine, resumed, again = engine_of(policy), engine_of(other), engine_of(third)

    def advance(on: NativeEngine, of: Policy, numbers: Sequence[int]) -> None:
        for number in numbers:
            on.forward_backward(Sft(None), of, step_of([3], number=number))
            on.step()

    advance(engine, policy, [1, 2])
    state = {kind: {n: _copy(v) for n, v in values.items()} for kind, values in engine.state().items()}
    advance(engine, policy, [3, 4])
    resumed.restore(state)
    again.restore(state)  # one state serves several engines: none of them moves it
    advance(resumed, other, [3, 4])
    advance(again, third, [3, 4])
    for copy in (other, third):
        assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), copy.parameters(), strict=True))


def test_restoring_a_fresh_state_forgets_the_moments() -> None:
    policy = llama()
    engine = engine_of(policy)
    fresh = {kind: {n: _copy(v) for n, v in values.items()} for kind, values in engine.state().items()}

    def one_step() -> list[Tensor]:
        engine.forward_backward(Sft(None), policy, step_of([3]))
        engine.step()
        return [p.detach().clone() for p in policy.parameters()]

    first = one_step()
    engine.restore(fresh)
    assert all(torch.equal(a, b) for a, b in zip(one_step(), first, strict=True))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, (Tensor, nn.Parameter)) else {k: v.clone() for k, v in value.items()}


@pytest.mark.parametrize(("way", "ahead"), [("none", True), ("whole", True), ("away", False)])
def test_steps_whose_inputs_wait_in_the_hosts_memory_do_not_overlap(
    way: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages for two steps at once would be twice as many as the plan has counted."""
    names = ("learning_rate", "schedule", "warmup", "weight_decay", "total_steps", "optimizer", "seed")
    plan: Any = SimpleNamespace(
        training=SimpleNamespace(**dict.fromkeys(names, 0)), placement=SimpleNamespace(recompute=way)
    )
    assets: Any = SimpleNamespace(facts=SimpleNamespace(needs=SimpleNamespace(coupling="token")))
    monkeypatch.setattr(training, "_groups", lambda *_: [])
    monkeypatch.setattr(training, "NativeEngine", lambda *_, **named: named["ahead"])
    policy: Any = None
    assert training.engine_of(plan, assets, policy, []) is ahead
