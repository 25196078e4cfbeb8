"""The probe of a device: dtypes in turns, the best of each, and what is not served has no rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.engine import precision

CPU = torch.device("cpu")


def test_rates_are_the_best_of_turns_and_an_unserved_dtype_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    clock = 0.0

    def linear(x: Tensor, w: Tensor) -> Tensor:
        nonlocal clock
        seen.append(x.dtype)
        if x.dtype == torch.float64:
            raise RuntimeError("not served")
        clock += 0.5 if len(seen) == 4 else 8.0  # one moment in which nobody else has the cores
        return x

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(precision, "SECONDS", 100.0)
    rates = precision._rates(CPU, (torch.float32, torch.bfloat16, torch.float64))
    tokens, width, outputs = precision.SHAPE
    product = 2 * tokens * width * outputs
    assert seen == [torch.float32, torch.bfloat16, torch.float64] * 7  # of 16 s each, but for one
    assert rates == [product / 0.5, product / 8.0, 0.0]


def test_a_dtype_that_a_device_does_not_hold_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.randn

    def randn(*size: int, dtype: torch.dtype, **where: Any) -> Tensor:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported")
        return made(*size, dtype=dtype, **where)

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    fp32, bf16 = precision._rates(CPU, (torch.float32, torch.bfloat16))
    assert fp32 > 0
    assert bf16 == 0


def test_a_probe_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    measured = precision.probe(CPU, tmp_path)
    assert measured.fp32 > 0
    monkeypatch.setattr(precision, "_rates", lambda *_: [1.0, 2.0])
    assert precision.probe(CPU, tmp_path) == measured
    next(tmp_path.rglob("*.json")).write_text("not JSON")
    assert (precision.probe(CPU, tmp_path).fp32, precision.probe(CPU, tmp_path).bf16) == (1.0, 2.0)
