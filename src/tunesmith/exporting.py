"""A run's model as a folder or GGUF file for others; a merged one leaves only if it answers as what was measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith import compat, measuring, rundir, session
from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation.calibrated import calibrated, of_card
from tunesmith.evaluation.scaling import Temperature
from tunesmith.models import gguf_write
from tunesmith.models.heads import Head
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
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02, "q8_0": 0.1}
AGREEMENT = {"fp32": 0.98, "bf16": 0.8, "fp16": 0.9, "q8_0": 0.8}  # of the answers: near ties fall the other way
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


def dtypes(gguf: bool) -> list[str]:
    """What the weights of a merged folder, or of a GGUF file, can be."""
    return list(gguf_write.TYPES if gguf else DTYPES)


def copy(model: Path, to: Path) -> Exported:
    """The run's own model folder, byte for byte."""
    with rundir.replace_folder(to) as folder:
        for pattern in MODEL_FILES:
            for file in (file for file in model.rglob(pattern) if file.name not in measuring.FILES.values()):
                copied = folder / file.relative_to(model)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)
    return Exported(to)


def merge(
    loaded: tuple[Policy, Objective, Method, Renderer, dict[str, Any]],
    rows: Sequence[Row],
    to: Path,
    dtype: str,
    cards: Mapping[str, bytes],
) -> Exported:
    """Merges the adapter into its base, writes it at `dtype`, loads that folder again and compares answers to `rows`.

    `cards` are files that go into the folder beside it, by their names.
    InputError for a method without an adapter, RefusedError where the answers are not those of the run's model:
    nothing is left behind then.
    """
    policy, objective, method, renderer, card = loaded
    if not method.facts.mergeable or not isinstance(method, Mergeable):
        held = "an adapter for its base" if method.facts.reference == "switch" else "a whole model"
        raise InputError(
            f"method {card['method']['name']} has no adapter that could be merged into the base's weights",
            f"export it without --merge: its folder is {held} already",
        )
    spec = SampleSpec(int(card["max_new_tokens"]))
    before = calibrated(objective.predict(policy, rows, renderer, spec), rows, card)
    method.merge(policy)
    card = _folded(policy, card)
    with rundir.replace_folder(to) as folder:
        session.save_merged(folder, policy, objective, renderer, card, DTYPES[dtype])
        merged, *_ = session.load(folder, str(policy.device))
        check = _passed(before, calibrated(objective.predict(merged, rows, renderer, spec), rows, card), dtype, card)
        for name, content in cards.items():
            (folder / name).write_bytes(content)
    return Exported(to, check)


def _folded(policy: Policy, card: dict[str, Any]) -> dict[str, Any]:
    """The card of a model whose temperature is in its head: the logits are divided by it, for whoever reads them."""
    calibration = of_card(card)
    trained = [head for head in policy.heads.values() if isinstance(head, Head) and not head.spec.fitted]
    if calibration is None or not isinstance(calibration.scaling, Temperature) or len(trained) != 1:
        return card
    with torch.no_grad():
        for parameter in trained[0].linear.parameters():
            parameter /= calibration.scaling.temperature
    return {**card, "calibration": replace(calibration, scaling=None).to_json()}


def to_gguf(
    loaded: tuple[Policy, Objective, Method, Renderer, dict[str, Any]], rows: Sequence[Row], to: Path, dtype: str
) -> Exported:
    """Writes the file `to`, its adapter merged if there is one, reads it back and compares answers to `rows`.

    InputError for what GGUF cannot hold, RefusedError where the file does not answer as the run's model.
    """
    policy, objective, method, renderer, card = loaded
    if card["head"] != "lm":
        raise InputError(
            f"objective {card['objective']['name']} writes no text, and a GGUF file here is of a language model",
            "export a folder instead",
        )
    if remedy := compat.gguf_remedy():
        raise InputError("this transformers cannot read back what a GGUF file says", f"{remedy}export a folder instead")
    gguf_write.check_model(policy.model)
    adapter = method.facts.reference == "switch"
    if adapter and not (method.facts.mergeable and isinstance(method, Mergeable)):
        raise InputError(
            f"a GGUF file is one whole model, and method {card['method']['name']} cannot be merged into its base",
            "export a folder instead",
        )
    spec = SampleSpec(int(card["max_new_tokens"]))
    before = objective.predict(policy, rows, renderer, spec)
    if adapter and isinstance(method, Mergeable):
        method.merge(policy)
    to.parent.mkdir(parents=True, exist_ok=True)
    with rundir.disk_errors(str(to)), tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as aside:
        made = Path(aside) / to.name
        template = renderer.templates.get("default")
        gguf_write.write_gguf(policy.model, renderer.tokenizer, template, renderer.end_ids, made, dtype)
        back, reader = session.load_gguf(made, Path(aside) / "back", policy, objective, card)
        check = _passed(before, objective.predict(back, rows, reader, spec), dtype, card)
        with open(made, "rb+") as handle:
            rundir.sync_file(handle)
        rundir.rename(made, to)
        rundir.sync_folder(to.parent)
    return Exported(to, check)


def _passed(before: Sequence[Prediction], after: Sequence[Prediction], dtype: str, card: Mapping[str, Any]) -> Check:
    check = compared(before, after)
    rounded = {dtype} if card["precision"] == "fp32" else {dtype, "bf16"}  # the run's own answers are rounded then
    tolerance, agreement = max(TOLERANCE[d] for d in rounded), min(AGREEMENT[d] for d in rounded)
    if check.largest > tolerance or check.agreement < agreement:
        raise RefusedError(
            f"what was exported is not the model that was measured: over {check.rows} rows its log-probabilities "
            f"differ by up to {check.largest:.3g} nats a token (at most {tolerance:g} may be), "
            f"and {check.agreement:.1%} of its answers are equal (at least {agreement:.0%} must be)",
            "export as a folder without --merge" if dtype == "fp32" else "export at --dtype fp32, or without --merge",
        )
    return check


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
