"""On a CUDA device: the same step as on the CPU, bf16 within its rounding, and a whole run that learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, examples_of, policy_of
from tunesmith import api
from tunesmith.data.pack import collate, place
from tunesmith.types import Want

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_has_the_hidden_states_of_the_cpu(family: str) -> None:
    batch = collate(examples_of(6), range(6), packed=True, pad_id=0)
    here = policy_of(family).eval()
    with torch.no_grad():
        expected = here.score(batch, Want(hidden=True)).hidden_BTD
        found = here.cuda().score(place(batch, torch.device("cuda")), Want(hidden=True)).hidden_BTD
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)


def _conversation(index: int) -> dict[str, Any]:
    return {"prompt": f"Say the number {index} twice.", "completion": f"{index} {index}"}


@pytest.mark.parametrize(
    ("method", "precision"),
    [("lora", "fp32"), ("lora", "bf16"), ("dora", "bf16"), ("lora", "int4"), ("dora", "int4"), ("full", "fp8")],
)
def test_a_run_learns_and_answers(tiny_llama: Path, tmp_path: Path, method: str, precision: str) -> None:
    if method == "full":
        pytest.importorskip("torchao", reason="torchao is not installed")
    rows = [_conversation(index) for index in range(40)]
    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": method,
        "precision": precision,
        "place": {"device": "cuda"},
        "train": {"epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "save_every": 5},
        "evaluate": {"max_new_tokens": 8},
    }
    result = api.train(
        recipe, data={"train": rows, "test": [_conversation(i) for i in range(90, 99)]}, out=tmp_path / "a"
    )
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < 0.85 * losses[0]
    answers = api.predict(result.path, [{"prompt": "Say the number 7 twice."}], device="cuda")
    assert len(answers) == 1
    values = {r["metric"]: r["value"] for r in result.records if r["model"] == "tuned"}
    before = {r["metric"]: r["value"] for r in result.records if r["model"] == "base"}
    assert values["loss"] < before["loss"]
