"""No key of a recipe is read by nothing: each is changed, and what the run leaves or where it runs changes with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tunesmith import api, sandbox
from tunesmith.errors import RefusedError, TunesmithError
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import Recipe
from tunesmith.rundir import read_json, sha256_file

# The built-in ones by name: what another test registers is not ours to judge.
METHOD_NAMES = ("adalora", "dora", "full", "head", "ia3", "loha", "lokr", "lora", "oft", "partial", "vera")
REGISTERED = {
    "method": (METHODS, METHOD_NAMES),
    "objective": (
        OBJECTIVES,
        (
            *("classify", "classify_lm", "distill", "mlm", "multiple_choice", "pair", "pretrain", "regress"),
            *("rerank", "retrieve", "sft", "span", "tag"),
        ),
    ),
}
BASE: dict[str, Any] = {
    "model": "llama",
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
    "objective": "sft",
    "method": {"name": "lora", "rank": 4},
    "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01},
    "precision": "fp32",
    "place": {"device": "cpu", "threads": 1},
    "evaluate": {"max_new_tokens": 4},
}
GROUPED = {"evaluate.by": ["of"], "evaluate.smallest_group": 1}
STOPPING = {"train.evaluate_every": 1, "train.early_stopping": {"patience": 1, "min_delta": 1e6}}
SET = {"path": "train.jsonl"}
TOLD_APART = {"data.train": "two.jsonl", "data.validation": None, "data.test": None}

LABELLED = {
    **dict.fromkeys(("data.validation", "data.test", "evaluate.max_new_tokens")),
    "data.train": "both.jsonl",
    "data.format": "text+label",
    "objective": {"name": "classify"},
}
JUDGED = {**LABELLED, "data.validation": 0.3, "data.test": "labelled.jsonl"}
UNEVEN = {**LABELLED, "data.train": [{"path": "both.jsonl", "limit": 11}]}
IN_WINDOWS = {**LABELLED, "train.sequence_length": 8, "objective": {"name": "classify", "long": "windows"}}
ANSWERING = {**LABELLED, "objective": {"name": "classify_lm"}}
UNSURE = {**LABELLED, "objective": {"name": "classify_lm", "score": "mean"}}  # by sums the tiny model is certain
LISTED = {**LABELLED, "data.format": "text+labels"}
SCORED = {**LABELLED, "data.format": "text+score", "objective": {"name": "regress"}}
TAGGED = {**LABELLED, "data.format": "tokens+tags", "objective": {"name": "tag"}}
ANSWERED = {**LABELLED, "data.format": "query+positive", "objective": {"name": "retrieve"}, "data.test": "asked.jsonl"}
MINED = {**ANSWERED, "objective": {"name": "retrieve", "negatives": 1, "margin": 2.0}}
RANKED = {**ANSWERED, "objective": {"name": "rerank", "negatives": 1, "depth": 4}}
PAIRED = {**LABELLED, "data.format": "text_a+text_b+label", "objective": {"name": "pair"}}
HIDDEN = {**LABELLED, "data.format": "text", "objective": {"name": "mlm"}, "model": "masked"}
TEXTS = {**LABELLED, "data.format": "text", "objective": {"name": "pretrain"}}
TAUGHT = {"objective": {"name": "distill"}, "teacher": "other-llama"}
CHOSEN = {**LABELLED, "data.format": "question+choices+label", "objective": {"name": "multiple_choice"}}
ASKED = {
    **LABELLED,
    "data.format": "context+question+answers",
    "objective": {"name": "span"},
    "train.sequence_length": 24,
}
LIKELY = {"sft": {"objective": {"name": "sft"}}, "pretrain": TEXTS, "mlm": HIDDEN, "distill": TAUGHT}
PARTIAL = {"method": {"name": "partial"}}
# Of a tiny model: no programs, but they are the text of a string, whose letters `judges` counts.
TESTED = {
    "evaluate.base": False,
    "train.max_steps": 1,
    "evaluate.code": {"tests": "judges", "before": "opens", "samples": 4, "temperature": 5.0},
}
DRAWN = {"evaluate.decoding": {"metric": "chrf", "temperature": [2.0]}}


@dataclass(frozen=True)
class Change:
    """A key's other value, and what else both runs have beside BASE."""

    to: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


CHANGES: dict[str, Change] = {
    "model": Change("other-llama"),
    "data.train": Change("other.jsonl"),
    "data.train.path": Change([{"path": "other.jsonl"}], {"data.train": [SET]}),
    "data.train.weight": Change([{**SET, "weight": 0.5}, "other.jsonl"], {"data.train": [SET, "other.jsonl"]}),
    "data.train.limit": Change([{**SET, "limit": 5}], {"data.train": [SET]}),
    "data.train.format": Change(
        [{"path": "two.jsonl", "format": "alpaca"}],
        {"data.train": [{"path": "two.jsonl", "format": "prompt+completion"}]},
    ),
    "data.train.columns": Change([{"path": "train.jsonl", "columns": {"completion": "remark"}}], {"data.train": [SET]}),
    "data.validation": Change(0.3),
    "data.test": Change("other.jsonl"),
    "data.fold": Change({"number": 1, "of": 3}),
    "data.fold.number": Change(2, {"data.fold": {"number": 1, "of": 3}}),
    "data.fold.of": Change(2, {"data.fold": {"number": 1, "of": 3}}),
    "data.fold.by": Change("of", {"data.fold": {"number": 1, "of": 2}}),
    "data.corpus": Change({"path": "both.jsonl", "columns": {"id": "query"}}, ANSWERED),
    "data.corpus.path": Change(
        {"path": "other.jsonl", "columns": {"text": "remark"}},
        {**ANSWERED, "data.corpus": {"path": "train.jsonl", "columns": {"text": "remark"}}},
    ),
    "data.corpus.columns": Change(
        {"path": "train.jsonl", "columns": {"text": "prompt"}},
        {**ANSWERED, "data.corpus": {"path": "train.jsonl", "columns": {"text": "remark"}}},
    ),
    "data.format": Change("alpaca", {**TOLD_APART, "data.format": "prompt+completion"}),
    "data.columns": Change({"completion": "remark"}),
    "data.template": Change("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"),
    "data.allow": Change(["leaks"], {"data.test": "leaking.jsonl"}),
    "objective": Change("classify_lm", LABELLED),
    "method": Change({"name": "lora", "rank": 8}),
    "method.head.untie": Change(True, {"method": {"name": "head"}}),
    "method.partial.top": Change(2, PARTIAL),
    "method.partial.layers": Change([0, 0], PARTIAL),
    "method.partial.parameters": Change(["mlp"], PARTIAL),
    "method.partial.only": Change("norms", PARTIAL),
    "method.partial.gradual": Change(1.0, {"method": {"name": "partial", "top": 2}}),
    "method.lora.rank": Change(8),
    "method.lora.alpha": Change(1.0),
    "method.lora.targets": Change(["q_proj"]),
    "method.lora.rslora": Change(True),
    "method.lora.ranks": Change({"q_proj": 2}),
    "method.lora.plus": Change(16.0),
    "method.adalora.rank": Change(8, {"method": {"name": "adalora"}}),
    "method.adalora.alpha": Change(1.0, {"method": {"name": "adalora"}}),
    "method.adalora.targets": Change(["q_proj"], {"method": {"name": "adalora"}}),
    "method.adalora.start_rank": Change(20, {"method": {"name": "adalora"}}),
    "method.dora.rank": Change(8, {"method": {"name": "dora"}}),
    "method.dora.alpha": Change(1.0, {"method": {"name": "dora"}}),
    "method.dora.targets": Change(["q_proj"], {"method": {"name": "dora"}}),
    "method.dora.rslora": Change(True, {"method": {"name": "dora"}}),
    "method.dora.ranks": Change({"q_proj": 2}, {"method": {"name": "dora"}}),
    "method.dora.plus": Change(16.0, {"method": {"name": "dora"}}),
    "method.dora.init": Change("gaussian", {"method": {"name": "dora"}}),
    "method.lora.init": Change("pissa"),
    "method.dora.tokens": Change(["colour"], {"method": {"name": "dora"}}),
    "method.lora.tokens": Change(["colour"]),
    "method.ia3.targets": Change(["q_proj"], {"method": {"name": "ia3"}}),
    "method.ia3.feedforward": Change(["up_proj"], {"method": {"name": "ia3"}}),
    "method.loha.rank": Change(8, {"method": {"name": "loha"}}),
    "method.loha.alpha": Change(1.0, {"method": {"name": "loha"}}),
    "method.loha.targets": Change(["q_proj"], {"method": {"name": "loha"}}),
    "method.lokr.rank": Change(1, {"method": {"name": "lokr"}}),
    "method.lokr.alpha": Change(1.0, {"method": {"name": "lokr"}}),
    "method.lokr.targets": Change(["q_proj"], {"method": {"name": "lokr"}}),
    "method.oft.block_size": Change(8, {"method": {"name": "oft"}}),
    "method.oft.targets": Change(["q_proj"], {"method": {"name": "oft"}}),
    "method.vera.rank": Change(8, {"method": {"name": "vera"}}),
    "method.vera.targets": Change(["q_proj"], {"method": {"name": "vera"}}),
    "objective.classify.pooling": Change("first", LABELLED),
    "objective.classify.hidden": Change(8, LABELLED),
    "objective.classify.threshold": Change(0.2, LISTED),
    "objective.classify.long": Change("windows", {**LABELLED, "train.sequence_length": 8}),
    "objective.classify.stride": Change(2, IN_WINDOWS),
    "objective.classify_lm.prompt": Change("{text}?", ANSWERING),
    "objective.classify_lm.score": Change("mean", ANSWERING),
    "objective.regress.long": Change("windows", {**SCORED, "train.sequence_length": 8}),
    "objective.regress.stride": Change(
        2, {**SCORED, "train.sequence_length": 8, "objective": {"name": "regress", "long": "windows"}}
    ),
    "objective.regress.pooling": Change("first", SCORED),
    "objective.regress.hidden": Change(8, SCORED),
    "objective.tag.hidden": Change(8, TAGGED),
    "objective.pair.pooling": Change("first", PAIRED),
    "objective.pair.hidden": Change(8, PAIRED),
    "objective.pair.encode": Change("together", PAIRED),
    "objective.pair.compare": Change("vectors", PAIRED),
    "objective.retrieve.negatives": Change(2, MINED),
    "objective.retrieve.margin": Change(0.01, MINED),
    "objective.rerank.pooling": Change("first", RANKED),
    "objective.rerank.hidden": Change(8, RANKED),
    "objective.rerank.negatives": Change(2, RANKED),
    "objective.rerank.depth": Change(3, RANKED),
    "objective.rerank.query_prefix": Change("query: ", RANKED),
    "objective.rerank.passage_prefix": Change("passage: ", RANKED),
    "objective.retrieve.pooling": Change("first", ANSWERED),
    "objective.retrieve.temperature": Change(0.5, ANSWERED),
    "objective.retrieve.symmetric": Change(True, ANSWERED),
    "objective.retrieve.query_prefix": Change("query: ", ANSWERED),
    "objective.retrieve.passage_prefix": Change("passage: ", ANSWERED),
    "objective.distill.divergence": Change("reverse_kl", TAUGHT),
    "objective.distill.beta": Change(0.1, {**TAUGHT, "objective": {"name": "distill", "divergence": "jsd"}}),
    "objective.distill.temperature": Change(2.0, TAUGHT),
    "objective.distill.teacher_share": Change(0.9, TAUGHT),
    "objective.distill.top_k": Change(4, TAUGHT),
    "objective.distill.hidden": Change(1.0, TAUGHT),
    **{f"objective.{name}.learn": Change("all", LIKELY[name]) for name in ("sft", "distill")},
    **{f"objective.{name}.weight_column": Change("worth", beside) for name, beside in LIKELY.items()},
    **{f"objective.{name}.neftune_alpha": Change(50.0, beside) for name, beside in LIKELY.items()},
    "objective.mlm.mlm_probability": Change(0.5, HIDDEN),
    "objective.multiple_choice.pooling": Change("first", CHOSEN),
    "objective.multiple_choice.hidden": Change(8, CHOSEN),
    "objective.span.stride": Change(3, ASKED),
    "objective.span.max_answer_tokens": Change(2, {**ASKED, "data.validation": 0.3}),
    "objective.span.hidden": Change(8, ASKED),
    **{
        f"objective.{name}.{key}": Change(value, beside)
        for name, beside in (("classify", LABELLED), ("classify_lm", UNSURE), ("tag", TAGGED), ("pair", PAIRED))
        for key, value in (("class_weights", {"red": 5.0}), ("focal_gamma", 2.0), ("label_smoothing", 0.1))
    },
    "adapters": Change(["first"]),
    "teacher": Change("first", TAUGHT),
    "train.balance": Change("label", UNEVEN),
    "train.balance.by": Change("worth", {**UNEVEN, "train.balance": {"by": "of"}}),
    "train.balance.strength": Change(0.5, {**UNEVEN, "train.balance": {"by": "label"}}),
    "train.curriculum": Change({"by": "length"}),
    "train.curriculum.by": Change("worth", {"train.curriculum": {"by": "length"}}),
    "train.curriculum.descending": Change(True, {"train.curriculum": {"by": "worth"}}),
    "train.curriculum.epochs": Change(9, {"train.curriculum": {"by": "worth"}, "train.max_steps": 9}),
    "train.epochs": Change(2, {"train.max_steps": None, "train.epochs": 1}),
    "train.max_steps": Change(3),
    "train.batch_size": Change(3),
    "train.batch_tokens": Change(90, {"train.batch_size": None, "train.batch_tokens": 140}),
    "train.micro_batch_size": Change(2),
    "train.dropout": Change(0.5),
    "train.recompute": Change(True),
    "train.sequence_length": Change(40, {"data.allow": ["truncated", "masked"]}),
    "train.learning_rate": Change(0.02),
    "train.head_learning_rate": Change(0.03, LABELLED),
    "train.schedule": Change("cosine"),
    "train.warmup": Change(0.5),
    "train.weight_decay": Change(0.5),
    "train.optimizer": Change("adamw_8bit"),
    "train.clip": Change(0.001),
    "train.save_every": Change(3),
    "train.evaluate_every": Change(2),
    "train.early_stopping": Change({"patience": 1, "min_delta": 1e6}, {"train.evaluate_every": 1}),
    "train.early_stopping.patience": Change(2, STOPPING),
    "train.early_stopping.min_delta": Change(0.0, STOPPING),
    "train.early_stopping.metric": Change("exact_match", STOPPING),
    "precision": Change("bf16"),
    "place.device": Change("cuda"),
    "place.threads": Change(2),
    "place.workers": Change(2),
    "place.compile": Change(True),
    "evaluate.metrics": Change(["exact_match"]),
    "evaluate.limit": Change(1),
    "evaluate.keep": Change(1),
    "evaluate.base": Change(False),
    "evaluate.by": Change(["remark"], GROUPED),
    "evaluate.smallest_group": Change(2, GROUPED),
    "evaluate.calibrate": Change("temperature", {**JUDGED, "data.validation": "many.jsonl"}),
    "evaluate.conformal": Change(0.5, JUDGED),
    "evaluate.conformal.coverage": Change(0.75, {**JUDGED, "evaluate.conformal": {"coverage": 0.2}}),
    "evaluate.conformal.sets": Change("aps", {**JUDGED, "evaluate.conformal": {"coverage": 0.7}}),
    "evaluate.cluster": Change("of"),
    "evaluate.max_new_tokens": Change(2),
    "evaluate.code": Change(None, TESTED),
    "evaluate.code.tests": Change("shuts", TESTED),
    "evaluate.code.before": Change("remark", TESTED),
    "evaluate.code.entry_point": Change("remark", TESTED),
    "evaluate.code.samples": Change(5, TESTED),
    "evaluate.code.temperature": Change(0.01, TESTED),
    "evaluate.decoding": Change({"metric": "chrf"}),
    "evaluate.decoding.metric": Change("exact_match", DRAWN),
    "evaluate.decoding.temperature": Change(5.0, DRAWN),
    "evaluate.decoding.top_p": Change(0.1, DRAWN),
    "evaluate.decoding.top_k": Change(1, DRAWN),
    "evaluate.decoding.limit": Change(2, DRAWN),
    "report_to": Change("tensorboard"),
    "seed": Change(18),
    "out": Change("elsewhere"),
}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models of keys that a field's type is made of; a registered name's options are walked by that name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_config.get("extra") == "forbid":
            yield annotation
        return
    for argument in get_args(annotation):
        yield from models_in(argument)


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        key = f"{above}{name}"
        below = [k for found in models_in(info.annotation) for k in keys_of(found, f"{key}.")]
        # A key that only holds others is read where they are.
        if not below or info.annotation not in (found for found in models_in(info.annotation)):
            yield key
        yield from below
        if key in REGISTERED:
            registry, names = REGISTERED[key]
            for registered in names:
                yield from keys_of(registry.get(registered).Options, f"{key}.{registered}.")


# What has but one value on this machine: another one is refused.
REFUSED = ("place.compile", "place.device", "train.optimizer")
KEYS = sorted(set(keys_of(Recipe)))


def with_changes(recipe: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(recipe))
    for key, value in changes.items():
        *above, last = key.split(".")
        part = made
        for name in above:
            part = part.setdefault(name, {})
        part[last] = value
    return made


def of_set(key: str) -> str:
    """Where a key of one training set or corpus, or of a method's options, stands in the recipe."""
    if key.startswith(("data.train.", "data.corpus.")):
        return ".".join(key.split(".")[:2])
    return ".".join(part for at, part in enumerate(key.split(".")) if at != 1 or part not in {*METHODS, *OBJECTIVES})


@pytest.fixture(scope="module")
def place(tiny_llama: Path, masked_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three bases and rows in a few formats."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("keys")
    shutil.copytree(tiny_llama, folder / "llama")
    shutil.copytree(masked_bert, folder / "masked")
    shutil.copytree(tiny_llama, folder / "other-llama")
    weights = load_file(folder / "llama" / "model.safetensors")
    save_file({n: w + 0.01 * torch.ones_like(w) for n, w in weights.items()}, folder / "other-llama/model.safetensors")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(start: int, count: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": f"colour {i}?",
                "completion": "red" if i % 2 else "a green one",
                "remark": f"as {i}",
                "of": i // 2,
                "worth": i % 5 + 1,
                "opens": 'x = r"""\\',
                "shuts": '"""',
                "judges": '"""\nassert sum(map(ord, x)) % 2',
            }
            for i in range(start, start + count)
        ]

    write("train.jsonl", asked(0, 12))
    given = {**BASE, "model": str(folder / "llama"), "data": {"train": str(folder / "train.jsonl")}}
    api.train(given, out=folder / "first")
    write("other.jsonl", asked(100, 9))
    write("validation.jsonl", asked(200, 4))
    write("test.jsonl", asked(300, 3))
    write("two.jsonl", [{**row, "instruction": row["remark"], "output": row["prompt"]} for row in asked(0, 12)])
    both = [
        {**row, "text": row["prompt"], "label": row["completion"], "labels": row["completion"].split()}
        for row in asked(0, 12)
    ]
    words = [{"tokens": row["prompt"].split(), "tags": ["O", row["completion"].split()[-1]]} for row in both]
    scores = [{"score": len(row["completion"]) + index % 3} for index, row in enumerate(both)]
    parts = zip(both, scores, words, strict=True)
    both = [
        {**row, **score, **own, **_question(row), **_about(row), "text_a": row["prompt"], "text_b": row["remark"]}
        for row, score, own in parts
    ]
    write("both.jsonl", both)
    write("labelled.jsonl", [{"text": row["prompt"], "label": row["completion"]} for row in asked(500, 4)])
    write("many.jsonl", [{"text": row["prompt"], "label": row["completion"]} for row in asked(600, 20)])
    write("leaking.jsonl", asked(0, 3))
    write("asked.jsonl", [_question(row) for row in asked(400, 5)])
    return folder


def _about(row: dict[str, Any]) -> dict[str, Any]:
    context, answer = f"of {row['prompt']} comes {row['completion']}", row["completion"]
    return {"context": context, "question": "?", "answers": [answer], "choices": ["none", answer, row["prompt"]]}


def _question(row: dict[str, Any]) -> dict[str, Any]:
    return {"query": f"what is {row['remark']}?", "positive": f"it is {row['completion']} {row['of']}"}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What was found for each recipe: many keys are compared with one and the same run."""
    return {}


def outcome(recipe: dict[str, Any], place: Path, seen: dict[str, Any]) -> dict[str, Any]:
    """What is left of the run that `recipe` asks for: its placement and the hash of each result, or the refusal."""
    asked = json.dumps(recipe, sort_keys=True)
    if asked not in seen:
        folder = place / "runs" / str(len(seen))
        seen[asked] = ran(recipe, place, folder)
    found: dict[str, Any] = seen[asked]
    return found


def ran(recipe: dict[str, Any], place: Path, folder: Path) -> dict[str, Any]:
    named = recipe.get("out")
    run = place / named if named else folder
    try:
        api.train(recipe, out=None if named else run)
    except TunesmithError as error:
        return {"refused": str(error)}
    results = [
        "metrics.jsonl",
        "evaluation.json",
        *(p.name for p in run.glob("decoding.json")),
        *(f"predictions/{p.name}" for p in run.glob("predictions/*")),
    ]
    trackers = run / "trackers.json"
    trained = [p for p in (run / "model").glob("*.safetensors")]
    return {
        "placement": read_json(run / "plan.json")["placement"],
        "folder": named,
        "trackers": sorted(read_json(trackers)) if trackers.exists() else [],
        **{name: sha256_file(run / name) for name in results},
        **{p.name: sha256_file(p) for p in trained},
    }


def test_every_key_has_a_change() -> None:
    assert sorted(CHANGES) == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_changes_the_run(
    key: str, place: Path, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    change = CHANGES[key]
    if change.beside is TESTED:
        try:
            sandbox.check()
        except RefusedError as error:
            pytest.skip(str(error))
    before = with_changes(BASE, change.beside)
    after = with_changes(before, {of_set(key): change.to})
    assert before != after
    found = outcome(before, place, seen)
    assert "refused" not in found or key in ("data.allow", "method.head.untie"), found
    other = outcome(after, place, seen)
    assert other != found
    assert "refused" not in other or key in REFUSED, other
