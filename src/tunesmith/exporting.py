"""A run's model as a folder for others; a merged one leaves only if it answers as what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith import rundir, session
from tunesmith.errors import InputError, RefusedError
from tunesmith.protocols import Mergeable
from tunesmith.types import Prediction, Row, SampleSpec

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.prepare import Prepared
    from tunesmith.models.policy import Policy
    from tunesmith.protocols import Method, Objective

CHECKED_ROWS = 50
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Nats a token, the mean over a row: a sum in another order costs next to nothing, 8 bits of mantissa some hundredths.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
AGREEMENT = {"fp32": 0.98, "bf16": 0.8, "fp16": 0.9}  # of the answers: near ties fall the other way
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md")


@dataclass(frozen=True, slots=True)
class Check:
    """How a merged model differs from the run's over `rows` rows: share of equal answers, and nats a token at most."""

    rows: int
    agreement: float
    largest: float


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the folder is; `check` of a merged model."""

    path: Path
    check: Check | None = None


def copy(model: Path, to: Path) -> Exported:
    """The run's own model folder, byte for byte."""
    with rundir.replace_folder(to) as folder:
        for pattern in MODEL_FILES:
            for file in model.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return Exported(to)


def merge(
    loaded: tuple[Policy, Objective, Method, Renderer, dict[str, Any]], rows: Sequence[Row], to: Path, dtype: str
) -> Exported:
    """Merges the adapter into its base, writes it at `dtype`, loads that folder again and compares answers to `rows`.

    InputError for a method without an adapter, RefusedError where the answers are not those of the run's model:
    nothing is left behind then.
    """
    policy, objective, method, renderer, card = loaded
    if not method.facts.mergeable or not isinstance(method, Mergeable):
        raise InputError(
            f"method {card['method']['name']} has no adapter that could be merged",
            "export it without --merge: its folder is a whole model already",
        )
    spec = SampleSpec(int(card["max_new_tokens"]))
    before = objective.predict(policy, rows, renderer, spec)
    method.merge(policy)
    with rundir.replace_folder(to) as folder:
        session.save_merged(folder, policy, renderer, card, DTYPES[dtype])
        merged, *_ = session.load(folder, str(policy.device))
        check = compared(before, objective.predict(merged, rows, renderer, spec))
        if check.largest > TOLERANCE[dtype] or check.agreement < AGREEMENT[dtype]:
            raise RefusedError(
                f"the merged model is not the one that was measured: over {check.rows} rows its log-probabilities "
                f"differ by up to {check.largest:.3g} nats a token (at most {TOLERANCE[dtype]:g} may be), "
                f"and {check.agreement:.1%} of its answers are equal (at least {AGREEMENT[dtype]:.0%} must be)",
                "export at --dtype fp32, or without --merge",
            )
    return Exported(to, check)


def rows_to_check(prepared: Prepared) -> list[Row]:
    """The run's first test rows; of validation or train where there is no test set."""
    held = [*prepared.tests.values(), *([prepared.validation] if prepared.validation is not None else [])]
    store = held[0] if held else prepared.train
    return [store.row(i) for i in range(min(CHECKED_ROWS, len(store)))]


def compared(before: Sequence[Prediction], after: Sequence[Prediction]) -> Check:
    """Of the same rows, answered by two models."""
    equal = sum(a.output == b.output for a, b in zip(before, after, strict=True))
    apart = [
        abs(a.scores["nll"] - b.scores["nll"]) / max(a.scores["tokens"], 1.0)
        for a, b in zip(before, after, strict=True)
        if "nll" in a.scores
    ]
    return Check(len(before), equal / len(before), max(apart, default=0.0))
