"""Steps measured on few layers: the lines read off them, what is chosen by them, and a plan that was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith import api, compat, placing, probing, session
from tunesmith.engine.costs import Choice, Cost, Line, choose, peak
from tunesmith.errors import RefusedError, ResourceError
from tunesmith.models.fetch import resolve
from tunesmith.models.few import few_layers, numbers
from tunesmith.models.layers import layers
from tunesmith.models.recompute import recompute
from tunesmith.objectives.retrieve import Retrieve
from tunesmith.settings import Placement

MANY = 24
Card = Callable[..., None]


@dataclass(frozen=True)
class Model:
    """A model whose steps are played through allocation by allocation: what each thing holds, in MiB."""

    outside: float  # embeddings and the like: weights and state
    weights: float  # of a layer, with its optimizer's state
    gradients: float  # of a layer
    kept: float  # of a layer for the backward
    kept_again: float  # of a layer that runs again
    scratch: float  # of a layer's backward
    loss: float  # while the loss is there
    embedding: float  # the gradient of the embeddings, last of all

    def step(self, layers: int, again: int) -> tuple[float, float, float]:
        """The peaks of the loss, of the topmost layer's backward, and from there on; the lowest `again` run again."""
        held = self.outside + layers * self.weights
        held += sum(self.kept_again if i < again else self.kept for i in range(layers))
        loss, turns, rests = held + self.loss, [], []
        for i in reversed(range(layers)):
            ran = self.kept if i < again else 0.0
            (turns if i == layers - 1 else rests).append(held + ran + self.scratch + self.gradients)
            held += self.gradients - (self.kept_again if i < again else self.kept)
        rests.append(held + self.embedding)
        return loss, max(turns), max(rests)

    def line(self, again: bool) -> Line:
        few, more = (Cost(*self.step(n, n if again else 0), 0.1 * n, 0.01 * n) for n in (2, 4))
        return Line(2, 4, few, more)


def models() -> st.SearchStrategy[Model]:
    size = st.floats(1, 1000)
    return st.builds(
        lambda kept, share, **rest: Model(kept=kept, kept_again=share * kept, **rest),
        kept=size,
        share=st.floats(0.01, 0.6),
        outside=size,
        weights=size,
        gradients=st.floats(0, 1000),
        scratch=size,
        loss=size,
        embedding=st.floats(0, 1000),
    )


@given(models(), st.integers(0, MANY))
def test_the_peak_of_many_layers_is_read_off_few(model: Model, again: int) -> None:
    true = max(model.step(MANY, again))
    found = peak(model.line(again=False), model.line(again=True), MANY, again)
    # Where gradients grow as what is kept falls, the highest point may lie between two that are looked at.
    assert true / 1.05 <= found <= true * 1.05


def _lines() -> dict[Any, Line]:
    """Whole and partial recomputation of a model: 10 a layer is kept, 4 or 1 of it where it runs again."""

    def line(kept: float, micro: float) -> Line:
        few, more = (Cost(100 + 10 * n + kept * n, 100 + 10 * n, 100 + 10 * n, micro * n, 0.5) for n in (2, 4))
        return Line(2, 4, few, more)

    return {"none": line(10, 1.0), "feed": line(4, 1.2), "whole": line(1, 1.5)}


def test_what_fits_as_it_is_runs_once() -> None:
    assert choose(_lines(), 10, 300.0) == Choice("none", 0, 300.0, 10.0, 0.5)


def test_no_more_layers_run_again_than_must() -> None:
    found = choose(_lines(), 10, 282.0)
    assert found is not None
    assert (found.again, found.count) == ("feed", 3)
    assert found.micro == pytest.approx(10.6)
    assert found.peak == pytest.approx(282.0)


def test_all_of_a_layer_runs_again_where_half_of_it_is_not_enough() -> None:
    found = choose(_lines(), 10, 230.0)
    assert found is not None
    assert found.again == "whole"
    assert choose(_lines(), 10, 209.0) is None


def test_all_layers_run_again_where_that_was_asked() -> None:
    found = choose(_lines(), 10, 1000.0, all_of="whole")
    assert found is not None
    assert (found.again, found.count) == ("whole", 10)


# ---------------------------------------------------------------- a plan, on a CPU that passes for a card


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    """A device whose peaks are those that a test names, so many bytes for each layer that runs once, or `input` of them
    for one that runs again from the device's memory.
    """
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    sizes = {"left": 0, "layer": 0, "layers": 0, "again": 0, "input": 0, "token": 0, "tokens": 0, "most": 1 << 30}
    sizes["above"] = 0  # what a model of more than 4 layers takes besides
    sizes["deep"] = 0  # layers of 8 that must run again, lest memory run out
    build, collate = session.build, probing.collate

    def laid_out(examples: Any, *given: Any, **named: Any) -> Any:
        sizes["tokens"] = sum(len(piece.input_ids_T) for example in examples for piece in example.pieces)
        if sizes["tokens"] > sizes["most"]:
            raise torch.OutOfMemoryError("of the card")
        return collate(examples, *given, **named)

    def built(plan: Any, assets: Any, base: Any = None) -> Any:
        policy = build(plan, assets, base)
        sizes["layers"] = policy.config.num_hidden_layers
        sizes["again"] = plan.placement.recomputed
        sizes["away"] = plan.placement.recompute == "away"
        if sizes["layers"] == 8 and sizes["again"] < sizes["deep"]:
            raise torch.OutOfMemoryError("of the card")
        return policy

    def most(*_: Any) -> int:
        return (
            sizes["left"]
            + (1 << 20)
            + sizes["above"] * (sizes["layers"] > 4)
            + (sizes["layer"] + sizes["token"] * sizes["tokens"]) * (sizes["layers"] - sizes["again"])
            + sizes["input"] * sizes["again"] * (not sizes["away"])
        )

    monkeypatch.setattr(session, "build", built)
    monkeypatch.setattr(probing, "collate", laid_out)
    monkeypatch.setattr(probing, "is_measured", lambda *_: True)
    monkeypatch.setattr("tunesmith.planning.is_measured", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: sizes["left"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", most)
    monkeypatch.setattr("tunesmith.engine.memory.free_bytes", lambda *_: 100 << 20)
    return lambda layer, **more: sizes.update(layer=layer, **more)


def _deep(base: Path, folder: Path, layers: int) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(base)
    config.num_hidden_layers = layers
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _recipe(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "sft",
        "method": "lora",
        "place": {"device": "cpu"},
        "train": {"epochs": 2, "batch_size": 8, **more},
    }


ROWS = [{"prompt": f"say {i} " * (1 + i % 7), "completion": f"{i}"} for i in range(24)]
LENGTHS = [400] + [10] * 23
UNSEEN = [{"prompt": f"tell me {i}", "completion": f"{i}"} for i in range(3)]


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "dora"])
def test_a_plan_tells_what_was_measured(card: Card, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    card(1 << 20, left=50 << 20)  # of what was measured before
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan({**_recipe(deep), "method": method}, data={"train": ROWS})
    assert plan.placement.recompute == "none"
    assert plan.prediction.peak_memory_bytes == pytest.approx(probing.RESERVED * 9 * 2**20, rel=1e-6)
    assert 0 < plan.prediction.seconds < 600
    (why,) = [d.why for d in plan.defaults if d.key == "train.recompute"]
    assert why.startswith("measured: fastest that fits into 0.1 GiB")


def test_layers_run_again_where_they_must_and_what_was_measured_is_kept(
    card: Card, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(20 << 20)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    asked = _recipe(deep, micro_batch_size=4)
    plan = api.plan(asked, data={"train": ROWS})
    # 94% of 100 MiB, less 2% of reserve: 92 MiB hold four layers that run once.
    assert (plan.placement.recompute, plan.placement.recomputed) == ("whole", 4)

    monkeypatch.setattr(session, "build", lambda *_: pytest.fail("measured again"))
    assert api.plan(asked, data={"train": ROWS}).placement == plan.placement
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        api.plan(asked, data={"train": ROWS[:16]})


def test_asked_for_layers_all_run_again(card: Card, tiny_llama: Path, tmp_path: Path) -> None:
    card(1 << 20)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan(_recipe(deep, recompute=True), data={"train": ROWS})
    assert (plan.placement.recompute, plan.placement.recomputed) == ("whole", 8)
    assert plan.placement.micro_batch_tokens > 500, "smaller ones, which fit too, are not looked for"


@pytest.mark.parametrize("asked", [None, True])
def test_inputs_wait_in_the_hosts_memory_where_the_devices_is_not_enough(
    card: Card, tiny_llama: Path, tmp_path: Path, asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(20 << 20, input=12 << 20)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    recipe = _recipe(deep, micro_batch_size=4, recompute=asked)
    plan = api.plan(recipe, data={"train": ROWS})
    assert (plan.placement.recompute, plan.placement.recomputed) == ("away", 8 if asked else 4)
    monkeypatch.setattr("tunesmith.settings.MEMORY_SHARE", 0.0)  # no room in the host's either
    with pytest.raises(ResourceError, match="does not fit"):
        api.plan(recipe, data={"train": ROWS})


@pytest.mark.parametrize(
    ("asked", "served", "ways"),
    [
        (None, True, ["none", "feed", "whole", "away"]),
        (None, False, ["none", "whole", "away"]),
        (True, True, ["whole", "away"]),
        (False, True, ["none"]),
    ],
)
def test_ways_to_run_again_come_in_the_order_of_their_cost(asked: bool | None, served: bool, ways: list[str]) -> None:
    facts = SimpleNamespace(
        recipe=SimpleNamespace(train=SimpleNamespace(recompute=asked)),
        model=SimpleNamespace(layers=2, width=8, embedding_parameters=64),
    )
    assets: Any = SimpleNamespace(facts=facts, method=SimpleNamespace(facts=SimpleNamespace(recomputes=True)))
    placement: Any = SimpleNamespace(precision="bf16", micro_batch_tokens=16)
    cost = Cost(1, 1, 1, 1, 1, served)
    assert list(probing._ways(assets, placement, Line(2, 4, cost, cost))) == ways  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(("asked", "must", "compiled"), [(None, False, False), (True, False, True), (None, True, True)])
def test_what_must_be_compiled_is_measured_so(
    asked: bool | None, must: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp8 of what trains has casts that only compiled layers make cheap, and nothing else serves it."""
    seen: list[bool] = []

    def fastest(plan: Any, assets: Any, most: Placement, progress: Any) -> Any:
        seen.append(most.compiled)
        return plan

    monkeypatch.setattr(probing, "_fastest", fastest)
    recipe = SimpleNamespace(place=SimpleNamespace(compile=asked))
    facts = SimpleNamespace(recipe=recipe, multiplies_otherwise=must, method=SimpleNamespace(frozen_backbone=True))
    plan: Any = Planned(Placement("cuda:0", 1, 1, "fp8", True, None, 4096, 1), [])
    probing._refined(plan, SimpleNamespace(facts=facts), lambda *_: None)  # type: ignore[arg-type]  # pyright: ignore
    assert seen == [compiled]


@dataclass(frozen=True)
class Planned:
    placement: Placement
    defaults: list[Any]
    prediction: Any = None


# One step that compiles, those of the largest micro-batch, and those of the 6 that there are.
@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1 + 3 + 3), (1e9, 1 + 30 + 6)])
def test_short_steps_are_timed_until_they_tell(
    card: Card, tiny_llama: Path, tmp_path: Path, seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(1 << 20)
    taken: list[int] = []
    monkeypatch.setattr(probing, "TIMED_FOR", seconds)
    monkeypatch.setattr(probing.Clip, "before_step", lambda *_: taken.append(1))
    api.plan(_recipe(_deep(tiny_llama, tmp_path / "deep", 8)), data={"train": ROWS})
    assert len(taken) == 3 * steps  # of 2 layers, of 4 and of all 8


def test_the_hosts_memory_is_taken_in_powers_of_two() -> None:
    assert [probing._pinned(size) for size in (1, 2, 3, 1024, 1025)] == [1, 2, 4, 1024, 2048]  # pyright: ignore[reportPrivateUsage]


def test_what_fits_in_no_way_is_refused(card: Card, tiny_llama: Path, tmp_path: Path) -> None:
    card(200 << 20)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    with pytest.raises(ResourceError, match=r"one example at a time does not fit into 0\.1 GiB free"):
        api.plan(_recipe(deep, recompute=False, micro_batch_size=1), data={"train": ROWS})


@pytest.mark.parametrize("how", [{"token": 40 << 10}, {"most": 300}])
def test_micro_batches_are_halved_until_one_fits(
    card: Card, tiny_llama: Path, tmp_path: Path, how: dict[str, int]
) -> None:
    """By their peak, and where the few layers themselves run out of memory. 8 layers of 300 tokens fit into 92 MiB."""
    card(0, **how)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan(_recipe(deep, recompute=False), data={"train": ROWS})
    longest = 72
    assert longest <= plan.placement.micro_batch_tokens <= 300
    assert plan.placement.recompute == "none"
    (why,) = [d for d in plan.defaults if d.key == "train.micro_batch_size"]
    assert why.value == f"up to {plan.placement.micro_batch_tokens} tokens"


def test_what_training_takes_is_of_micro_batches_of_usual_size(
    card: Card, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long row among short ones: memory is asked of the largest micro-batch, time of such as are most."""
    card(0, token=1 << 10)
    sizes: list[int] = []
    timed = probing._timed  # pyright: ignore[reportPrivateUsage]

    def seen(cost: Any, steps: Any) -> list[Cost]:
        def one(batches: Any) -> Cost:
            sizes.append(sum(batch.tokens for batch in batches))
            return replace(cost(batches), micro=float(sizes[-1]))

        return timed(one, steps)

    rows = [{"prompt": "a" * n, "completion": "b"} for n in LENGTHS]
    monkeypatch.setattr(probing, "_timed", seen)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan(_recipe(deep, micro_batch_size=1), data={"train": rows})
    short, long = min(sizes), max(sizes)
    assert long > 6 * short
    assert plan.prediction.seconds / plan.training.total_steps == pytest.approx(8 * short, rel=0.02)
    largest = (1 << 20) + long // 2 * 8 * (1 << 10)  # two of them were a step
    assert plan.prediction.peak_memory_bytes == pytest.approx(probing.RESERVED * largest, rel=0.02)


def test_of_micro_batches_alike_the_one_with_the_longest_text_is_the_largest() -> None:
    """Padded: 6 rows of 10, or 2 of 30; scores of attention are [rows, longest, longest]."""
    lengths = np.array([10] * 6 + [30, 30] + [10] * 6)
    prepared = SimpleNamespace(train=SimpleNamespace(lengths=lengths), repeats=np.ones(14), easy_first=None)
    training = SimpleNamespace(epochs=1.0, max_steps=None, batch_size=14, batch_tokens=None, total_steps=1, seed=0)
    placement = Placement("cuda:0", 1, 1, "fp32", False, None, 60, 1)
    plan, assets = SimpleNamespace(training=training), SimpleNamespace(prepared=prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "epoch_steps", lambda *_: [np.arange(14)])
        work = probing._work(plan, assets, placement)  # type: ignore[arg-type]  # pyright: ignore
    assert lengths[work.largest].tolist() == [30, 30]
    assert work.in_a_step == 3


@pytest.mark.parametrize(
    ("most", "above", "tried"),
    [(0, 10, []), (probing.WHOLE, 10, [4, 5]), (probing.WHOLE, 20, [4, 5]), (probing.WHOLE, 60, [4, 7])],
)
def test_a_small_base_is_measured_whole_as_it_was_chosen_to_run(
    card: Card,
    tiny_llama: Path,
    tmp_path: Path,
    most: int,
    above: int,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where more layers take more than the line through few says: fewer of them run once than the line would let."""
    built: list[tuple[int, int]] = []
    probe = probing._Probe.__init__  # pyright: ignore[reportPrivateUsage]

    def init(self: Any, plan: Any, assets: Any, placement: Placement, count: int, work: Any) -> None:
        built.append((count, placement.recomputed))
        probe(self, plan, assets, placement, count, work)

    monkeypatch.setattr(probing, "WHOLE", most)
    monkeypatch.setattr(probing._Probe, "__init__", init)  # pyright: ignore[reportPrivateUsage]
    card(20 << 20, above=above << 20)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan(_recipe(deep, micro_batch_size=4), data={"train": ROWS})
    whole = [recomputed for count, recomputed in built if count == 8]
    assert whole == tried
    assert plan.placement.recomputed == (tried or [4])[-1]


def test_a_choice_that_runs_out_of_memory_when_all_layers_are_there_is_none(
    card: Card, tiny_llama: Path, tmp_path: Path
) -> None:
    card(20 << 20, deep=5)
    deep = _deep(tiny_llama, tmp_path / "deep", 8)
    plan = api.plan(_recipe(deep, micro_batch_size=4), data={"train": ROWS})
    assert (plan.placement.recompute, plan.placement.recomputed) == ("whole", 5), "4 of 8 would fit by the line"


@pytest.mark.parametrize(
    ("changed", "measured"),
    [
        ({}, True),
        ({"device": "cpu"}, False),
        ({"frozen": True}, False),
        ({"teacher": object()}, False),
        ({"beneath": (object(),)}, False),
        ({"mines": 2}, False),
    ],
)
def test_what_is_measured_begins_at_its_base_on_a_card(
    changed: dict[str, Any], measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"device": "cuda", "frozen": False, "teacher": None, "beneath": (), "mines": 0} | changed
    monkeypatch.setattr(placing, "choose_device", torch.device)
    facts: Any = SimpleNamespace(
        recipe=SimpleNamespace(place=SimpleNamespace(device=told["device"])),
        method=SimpleNamespace(frozen_backbone=told["frozen"]),
        teacher=told["teacher"],
        beneath=told["beneath"],
    )
    objective: Any = Retrieve(Retrieve.Options(negatives=told["mines"]))
    assert bool(placing.is_measured(facts, objective)) is measured


def test_layers_above_those_that_run_again_keep_what_they_keep(tiny_llama: Path, tmp_path: Path) -> None:
    local = resolve(str(_deep(tiny_llama, tmp_path / "deep", 4)))
    model: Any = few_layers(local, "lm", "fp32", 4, "cpu", in_nf4=False).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls = [0] * 4
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    recompute(model, "whole", 3)
    model(input_ids=ids, labels=ids).loss.backward()
    assert calls == [2, 2, 2, 1]
    assert all(torch.equal(plain[name], p.grad) for name, p in model.named_parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux alone")
def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    compat.segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    compat.segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


def test_what_cannot_be_measured_is_predicted_and_said(
    card: Card, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("layer_types")

    card(1 << 20)
    monkeypatch.setattr(probing, "few_layers", broken)
    monkeypatch.setattr("tunesmith.engine.memory.free_bytes", lambda *_: 10 << 30)
    plan = api.plan(_recipe(tiny_llama), data={"train": ROWS})
    assert "a step cannot be measured, and is predicted from shapes: KeyError: 'layer_types'" in caplog.text
    assert any(d.key == "train.recompute" and d.why == "memory allows it" for d in plan.defaults)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_bert", "tiny_t5"])
def test_the_backward_is_seen_to_pass_the_topmost_layer(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three families, with layers that run once and again: each part of a step is told from the next."""
    clock = iter(range(1, 10_000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(clock))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    local = resolve(str(request.getfixturevalue(family)))
    model: Any = few_layers(local, "lm", "fp32", 2, "cpu", in_nf4=False).train()
    gauge = probing._Gauge(torch.device("cpu"), list(layers(model).values())[-1])  # pyright: ignore[reportPrivateUsage]
    ids = torch.tensor([[5, 6, 7, 8]])
    for again in (0, 2):
        recompute(model, "whole" if again else "none", again)
        gauge.begin()
        model(input_ids=ids, labels=ids).loss.backward()
        loss, turn, rest = gauge.ended()
        assert loss < turn < rest


def test_a_family_that_cannot_run_layers_again_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
    with pytest.raises(RefusedError, match="layers of Sequential cannot run again in the backward"):
        recompute(model, "whole", 1)


def test_a_model_of_few_layers_is_of_the_bases_shape(tiny_llama: Path, tmp_path: Path) -> None:
    local = resolve(str(_deep(tiny_llama, tmp_path / "deep", 8)))
    assert numbers(local, 8) == (2, 4)
    assert numbers(local, 4) == (4, 4)
    few: Any = few_layers(local, "lm", "fp32", 4, "cpu", in_nf4=False)
    assert len(few.model.layers) == 4
    whole: Any = few_layers(local, "lm", "fp32", 8, "cpu", in_nf4=False)
    held = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in few.parameters())
    assert held == 4 * sum(p.numel() for p in few.model.layers[0].parameters())


def test_a_pattern_of_layers_is_measured_in_whole_rounds(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "gemma")
    local = resolve(str(tmp_path / "gemma"))
    assert numbers(local, 18) == (6, 12)
    few: Any = few_layers(local, "lm", "fp32", 6, "cpu", in_nf4=False)
    assert few.config.layer_types == config.layer_types[:6]


def test_a_probe_leaves_the_runs_own_method_alone(
    card: Card, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with and without having been measured, a model is the same to the bit."""
    card(1 << 20)
    recipe = {**_recipe(tiny_llama, max_steps=2, epochs=None), "evaluate": {"limit": 2}}
    seen: list[Any] = []
    build = session.build

    def built(plan: Any, assets: Any, base: Any = None) -> Any:
        seen.append(assets.method)
        return build(plan, assets, base)

    monkeypatch.setattr(session, "build", built)
    measured = api.train(recipe, data={"train": ROWS, "test": UNSEEN}, out=tmp_path / "a")
    *probed, own = seen
    assert probed
    assert all(method is not own for method in probed), "a method may keep what it attached"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "is_measured", lambda *_: False)
        plain = api.train(recipe, data={"train": ROWS, "test": UNSEEN}, out=tmp_path / "b")
    losses = [(run.path / "metrics.jsonl").read_text() for run in (measured, plain)]
    assert losses[0] == losses[1]


def test_placements_are_told_in_words() -> None:
    from tunesmith.settings import Placement, recomputed

    placement = Placement("cuda", 1, 1, "bf16", True, None, 4096, 1)
    assert recomputed(placement) == ""
    assert recomputed(replace(placement, recompute="whole", recomputed=3)) == "3 layers"
    assert recomputed(replace(placement, recompute="feed", recomputed=3)) == "the feed-forward half of 3 layers"
    away = replace(placement, recompute="away", recomputed=3)
    assert recomputed(away) == "3 layers from inputs in the host's memory"
