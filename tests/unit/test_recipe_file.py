"""Recipes from YAML and overrides: numbers, places, nearest keys, other tools' spellings, and the way back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, Field, ValidationError

from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import Data, Evaluate, Place, Recipe, Train, TrainingSet
from tunesmith.recipe_file import (
    Origin,
    check_options,
    defaults_taken,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
    resolve_paths,
    run_name,
)
from tunesmith.recipe_keys import Choice, Strict
from tunesmith.recipe_problems import spellings
from tunesmith.recipe_schema import key_paths
from tunesmith.yaml_text import read_scalar, read_yaml, write_yaml

BASE = "model: m\ndata:\n  train: a.jsonl\nobjective: sft\nmethod: lora\n"


class Lora(Strict):
    """Stands for a method's options."""

    rank: int = Field(8, gt=0)
    alpha: float | None = None
    targets: list[str] | None = None


class Loose(Strict):
    """Forgets to forbid unknown keys, and has a key that must be given."""

    model_config = ConfigDict(extra="ignore")

    reward: str


def load(folder: Path, text: str | bytes, *overrides: str) -> tuple[Recipe, Origin]:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(file, overrides)


def refusal(folder: Path, text: str | bytes, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    return caught.value


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("+1e+5", 1e5),
        (".5", 0.5),
        (".5e3", 500.0),
        ("1.e3", 1000.0),
        ("-3", -3),
        ("1_000", 1000),
        ("012", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("on", "on"),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1e-4x", "1e-4x"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_unquoted_words(text: str, value: Any) -> None:
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)
    assert read_yaml(f"a: {text}", "x").value == {"a": value}
    assert read_yaml(f"a: '{text}'", "x").value == {"a": text}


def test_learning_rate_is_a_number_in_the_file_and_in_overrides(tmp_path: Path) -> None:
    recipe, _ = load(tmp_path, BASE + "train: {learning_rate: 1e-4}\n")
    assert recipe.train.learning_rate == 1e-4
    recipe, _ = load(
        tmp_path, BASE + "train: {learning_rate: 1e-4}\n", "train.learning_rate=2E-4", "train.max_steps=1e2"
    )
    assert (recipe.train.learning_rate, recipe.train.max_steps) == (2e-4, 100)


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("model: m\ndata:\n\ttrain: a\n", "recipe.yaml:3:1", "tab"),
        ("model: m: n\n", "recipe.yaml:1:9", "`:`"),
        ("model: m\n  data: 3\n", "recipe.yaml:2:7", "indent"),
        ("model: [a, b\n", "recipe.yaml:2:1", "expected"),
        ("model: 'm\n", "recipe.yaml:2:1", "end of stream"),
        ("model: *x\n", "recipe.yaml:1:8", "undefined alias"),
        ("model: !!python/object:os.system x\n", "recipe.yaml:1:8", "tags"),
        ("model: &a !!python/object:os.system x\n", "recipe.yaml:1:8", "tags"),
        ("model: m\n<<: {seed: 1}\n", "recipe.yaml:2:1", "merge"),
        ("[a]: m\n", "recipe.yaml:1:1", "one word"),
        ("model: m\n---\nmodel: n\n", "recipe.yaml:2:1", "second document"),
        ("model: " + "[" * 60 + "]" * 60, "recipe.yaml:1", "levels"),
        ("model: \x07\n", "recipe.yaml", "not valid YAML"),
    ],
)
def test_broken_yaml_has_line_and_column(tmp_path: Path, text: str, place: str, word: str) -> None:
    error = refusal(tmp_path, text)
    assert error.cause.startswith(place + ":")
    assert word in error.cause
    assert "\n" not in error.cause
    assert error.remedy


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "train:\n  epochs: 1\n  epochs: 2\nseed: 1\nseed: 2\n")
    assert error.cause.splitlines() == [
        "recipe.yaml:8: train.epochs is given twice, first on line 7",
        "recipe.yaml:10: seed is given twice, first on line 9",
    ]


def test_bombs_end_quickly(tmp_path: Path) -> None:
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{names[i]}'] * 9)}]" for i, n in enumerate(names[1:])]
    assert "aliases" in refusal(tmp_path, "\n".join(lines)).cause
    assert "aliases" in refusal(tmp_path, "a: &a [*a]").cause
    assert "larger than 1 MB" in refusal(tmp_path, "a: " + "x" * 1_000_001).cause
    assert "larger than 1 MB" in refusal(tmp_path, b"\xff" * 1_000_001).cause


def test_an_alias_is_its_value(tmp_path: Path) -> None:
    recipe, _ = load(tmp_path, "model: &m x\ndata: {train: *m}\nobjective: sft\nmethod: lora\n")
    assert recipe.data.train == "x"


# ---------------------------------------------------------------- files


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    assert refusal(tmp_path, "").cause.endswith("recipe.yaml is empty")
    assert refusal(tmp_path, "# nothing\n").cause.endswith("recipe.yaml is empty")
    assert refusal(tmp_path, "- model: m\n").cause.endswith('is not a recipe: it holds [{"model": "m"}]')
    assert refusal(tmp_path, "three\n").cause.endswith('is not a recipe: it holds "three"')
    assert refusal(tmp_path, b"model: m\nseed: \xff\n").cause == "recipe.yaml:2: not UTF-8 text"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    load(tmp_path, BASE)
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "recpie.yaml")
    assert caught.value.remedy == f"did you mean {tmp_path / 'recipe.yaml'}?"
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "my_run.yaml")  # the ending is all that they share
    assert caught.value.remedy == "check the path"
    with pytest.raises(InputError, match="is a folder, not a recipe"):
        load_recipe(tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml")


def test_a_file_of_rows_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "tickets.jsonl")
    assert caught.value.cause == f"{tmp_path / 'tickets.jsonl'} holds rows and is no recipe"
    assert caught.value.remedy == "write a recipe that has data: {train: tickets.jsonl}"


# ---------------------------------------------------------------- problems


def test_a_wrong_value_in_one_line(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "train:\n  epochs: three\n")
    assert error.cause == 'recipe.yaml:7: train.epochs must be a number above 0, not "three"'


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("seed: -1", "seed must be a whole number of at least 0 and below 2147483648, not -1"),
        ("seed: true", "seed must be a whole number of at least 0 and below 2147483648, not true"),
        ("train: {curriculum: {by: 3}}", "train.curriculum.by must be text, not 3"),
        ("out: 3", "out must be a path, not 3"),
        ("precision: fp16", 'precision must be one of auto, fp32, bf16, fp8, int4, not "fp16"'),
        ("train: {schedule: cosin}", 'train.schedule must be one of linear, cosine, constant, not "cosin"'),
        ("train: {epochs: true}", "train.epochs must be a number above 0, not true"),
        ("train: {clip: .inf}", "train.clip must be a finite number, not inf"),
        ("train: {clip: nan}", 'train.clip must be a number above 0, not "nan"'),
        ("train: {batch_size: 1.5}", "train.batch_size must be a whole number above 0, not 1.5"),
        ("train: {optimizer: sgd}", 'train.optimizer must be one of adamw, adamw_8bit, not "sgd"'),
        ("train: {recompute: 3}", "train.recompute must be true or false, not 3"),
        (
            "train: {epochs: 1, max_steps: 2}",
            "train: epochs and max_steps exclude each other; keep one (null unsets the other)",
        ),
        ("train: fast", 'train must be a set of keys (epochs, max_steps, batch_size, batch_tokens, ...), not "fast"'),
        ("evaluate: {metrics: [accuracy, 3]}", "evaluate.metrics.1 must be text, not 3"),
    ],
)
def test_wrong_values(tmp_path: Path, line: str, cause: str) -> None:
    assert refusal(tmp_path, BASE + line).cause == "recipe.yaml:6: " + cause


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ("{train: []}", "data.train must be text or a list of at least 1 (each item text or a set of keys"),
        ("{train: ''}", "data.train must be text or a list"),
        ("{train: a, corpus: {path: }}", "data.corpus.path is empty; it must be text"),
        (
            "{train: [{path: a, weight: 0}]}",
            "data.train.0.weight must be a number of at least 0.001 and at most 1000, not 0",
        ),
        ("{train: [{path: a, weight: 1e-9}]}", "data.train.0.weight must be a number of at least 0.001"),
        ("{train: [{weight: 2}]}", "data.train.0.path is missing"),
        ("{train: [{path: a, wieght: 2}]}", "unknown key data.train.0.wieght"),
        ("{train: a, validation: 1.5}", "data.validation must be text or a number above 0 and below 1, not 1.5"),
        ("{train: a, test: {../../x: b}}", 'data.test.../../x: "../../x" must be a name of letters, digits'),
        ("{train: a, test: {easy: 3}}", "data.test.easy must be text, not 3"),
        ("{train: a, allow: [leak]}", "data.allow.0 must be one of leaks, masked, truncated, unknown_labels"),
    ],
)
def test_wrong_data(tmp_path: Path, data: str, cause: str) -> None:
    error = refusal(tmp_path, f"model: m\nobjective: sft\nmethod: lora\ndata: {data}\n")
    assert error.cause.startswith("recipe.yaml:4: " + cause)


def test_missing_keys_come_with_an_example(tmp_path: Path) -> None:
    error = refusal(tmp_path, "seed: 1")
    assert error.cause.splitlines() == [
        "recipe.yaml: model is missing: add `model: smollm2-135m-instruct`",
        "recipe.yaml: data is missing: add `data: {train: tickets.jsonl}`",
        "recipe.yaml: objective is missing: add `objective: sft`",
        "recipe.yaml: method is missing: add `method: lora`",
    ]


def test_every_problem_is_listed_in_the_order_of_lines(tmp_path: Path) -> None:
    text = """
train: {epochs: three, lerning_rate: 1e-4}
num_train_epochs: 3
packing: true
epochs: 3
train.max_steps: 4
Micro-Batch-Size: 3
training_args:
  per_device_train_batch_size: 8
xyzzy: 1
"""
    error = refusal(tmp_path, BASE + text)
    lines = [line.removeprefix("recipe.yaml:") for line in error.cause.splitlines()]
    assert lines[:7] == [
        "7: unknown key train.lerning_rate: did you mean train.learning_rate?",
        '7: train.epochs must be a number above 0, not "three"',
        "8: num_train_epochs has another name here: write train.epochs",
        "9: packing has no key here: examples are always packed, each attending only to itself",
        "10: epochs does not belong here: write train.epochs",
        "11: unknown key 'train.max_steps': a dotted key works on the command line only; "
        "write `train: {max_steps: ...}`",
        "12: Micro-Batch-Size does not belong here: write train.micro_batch_size",
    ]
    assert lines[7].startswith("13: unknown key training_args: known here: adapters, data, evaluate, method")
    assert lines[8].startswith("14: per_device_train_batch_size has another name here: write train.batch_size (")
    assert lines[9].startswith("15: unknown key xyzzy: known here")
    assert error.remedy == "mend these 10; docs/recipes.md has every key"


def test_free_names_are_not_keys(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: a, columns: {lora_r: prompt}, test: {packing: b}}\nobjective: sft\nmethod: lora\n"
    recipe, _ = load(tmp_path, text)
    assert recipe.data.columns == {"lora_r": "prompt"}


def test_spellings_lead_to_keys_that_exist() -> None:
    keys = set(key_paths(Recipe.model_json_schema()))
    options = {f"method.{option}" for option in METHODS.get("lora").Options.model_fields}
    options |= {f"objective.{option}" for option in OBJECTIVES.get("classify").Options.model_fields}
    wrong = {key: target for key, (target, _) in spellings().items() if target and target not in keys | options}
    assert not wrong
    assert not set(spellings()) & keys, "a key of the recipe needs no translation"
    asked = """num_train_epochs per_device_train_batch_size gradient_accumulation_steps lora_r lora_alpha lora_dropout
    lora_target target_modules cutoff_len max_length max_seq_length sequence_len base_model model_name_or_path dataset
    dataset_name datasets output_dir val_size val_set_size warmup_ratio lr_scheduler_type bf16 fp16 load_in_4bit
    quantization_bit save_steps eval_steps logging_steps resume_from_checkpoint sample_packing packing neat_packing
    gradient_checkpointing adapter rl stage finetuning_type num_epochs rlhf_type tuner_type eval_strategy
    truncation_strategy mask_history lora_rank"""
    assert set(asked.split()) <= set(spellings())


# ---------------------------------------------------------------- overrides


def test_overrides(tmp_path: Path) -> None:
    recipe, origin = load(
        tmp_path, BASE, "train.epochs=1", "method.rank=8", "data.test=x.jsonl", "evaluate.metrics=[chrf, rouge_l]"
    )
    assert recipe.train.epochs == 1
    assert recipe.method == Choice(name="lora", rank=8)  # type: ignore[call-arg]
    assert recipe.data.test == "x.jsonl"
    assert recipe.evaluate.metrics == ["chrf", "rouge_l"]
    assert origin.place("train.epochs") == origin.place("method.rank") == "command line: "
    assert origin.place("method.name") == "recipe.yaml:5: "


def test_a_choice_set_whole_loses_its_options(tmp_path: Path) -> None:
    text = BASE.replace("method: lora", "method: {name: lora, rank: 16}")
    assert load(tmp_path, text, "method=head")[0].method == Choice(name="head")
    assert load(tmp_path, text, "method.rank=4")[0].method.options == {"rank": 4}


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    text = BASE.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, limit: 5}]")
    recipe, _ = load(tmp_path, text, "data.train.0.weight=2", "data.train.1.limit=null")
    assert recipe.data.train == [TrainingSet(path="a.jsonl", weight=2), TrainingSet(path="b.jsonl")]


def test_null_unsets(tmp_path: Path) -> None:
    recipe, _ = load(tmp_path, BASE + "train: {epochs: 3}\n", "train.epochs=null", "train.max_steps=5")
    assert (recipe.train.epochs, recipe.train.max_steps) == (None, 5)


@pytest.mark.parametrize("model", [Recipe, Data, Train, Evaluate, Place])
def test_null_is_as_leaving_a_key_out(model: type[Strict]) -> None:
    needed = {"model": "m", "data": {"train": "a.jsonl"}, "objective": "sft", "method": "lora", "train": "a.jsonl"}
    given = {name: needed[name] for name, known in model.model_fields.items() if known.is_required()}
    optional = {name: None for name in model.model_fields if name not in {*given, "clip"}}  # null is no limit there
    assert model.model_validate({**given, **optional}) == model.model_validate(given)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=", "gives train.epochs no value"),
        ("train.epochs", "is not an override"),
        ("=3", "is not an override"),
        ("train..epochs=3", "is not an override"),
        ("train.epochs=three", 'command line: train.epochs must be a number above 0, not "three"'),
        ("train.epoch=3", "command line: unknown key train.epoch"),
        ("trian.epochs=3", "command line: unknown key trian"),
        ("lora_r=3", "command line: lora_r has another name here"),
        ("data.train.0.weight=2", 'data.train.0.weight cannot be set: data.train is "a.jsonl"'),
        ("model.name=x", 'model.name cannot be set: model is "m"'),
        ("evaluate.metrics=[a", "command line, evaluate.metrics:1:"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(tmp_path, BASE, override).cause


def test_overrides_that_contradict_are_refused(tmp_path: Path) -> None:
    assert "set twice" in refusal(tmp_path, BASE, "seed=1", "seed=2").cause
    assert "has 1 items and no item 1" in refusal(tmp_path, BASE.replace("a.jsonl", "[a]"), "data.train.1=b").cause


# ---------------------------------------------------------------- options


def test_options(tmp_path: Path) -> None:
    recipe, origin = load(tmp_path, BASE.replace("lora", "{name: lora, rank: 16}"))
    assert check_options(recipe.method, Lora, "method", origin) == Lora(rank=16)


@pytest.mark.parametrize(
    ("options", "cause", "remedy"),
    [
        ("rnk: 3", "recipe.yaml:7: unknown key method.rnk", "did you mean method.rank?"),
        ("Rank: 3", "recipe.yaml:7: unknown key method.Rank", "write method.rank"),
        ("lora_r: 3", "recipe.yaml:7: lora_r has another name here", "write method.rank"),
        (
            "learning_rate: 1e-4",
            "recipe.yaml:7: method.learning_rate does not belong here",
            "write train.learning_rate",
        ),
        (
            "precision: bf16",
            "recipe.yaml:7: method.precision does not belong here",
            "write precision beside model and data",
        ),
        ("rank: 0", "recipe.yaml:7: method.rank must be a whole number above 0, not 0", "docs"),
        ("rank: yes", 'recipe.yaml:7: method.rank must be a whole number above 0, not "yes"', "docs"),
        ("rank: true", "recipe.yaml:7: method.rank must be a whole number above 0, not true", "docs"),
        ("alpha: .nan", "recipe.yaml:7: method.alpha must be a finite number, not nan", "docs"),
        ("targets: q_proj", 'recipe.yaml:7: method.targets must be a list (each item text), not "q_proj"', "docs"),
    ],
)
def test_wrong_options(tmp_path: Path, options: str, cause: str, remedy: str) -> None:
    def read() -> None:
        recipe, origin = load(tmp_path, BASE.replace("method: lora", f"method:\n  name: lora\n  {options}"))
        check_options(recipe.method, Lora, "method", origin)

    with pytest.raises(InputError) as caught:
        read()
    assert caught.value.cause == cause
    assert remedy in caught.value.remedy


def test_options_that_forget_to_forbid_are_checked_all_the_same() -> None:
    with pytest.raises(InputError) as caught:
        check_options(Choice(name="x", rewrd="a"), Loose, "objective")  # type: ignore[call-arg]
    assert caught.value.cause.splitlines() == [
        "unknown key objective.rewrd: did you mean objective.reward?",
        "objective.reward is missing: add `reward: ... (text)`",
    ]


# ---------------------------------------------------------------- origin, schema, paths


def test_origin_and_defaults(tmp_path: Path) -> None:
    recipe, origin = load(tmp_path, BASE + "train:\n  epochs: 2\n", "seed=3")
    assert origin.given == {"model", "data.train", "objective", "method", "train.epochs", "seed"}
    assert origin.lines["train.epochs"] == 7
    taken = defaults_taken(recipe, origin)
    assert taken["train.schedule"] == "linear"
    assert taken["evaluate.keep"] is None
    assert not {"train.epochs", "method.name", "objective.name", "seed"} & set(taken)


def test_schema_has_the_options_of_every_choice() -> None:
    schema = recipe_schema({"lora": Lora, "full": Strict}, {"reward": Loose})
    bare, full, lora = schema["properties"]["method"]["oneOf"]
    assert bare == {"enum": ["full", "lora"]}
    assert full["properties"] == {"name": {"const": "full"}}
    assert lora["properties"]["rank"]["exclusiveMinimum"] == 0
    assert lora["additionalProperties"] is False
    bare, reward = schema["properties"]["objective"]["oneOf"]
    assert bare == {"enum": []}
    assert reward["required"] == ["name", "reward"]
    assert schema["properties"]["train"]["$ref"] == "#/$defs/Train"
    assert "Choice" not in schema["$defs"]


def test_relative_paths_are_the_recipes(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    recipe = parse_recipe(
        {
            "model": "org/name",
            "data": {
                "train": [{"path": "a.jsonl"}, {"path": "rows"}, {"path": "hub/rows"}],
                "validation": "../v.csv",
                "test": {"one": "./t", "two": "/t.parquet", "three": "banking77"},
            },
            "objective": "sft",
            "method": "lora",
            "out": "runs/x",
        }
    )
    found = resolve_paths(recipe, tmp_path)
    assert found.model == "org/name"
    assert isinstance(found.data.train, list)
    assert [one.path for one in found.data.train] == [str(tmp_path / "a.jsonl"), str(tmp_path / "rows"), "hub/rows"]
    assert found.data.validation == str(tmp_path.parent / "v.csv")
    assert found.data.test == {"one": str(tmp_path / "t"), "two": "/t.parquet", "three": "banking77"}
    assert found.out == tmp_path / "runs" / "x"
    assert resolve_paths(found, Path("elsewhere")) == found


def test_a_fraction_is_no_path(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"model": "m.gguf", "data": {"train": "~/a", "validation": 0.1}, "objective": "sft", "method": "lora"}
    )
    found = resolve_paths(recipe, tmp_path)
    assert found.data.validation == 0.1
    assert found.data.train == str(Path.home() / "a")
    assert found.model == str(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("file", "name"),
    [("a/tickets.yaml", "tickets"), ("../..", "run"), ("..yaml", "run"), ("a b!c.yaml", "a-b-c"), (".yaml", "yaml")],
)
def test_run_names_are_safe(file: str, name: str) -> None:
    assert run_name(Path(file)) == name


@given(st.text())
def test_run_names_never_leave_their_folder(text: str) -> None:
    name = run_name(Path(text))
    assert name
    assert name == Path(name).name
    assert not name.startswith((".", "-"))


# ---------------------------------------------------------------- and back

words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
filled = words.filter(bool)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
amounts = st.floats(min_value=1e-12, max_value=1e12)
counts = st.integers(1, 10**9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
choices = st.builds(
    lambda name, options: Choice(name=name, **options),
    filled,
    st.dictionaries(filled.filter(lambda key: key not in ("name", "options", "<<")), plain, max_size=2),
)
sets = st.builds(
    TrainingSet,
    path=filled,
    weight=st.floats(min_value=0.001, max_value=1000),
    limit=st.none() | counts,
    columns=st.dictionaries(words, words, max_size=2),
)
recipes = st.builds(
    Recipe,
    model=filled,
    data=st.builds(
        Data,
        train=filled | st.lists(sets, min_size=1, max_size=2),
        validation=st.none() | filled | st.floats(0.001, 0.999),
        test=st.none() | filled | st.dictionaries(names, filled, max_size=2),
    ),
    objective=choices,
    method=choices,
    train=st.builds(Train, epochs=st.none() | amounts, learning_rate=st.none() | amounts, clip=st.none() | amounts),
    place=st.builds(Place, threads=st.none() | counts),
    evaluate=st.builds(Evaluate, metrics=st.none() | st.lists(words, max_size=2)),
    seed=st.integers(0, 2**31 - 1),
    out=st.none() | names.map(Path),
)


@given(plain)
def test_values_come_back_from_yaml(value: Any) -> None:
    if isinstance(value, dict) and "<<" in value:
        return
    assert read_yaml(write_yaml({"a": value}), "x").value == {"a": value}


@given(recipes)
def test_a_dumped_recipe_loads_back(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    assert parse_recipe(read_yaml(text, "x").value) == recipe


@given(st.text() | words.map(lambda text: f"model: {text}\ndata: {text}"))
def test_any_text_is_a_value_or_a_refusal(text: str) -> None:
    with contextlib.suppress(InputError):
        found = read_yaml(text, "x").value
        assert read_yaml(write_yaml({"a": found}), "x").value == {"a": found}


@given(st.dictionaries(st.sampled_from(["model", "data", "method", "objective", "train", "seed", "out", "x"]), plain))
def test_any_mapping_is_a_recipe_or_a_refusal(mapping: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert parse_recipe(mapping).model == mapping["model"]


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe, _ = load(tmp_path, BASE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_one_of_what_is_a_list_is_told_the_list(tmp_path: Path) -> None:
    error = refusal(
        tmp_path, "model: m\nobjective: sft\nmethod: lora\ndata: {train: a}\nevaluate: {metric: accuracy}\n"
    )
    assert error.cause == "recipe.yaml:5: unknown key evaluate.metric"
    assert error.remedy == "write evaluate.metrics"
