"""Runs by each optimizer: what they hold, where they learn to, and that one that was stopped goes on to its bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tunesmith import api
from tunesmith.errors import StoppedError

COLOURS = ("red", "green", "blue")
ROWS = [{"prompt": f"colour {i}?", "completion": COLOURS[i % 3]} for i in range(36)]
DATA = {"train": ROWS[6:], "test": ROWS[:6]}


def recipe_of(model: Path, method: str, precision: str, optimizer: str, device: str = "cpu") -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "sft",
        "method": method,
        "precision": precision,
        "place": {"device": device, "threads": 1},
        "train": {"max_steps": 20, "batch_size": 8, "learning_rate": 5e-3, "optimizer": optimizer, "save_every": 7},
        "evaluate": {"max_new_tokens": 4, "base": False},
    }


class Stops:
    """Asks for the end after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, event: str, data: Any) -> None:
        if event == "step" and data["step"] == self.after:
            raise tunesmith.StopRun


def trained(recipe: dict[str, Any], out: Path, stops: int | None = None) -> Path:
    if stops is None:
        return api.train(recipe, data=DATA, out=out).path
    with pytest.raises(StoppedError):
        api.train(recipe, data=DATA, out=out, listen=Stops(stops))
    return api.resume(out).path


def weights(run: Path) -> Path:
    return next(run.glob("model/*model.safetensors"))


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


WAYS = [
    pytest.param(method, precision, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for method, precision, device in (
        ("full", "fp32", "cpu"),
        ("full", "bf16", "cpu"),
        ("lora", "bf16", "cpu"),
        ("full", "bf16", "cuda"),
        ("partial", "bf16", "cuda"),
        ("lora", "bf16", "cuda"),
    )
]


@pytest.mark.parametrize(("method", "precision", "device"), WAYS)
def test_eight_bits_learn_what_32_learn(
    tiny_llama: Path, tmp_path: Path, method: str, precision: str, device: str
) -> None:
    whole, less = (
        trained(recipe_of(tiny_llama, method, precision, optimizer, device), tmp_path / optimizer)
        for optimizer in ("adamw", "adamw_8bit")
    )
    assert losses(less) != losses(whole)
    assert losses(less)[-1] < 0.9 * losses(less)[0]
    assert losses(less)[-1] == pytest.approx(losses(whole)[-1], rel=0.1)
    halved = method != "lora" and precision == "bf16"
    assert {t.dtype for t in load_file(weights(less)).values()} == {torch.bfloat16 if halved else torch.float32}
    (newest,) = {p for p in less.glob("checkpoints/step-*") if p.name.endswith("20")}
    assert {torch.int8, torch.uint8} <= {t.dtype for t in load_file(newest / "engine.safetensors").values()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_in_eight_bits_that_was_stopped_goes_on_to_its_bits(
    tiny_llama: Path, tmp_path: Path, precision: str
) -> None:
    recipe = recipe_of(tiny_llama, "full", precision, "adamw_8bit")
    whole, stopped = trained(recipe, tmp_path / "whole"), trained(recipe, tmp_path / "stopped", stops=9)
    found = [hashlib.sha256(weights(run).read_bytes()).hexdigest() for run in (whole, stopped)]
    assert found[0] == found[1]
    assert losses(whole) == losses(stopped)
