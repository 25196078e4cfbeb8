"""What a run is predicted to cost counts the tokens that it will see, and defaults say what decided them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith import api, settings
from tunesmith.engine import memory
from tunesmith.engine.memory import Shape, activation_bytes
from tunesmith.engine.precision import Speed
from tunesmith.settings import Default, Epoch, Placement, Prediction, _precision, predict, with_compiling

EPOCH = Epoch(examples=100.0, tokens=5000, trained=1000)


@pytest.mark.parametrize(
    ("keys", "frozen", "tokens"),
    [
        ({"epochs": 3.0, "max_steps": None, "total_steps": 21}, False, 15000),
        ({"epochs": 3.0, "max_steps": None, "total_steps": 21}, True, 5000),
        ({"max_steps": 4, "total_steps": 4}, False, 4 * 16 * 50),
        ({"max_steps": 40, "total_steps": 40}, False, 40 * 16 * 50),
        ({"max_steps": 40, "total_steps": 40, "batch_size": None, "batch_tokens": 600}, False, 24000),
    ],
)
def test_tokens_and_seconds_of_a_run(keys: dict[str, Any], frozen: bool, tokens: int) -> None:
    meaning: Any = SimpleNamespace(**{"epochs": None, "batch_size": 16, "batch_tokens": None, **keys})
    facts = _facts(frozen=frozen)
    placement: Any = SimpleNamespace(precision="fp32", device="cpu", recomputed=0)
    shape, speed = Shape(1000, 100, 10, 16, 2, 32, 64, 100, 4), Speed("cpu", 1e9, 1e9)
    found = predict(facts, meaning, placement, shape, speed, 1, EPOCH)
    assert found.tokens == tokens
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("asked", "device", "frozen", "seconds", "expected"),
    [
        (None, "cuda:0", False, 500.0, True),
        (None, "cuda:0", False, 100.0, False),
        (None, "cuda:0", True, 500.0, False),
        (None, "cpu", False, 500.0, False),
        (True, "cuda:0", False, 1.0, True),
        (False, "cuda:0", False, 500.0, False),
    ],
)
def test_layers_are_compiled_as_asked_or_where_a_run_is_long_enough(
    asked: bool | None, device: str, frozen: bool, seconds: float, expected: bool
) -> None:
    facts = _facts(frozen=frozen)
    facts.recipe = SimpleNamespace(place=SimpleNamespace(compile=asked))
    defaults: list[Default] = []
    placement = Placement(device, 1, 1, "bf16", True, None, 4096, 1)
    assert with_compiling(facts, placement, Prediction(1, 1, seconds, 1), defaults).compiled is expected
    told = [(default.key, default.value) for default in defaults]
    assert told == ([("place.compile", expected)] if asked is None and device != "cpu" and not frozen else [])


def test_layers_that_multiply_in_fp8_are_compiled_however_short_the_run() -> None:
    facts = _facts(frozen=False)
    facts.recipe, facts.multiplies_otherwise = SimpleNamespace(place=SimpleNamespace(compile=None)), True
    defaults: list[Default] = []
    placement = Placement("cuda:0", 1, 1, "fp8", True, None, 4096, 1)
    assert with_compiling(facts, placement, Prediction(1, 1, 1.0, 1), defaults).compiled
    assert [default.key for default in defaults] == ["place.compile"]


@pytest.mark.parametrize(
    ("method", "precision", "optimizer", "each", "trained"),
    [
        ("full", "bf16", "adamw", 16, "fp32"),
        ("full", "bf16", "adamw_8bit", 6, "bf16"),
        ("full", "fp32", "adamw_8bit", 10, "fp32"),
        ("full", "fp8", "adamw_8bit", 6, "bf16"),
        ("lora", "bf16", "adamw_8bit", 10, "fp32"),
    ],
)
def test_what_trains_is_counted_as_the_optimizer_holds_it(
    tiny_llama: Path, method: str, precision: str, optimizer: str, each: int, trained: str
) -> None:
    """All of it but what activations and the loss take, and what the process holds."""
    seen: list[Shape] = []
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(20)]
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": method, "precision": precision}
    recipe |= {"train": {"optimizer": optimizer, "max_steps": 2}, "place": {"device": "cpu"}}

    def static_bytes(shape: Shape, device: torch.device) -> int:
        seen.append(shape)
        return real(shape, device)

    real = settings.memory.static_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings.memory, "static_bytes", static_bytes)
        patch.setattr("tunesmith.facts.serves_fp8", lambda _: True)
        plan = api.plan(recipe, data={"train": rows})
    assert {shape.trainable_bytes for shape in seen} == {each}
    assert plan.placement.trained == trained
    frozen = replace(seen[0], trainable_bytes=0)
    for device, held in (("cuda", 1.0), ("cpu", 1.75)):  # a snapshot for a checkpoint is in the host's memory
        grown = real(seen[0], torch.device(device)) - real(frozen, torch.device(device))
        assert grown == held * each * plan.parameters["trainable"]


def test_a_trained_output_projection_in_half_precision_keeps_slopes() -> None:
    """Of 100 words, two bytes each; in float32, and where the projection is frozen, there are none."""
    whole, part = (Shape(1000, 100, trained, 16, 2, 32, 64, 100, 4) for trained in (1000, 10))
    assert activation_bytes(whole, 2, False) - activation_bytes(part, 2, False) == 2 * 100
    assert activation_bytes(whole, 4, False) == activation_bytes(part, 4, False)


def _facts(coupling: str = "example", *, frozen: bool = False) -> Any:
    needs, method = SimpleNamespace(coupling=coupling), SimpleNamespace(frozen_backbone=frozen)
    return SimpleNamespace(method=method, caches_vectors=frozen, needs=needs, teacher=None, multiplies_otherwise=False)


def test_a_coupled_step_that_is_cut_runs_twice() -> None:
    """Of 16 examples of 50 tokens: a forward more where a micro-batch does not hold them."""
    meaning: Any = SimpleNamespace(epochs=1.0, max_steps=None, batch_size=16, batch_tokens=None)
    shape, speed = Shape(1000, 100, 1000, 16, 2, 32, 64, 100, 4), Speed("cpu", 1e9, 1e9)
    seconds = [
        predict(
            _facts(coupling),
            meaning,
            SimpleNamespace(precision="fp32", device="cpu", recomputed=0, micro_batch_tokens=tokens),  # type: ignore[arg-type]
            shape,
            speed,
            1,
            EPOCH,
        ).seconds
        for coupling, tokens in (("batch", 1000), ("batch", 400), ("example", 400))
    ]
    assert seconds[1] > 1.2 * seconds[0]
    assert seconds[2] == seconds[0]


@pytest.mark.parametrize(
    ("fp32", "bf16", "taken", "reason"),
    [
        (9e10, 2e11, "fp32", "fp32 90, bf16 200 GFLOP/s measured here; whole steps gain from bf16 above 5 times"),
        (9e10, 4e10, "fp32", "fp32 90, bf16 40 GFLOP/s measured here"),
        (9e10, 5e11, "bf16", "fp32 90, bf16 500 GFLOP/s measured here"),
    ],
)
def test_the_precision_is_told_with_what_decided_it(fp32: float, bf16: float, taken: str, reason: str) -> None:
    facts: Any = SimpleNamespace(recipe=SimpleNamespace(precision="auto"), model=SimpleNamespace(autocasts=True))
    told: list[Default] = []
    assert _precision(facts, Speed("cpu", fp32, bf16), told) == taken
    assert [(d.value, d.why) for d in told] == [(taken, reason)]


def test_products_that_are_made_for_one_shape_count_in_bf16_on_a_cpu(tiny_llama: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": "x"} for i in range(8)]

    def told(precision: str, steps: int) -> int:
        train = {"max_steps": steps, "epochs": None, "batch_size": 4}
        asked = {"objective": "sft", "method": "lora", "precision": precision, "train": train}
        recipe = {"model": str(tiny_llama), **asked}
        return api.plan(recipe, data={"train": rows}).prediction.peak_memory_bytes

    grown = {precision: told(precision, 5000) - told(precision, 1) for precision in ("fp32", "bf16")}
    most = memory.PRIMITIVE * memory.PRIMITIVES
    assert grown["bf16"] == pytest.approx(most, rel=0.05)
    assert abs(grown["fp32"]) < 0.05 * most
    assert memory.primitive_bytes(torch.device("cuda"), "bf16", 5000) == 0


def test_what_is_only_measured_runs_in_pieces_too(tiny_llama: Path) -> None:
    """train.micro_batch_size bounds training's micro-batches by their examples, and validation by as many tokens."""
    rows = [{"prompt": f"{i}?", "completion": "x" * (i % 9 + 1)} for i in range(40)]
    recipe = {
        "model": str(tiny_llama),
        "data": {"validation": 0.2},
        "objective": "sft",
        "method": "lora",
        "train": {"micro_batch_size": 3, "batch_size": 8},
    }
    planned = api.plan(recipe, data={"train": rows})
    assert planned.placement.micro_batch_size == 3
    assert planned.placement.micro_batch_tokens <= 3 * 40  # no row is longer
