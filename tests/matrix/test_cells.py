"""Every method x objective x kind of model under a few conditions of running: it runs, is substituted or is refused.

A refusal gives its reason and its remedy. Of the cells that run, enough are trained for two steps that every pair
of values that can meet is met once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest

from tunesmith import api, rules
from tunesmith.beneath import Beneath
from tunesmith.facts import DEFAULT_POOLING, Facts, ModelFacts
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe_file import parse_recipe
from tunesmith.types import ModelKind

# The built-in ones by name: what another test registers is not ours to judge.
METHOD_NAMES = (
    *("adalora", "bottleneck", "dora", "full", "head", "ia3", "loha", "lokr", "lora", "oft", "partial", "vera"),
    *("prompt", "p_tuning", "prefix"),
)
OBJECTIVE_NAMES = (
    *("classify", "classify_lm", "distill", "mlm", "multiple_choice", "pair", "pretrain", "regress"),
    *("rerank", "retrieve", "sft", "span", "tag"),
)
WRITE = ("distill", "pretrain", "sft")
LM = (*WRITE, "classify_lm", "mlm")  # those with a language model's head
KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
SERVED: dict[str, tuple[ModelKind, ...]] = {
    **dict.fromkeys(
        ("classify", "multiple_choice", "pair", "regress", "rerank", "retrieve", "span", "tag"), ("encoder", "decoder")
    ),
    **dict.fromkeys(("pretrain", "classify_lm"), ("decoder",)),
    "mlm": ("encoder",),
    **dict.fromkeys(("sft", "distill"), ("decoder", "encoder-decoder")),
}
FOLDERS: dict[ModelKind, str] = {"decoder": "tiny_llama", "encoder": "tiny_bert", "encoder-decoder": "tiny_t5"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"train": {"micro_batch_size": 2}},
    "recompute": {"train": {"recompute": True}},
    "early stopping": {"train": {"early_stopping": {"patience": 1}}, "data": {"validation": 0.2}},
    "early stopping, unwatched": {"train": {"early_stopping": {"patience": 1}}},
    "bf16": {"precision": "bf16"},
    "bf16, unserved": {"precision": "bf16"},
    "fp8, unserved": {"precision": "fp8"},
    "int4": {"precision": "int4"},
    "on an adapter": {},
    "int4, other layers": {"precision": "int4"},
    "unpackable": {},
    "bf16, a model of fp32": {"precision": "bf16"},
}
FIRST = Beneath("first", "first", Path("first"), "lora", "lm", "tiny", "0000", (), "ab")
COLOURS = ("red", "green")
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"colour {i}?", "completion": COLOURS[i % 2]} for i in range(20)],
    "distill": [{"prompt": f"colour {i}?", "completion": COLOURS[i % 2]} for i in range(20)],
    "pretrain": [{"text": f"a text of {i} words, and {COLOURS[i % 2]}"} for i in range(20)],
    "mlm": [{"text": f"a text of {i} words, and {COLOURS[i % 2]}"} for i in range(20)],
    "regress": [{"text": f"a {COLOURS[i % 2]} {i}", "score": i % 3} for i in range(20)],
    "multiple_choice": [
        {"question": f"{i} {COLOURS[i % 2]}?", "choices": [*COLOURS, *["blue"][: i % 2]], "label": i % 2}
        for i in range(20)
    ],
    "span": [
        {"context": f"{i} is {COLOURS[i % 2]}.", "question": f"{i}?", "answers": [COLOURS[i % 2]][: i % 3]}
        for i in range(20)
    ],
    "tag": [{"tokens": ["a", COLOURS[i % 2], str(i)], "tags": ["O", f"B-{COLOURS[i % 2]}", "O"]} for i in range(20)],
    "pair": [{"text_a": f"a {i}", "text_b": COLOURS[i % 2], "label": COLOURS[i // 2 % 2]} for i in range(20)],
    "rerank": [{"query": f"which {i}?", "positive": f"the {COLOURS[i % 2]} {i // 2}"} for i in range(20)],
    "retrieve": [{"query": f"which {i}?", "positive": f"the {COLOURS[i % 2]} {i // 2}"} for i in range(20)],
    "classify_lm": [{"text": f"a {COLOURS[i % 2]} {i}", "label": COLOURS[i % 2]} for i in range(20)],
    "classify": [{"text": f"a {COLOURS[i % 2]} {i}", "label": COLOURS[i % 2]} for i in range(20)],
}
LISTS, HELD_LISTS = (
    [{"text": f"{COLOURS[: i % 3]} {i}", "labels": list(COLOURS[: i % 3])} for i in range(*span)]
    for span in ((20,), (20, 26))
)


# What stands for a base that answers nothing, by objective, as the plan says it.
COMPARED: dict[str, set[str]] = {
    "classify": {"majority"},
    "regress": {"mean"},
    "pair": {"the cosine of the base"},
    "rerank": {"reads the first 50", "the base's own vectors"},
    "multiple_choice": {"drawn at random"},
    "span": {"most of the question's words"},
    "tag": {"the tag that each word"},
}
SAID = {"one padded row", "runs twice", *set[str]().union(*COMPARED.values())}


@dataclass(frozen=True)
class Cell:
    """One combination of what a user chooses, and the condition that it runs under."""

    method: str
    objective: str
    kind: ModelKind
    condition: str

    def __str__(self) -> str:
        return f"{self.method}-{self.objective}-{self.kind}-{self.condition}".replace(" ", "_")

    def recipe(self, model: str) -> dict[str, Any]:
        asked: Mapping[str, Any] = CONDITIONS[self.condition]
        return {
            "model": model,
            "data": {"train": "rows.jsonl", **asked.get("data", {})},
            "objective": self.objective,
            **({"teacher": model} if self.objective == "distill" else {}),
            "method": self.method,
            "train": {"max_steps": 2, "batch_size": 4, **asked.get("train", {})},
            "precision": asked.get("precision", "fp32"),
            "place": {"device": "cpu"},
            "evaluate": {"limit": 2, **({"max_new_tokens": 2} if self.objective in WRITE else {})},
        }

    def facts(self) -> Facts:
        model = ModelFacts(
            name=f"tiny-{self.kind}",
            model_type="tiny",
            kind=self.kind,
            parameters=1000,
            embedding_parameters=100,
            layers=2,
            width=8,
            intermediate=16,
            vocabulary=50,
            context_length=512,
            tied_embeddings=True,
            packable=self.kind != "encoder-decoder" and self.condition != "unpackable",
            pooling=DEFAULT_POOLING[self.kind],
            has_template=True,
            linear_parameters=0 if self.condition == "int4, other layers" else 800,
            autocasts=self.condition != "bf16, a model of fp32",
            takes_keys=self.condition != "unpackable" and self.objective != "mlm",
        )
        return Facts(
            recipe=parse_recipe(self.recipe(model.name)),
            method_name=self.method,
            method=METHODS.get(self.method).facts,
            objective_name=self.objective,
            needs=OBJECTIVES.get(self.objective).needs,
            model=model,
            device="cpu",
            device_served=True,
            bf16_served=self.condition != "bf16, unserved",
            fp8_served=False,
            beneath=(FIRST,) if self.condition == "on an adapter" else (),
            base_sha256=FIRST.base_sha256,
        )

    def refused_axes(self) -> set[tuple[str, ...]]:
        """What must be refused, said a second time and not read off the rules."""
        axes: set[tuple[str, ...]] = set()
        if self.kind not in SERVED[self.objective]:
            axes.add(("objective", "model"))
        if self.method == "head" and (self.kind == "encoder-decoder" or self.objective in LM):
            axes.add(("method", "model"))  # of an encoder-decoder there is no head; a tied projection asks for untie
        if self.method == "prefix" and (
            self.kind == "encoder-decoder" or self.condition == "unpackable" or self.objective == "mlm"
        ):
            axes.add(("method", "model"))  # no attention of ours to put keys into, or no way in past the head
        if (self.method, self.objective) == ("head", "retrieve"):
            axes.add(("method", "objective"))  # vectors are the base's: there is no head to train
        if (self.method, self.condition) == ("head", "recompute"):
            axes.add(("train.recompute", "method"))
        if self.condition == "early stopping, unwatched":
            axes.add(("train.early_stopping", "data.validation"))
        if self.condition == "bf16, a model of fp32":
            axes.add(("precision", "model"))
        if self.condition == "bf16, unserved":
            axes.add(("precision", "hardware"))
        if self.condition.startswith("int4") and self.method not in ("lora", "dora"):
            axes.add(("precision", "method"))
        if self.condition == "on an adapter":
            if self.method != "lora":
                axes.add(("adapters", "method"))
            if self.objective not in LM:
                axes.add(("adapters", "objective"))
        if self.condition == "int4, other layers":
            axes.add(("precision", "model"))
        if self.condition == "fp8, unserved":
            axes.add(("precision", "hardware"))
            if self.method not in ("lora", "full"):
                axes.add(("precision", "method"))
        return axes

    def said(self, facts: Facts) -> set[str]:
        """What must be said of other ways of running, of SAID."""
        of_rows = {"one padded row"} if not facts.model.packable else set[str]()
        of_steps = {"runs twice"} if (self.objective, self.condition) == ("retrieve", "micro-batches") else set[str]()
        return of_rows | of_steps | COMPARED.get(self.objective, set())

    def pairs(self) -> set[tuple[tuple[int, str], ...]]:
        values = (self.method, self.objective, self.kind, self.condition)
        return set(combinations(enumerate(values), 2))


CELLS = [Cell(*values) for values in product(METHOD_NAMES, OBJECTIVE_NAMES, KINDS, CONDITIONS)]


def sample() -> list[Cell]:
    """Cells that run, chosen one by one for the most pairs not met before, until every pair that can be is met."""
    able = [cell for cell in CELLS if not cell.refused_axes()]
    missing = set[tuple[tuple[int, str], ...]]().union(*(cell.pairs() for cell in able))
    chosen: list[Cell] = []
    while missing:
        best = max(able, key=lambda cell: len(cell.pairs() & missing))
        chosen.append(best)
        missing -= best.pairs()
    return chosen


def test_the_names_are_registered() -> None:
    for name in METHOD_NAMES:
        assert METHODS.get(name).facts.summary
    for name in OBJECTIVE_NAMES:
        assert OBJECTIVES.get(name).needs.summary


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_cell_runs_is_substituted_or_is_refused(method: str, objective: str) -> None:
    """Of every kind of model and condition; one test for all of these, of which there are thousands."""
    for cell in (Cell(method, objective, kind, condition) for kind, condition in product(KINDS, CONDITIONS)):
        facts = cell.facts()
        conflicts, substitutions = rules.judge(facts)
        assert {conflict.axes for conflict in conflicts} == cell.refused_axes(), cell
        for conflict in conflicts:
            assert conflict.reason, cell
            assert conflict.remedy, cell
            assert "{" not in conflict.reason + conflict.remedy, cell
        said = {part for part in SAID if any(part in text for text in substitutions)}
        assert said == cell.said(facts), cell


@pytest.mark.parametrize("cell", sample(), ids=str)
def test_a_cell_that_runs_takes_two_steps(
    cell: Cell, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue("masked_bert" if cell.objective == "mlm" else FOLDERS[cell.kind])
    if cell.condition == "unpackable":
        monkeypatch.setattr("tunesmith.facts.is_packable", lambda meta: False)
    recipe = cell.recipe(str(folder))
    del recipe["data"]["train"]
    if cell.condition == "on an adapter":
        first = api.train(recipe, data={"train": ROWS[cell.objective]}, out=tmp_path / "first").path
        recipe["adapters"] = [str(first)]
    planned = api.plan(recipe, data={"train": ROWS[cell.objective]})
    assert planned.placement.packed == cell.facts().model.packable
    result = api.train(recipe, data={"train": ROWS[cell.objective]}, out=tmp_path / "run")
    lines = (result.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 2
    assert (result.path / "model" / "tunesmith.json").is_file()
    assert all(math.isfinite(record["value"]) for record in result.records)
    assert bool(result.records) == ("validation" in recipe["data"])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_lists_of_labels_take_two_steps(method: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A second kind of rows of `classify`, for each method on one kind of model, the next on the other."""
    kind: ModelKind = ("decoder", "encoder")[METHOD_NAMES.index(method) % 2]
    folder: Path = request.getfixturevalue(FOLDERS[kind])
    recipe = Cell(method, "classify", kind, "plain").recipe(str(folder))
    del recipe["data"]["train"]
    result = api.train(recipe, data={"train": LISTS, "test": HELD_LISTS}, out=tmp_path / "run")
    assert {"micro_f1", "macro_f1", "accuracy", "loss"} <= {record["metric"] for record in result.records}
    assert all(math.isfinite(record["value"]) for record in result.records)
