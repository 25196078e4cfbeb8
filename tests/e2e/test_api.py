"""The Python API over tiny models: rows in memory, events, listeners that stop or fail, and runs one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

import pytest
from pydantic import TypeAdapter

import tunesmith
from tunesmith.errors import InputError, StoppedError
from tunesmith.events import EVENTS, Callback, Together
from tunesmith.planning import Plan
from tunesmith.rundir import sha256_file

COLOURS = ("red", "green", "blue")
TRAIN = [{"prompt": f"colour {i}?", "completion": COLOURS[i % 3]} for i in range(18)]
TEST = [{"prompt": f"which {i}?", "completion": COLOURS[i % 3]} for i in range(4)]
OPEN_EVENTS = ("step", "validation")  # these carry the objective's and the metrics' own numbers too


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 6, "batch_size": 4, "evaluate_every": 2, "dropout": 0.1, "save_every": 100},
        "precision": "fp32",
        "evaluate": {"max_new_tokens": 4},
    }


@pytest.fixture(scope="module")
def plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what asks for validation rows."""
    return {**recipe, "train": {"max_steps": 1, "batch_size": 4}}


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return {"train": TRAIN[:14], "validation": TRAIN[14:], "test": TEST}


@pytest.fixture(scope="module")
def heard() -> list[tuple[str, Mapping[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def result(
    recipe: dict[str, Any], data: dict[str, Any], heard: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> tunesmith.Result:
    """The run that the others are compared with; it was heard, and nothing interrupted it."""
    out = tmp_path_factory.mktemp("api") / "run"
    return tunesmith.train(recipe, data=data, out=out, listen=lambda event, told: heard.append((event, told)))


def hashes(run: Path) -> dict[str, str]:
    """sha256 of all that two equal runs have in common."""
    kept = [run / "metrics.jsonl", run / "evaluation.json", *sorted((run / "model").iterdir())]
    return {path.name: sha256_file(path) for path in kept}


def test_no_bars_of_other_libraries_are_drawn(
    plain: dict[str, Any], data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        done = tunesmith.train({**plain, "method": "full"}, data=data, out=tmp_path / "run")
        lora = tunesmith.train(plain, data=data, out=tmp_path / "lora")
        tunesmith.export(lora.path, tmp_path / "merged", merge=True)
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert done.records
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- rows


def as_pandas(rows: list[dict[str, str]]) -> Any:
    import pandas as pd

    return pd.DataFrame(rows, index=[f"row {i}" for i in range(len(rows))])


def as_arrow(rows: list[dict[str, str]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def as_dataset(rows: list[dict[str, str]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("kind", [list, iter, as_pandas, as_arrow, as_dataset])
def test_rows_of_every_kind_mean_the_same(
    kind: Callable[[Any], Any], recipe: dict[str, Any], data: dict[str, Any]
) -> None:
    planned = tunesmith.plan(recipe, data={split: kind(rows) for split, rows in data.items()})
    assert planned.hash == tunesmith.plan(recipe, data=data).hash


def test_no_library_of_tables_is_imported_for_rows_of_another() -> None:
    code = (
        "import sys; from tunesmith.data.given import records; records([{'text': 'a'}]);"
        "print([n for n in ('pandas', 'pyarrow', 'datasets', 'polars') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_value_of_a_table_is_refused_as_null(tiny_bert: Path) -> None:
    import pandas as pd

    rows = pd.DataFrame({"text": ["a", "b", None], "label": ["x", float("nan"), "y"]})
    with pytest.raises(InputError, match=r"train\.jsonl:2: label: the value is null"):
        tunesmith.plan({"model": str(tiny_bert), "objective": "classify", "method": "head"}, data={"train": rows})


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ([{"prompt": "a", "completion": "b"}], "data was given as list"),
        ({"train": "rows.jsonl"}, "rows were given as str"),
        ({"train": {"prompt": ["a"]}}, "rows were given as dict"),
        ({"train": 3}, "rows were given as int"),
        ({"train": ["a"]}, "train[0] is a str, not a mapping"),
        ({"train": [{"prompt": "a", "completion": float("nan")}]}, "train[0]: Out of range float"),
        ({"train": [{"prompt": "a", "completion": {1, 2}}]}, "train[0]: Object of type set is not JSON serializable"),
        ({"../test": TEST}, "rows cannot be called '../test'"),
        ({"train": []}, "train.jsonl: the file holds no rows"),
    ],
)
def test_rows_that_are_none_are_refused(given: Any, cause: str, plain: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        tunesmith.plan(plain, data=given)
    assert cause in caught.value.cause
    assert caught.value.remedy


def test_a_table_of_mixed_types_is_refused(recipe: dict[str, Any]) -> None:
    import pandas as pd

    with pytest.raises(InputError, match="a table of pandas cannot be read"):
        tunesmith.plan(recipe, data={"train": pd.DataFrame({"prompt": ["a", 3], "completion": ["a", "b"]})})


def test_rows_stand_in_for_the_paths_of_a_file_and_of_a_recipe(
    recipe: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    expected = tunesmith.plan(recipe, data=data).hash
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert tunesmith.plan(tmp_path / "recipe.yaml", data=data).hash == expected
    typed = tunesmith.Recipe.model_validate({**recipe, "data": {"train": "absent.jsonl"}})
    assert tunesmith.plan(typed, data=data).hash == expected
    assert tunesmith.plan(tmp_path / "recipe.yaml", ["seed=3"], data=data).hash != expected
    with pytest.raises(InputError, match="overrides belong to a recipe file"):
        tunesmith.plan(recipe, ["seed=3"], data=data)


# ---------------------------------------------------------------- results


def test_a_record_is_found_by_its_metric(result: tunesmith.Result) -> None:
    tuned = result.record("perplexity")
    assert (tuned["data"], tuned["model"], tuned["n"]) == ("test", "tuned", 4)
    assert result.record("perplexity", model="base")["value"] != tuned["value"]
    with pytest.raises(InputError) as caught:
        result.record("accuracy")
    assert "perplexity of tuned on test" in caught.value.remedy


def test_a_loaded_model_answers_as_predict_does(result: tunesmith.Result) -> None:
    questions = [{"prompt": "colour 1?"}, {"prompt": "colour 2?"}]
    loaded = tunesmith.load(result.path)
    assert loaded.predict(questions) == tunesmith.predict(result.path, questions)


def test_evaluate_takes_rows_and_their_name(plain: dict[str, Any], tmp_path: Path) -> None:
    run = tunesmith.train(plain, data={"train": TRAIN}, out=tmp_path / "run").path
    assert tunesmith.evaluate(run).records == []
    assert tunesmith.evaluate(run, TEST).record("loss", data="rows")["n"] == 4
    found = tunesmith.evaluate(run, TEST[:3], name="later", metrics=["loss"], base=False)
    assert {r["metric"] for r in found.records if r["data"] == "later"} == {"loss"}
    assert (run / "predictions" / "later.jsonl").is_file()
    with pytest.raises(InputError, match="rows cannot be called"):
        tunesmith.evaluate(run, TEST, name="../../later")


# ---------------------------------------------------------------- events


def check(event: str, told: Mapping[str, Any]) -> None:
    """Raises where an event is not of the documented shape: a key too many or too few, or of another type."""
    if event == "planned":
        assert set(told) == {"run", "plan"}
        assert isinstance(told["plan"], Plan)
        return
    kinds = get_type_hints(EVENTS[event], include_extras=True)
    assert {key for key, kind in kinds.items() if get_origin(kind) is not NotRequired} <= set(told), (event, told)
    for key, value in told.items():
        assert key in kinds or (event in OPEN_EVENTS and isinstance(value, float)), (event, key)
        kind = kinds.get(key, float)
        TypeAdapter(get_args(kind)[0] if get_origin(kind) is NotRequired else kind).validate_python(value, strict=True)


def test_every_event_is_as_documented(result: tunesmith.Result, heard: list[tuple[str, Mapping[str, Any]]]) -> None:
    assert {event for event, _ in heard} >= set(EVENTS) - {"best", "progress", "tracking"}
    for event, told in heard:
        check(event, told)
    assert [told["step"] for event, told in heard if event == "step"] == [1, 2, 3, 4, 5, 6]
    assert heard[-1][0] == "finished"
    assert heard[-1][1]["records"] == result.records


def test_a_callback_has_a_method_for_every_event_and_passes_over_others() -> None:
    seen: list[str] = []
    methods = {f"on_{event}": (lambda self, data, event=event: seen.append(event)) for event in EVENTS}
    callback = type("All", (Callback,), methods)()
    for event in EVENTS:
        assert callable(getattr(Callback, f"on_{event}"))
        callback(event, {})
    callback("of a later version", {})
    callback("__class__", {})
    Callback()("step", {"step": 1})
    assert seen == list(EVENTS)


def test_all_listeners_hear_an_event_though_one_fails() -> None:
    seen: list[str] = []

    def fails(event: str, data: Mapping[str, Any]) -> None:
        raise KeyError(event)

    def hears(event: str, data: Mapping[str, Any]) -> None:
        seen.append(event)

    with pytest.raises(KeyError, match="step"):
        Together([hears, fails, hears])("step", {})
    assert seen == ["step", "step"]


class Interrupts(Callback):
    """Raises at the n-th of an event."""

    def __init__(self, event: str, number: int, error: BaseException) -> None:
        self.event, self.left, self.error = event, number, error

    def __call__(self, event: str, data: Mapping[str, Any], /) -> None:
        super().__call__(event, data)
        self.left -= event == self.event
        if event == self.event and self.left == 0:
            raise self.error


CALLS: list[tuple[str, int, str]] = [
    ("planned", 1, "outside of a step"),
    ("phase", 1, "outside of a step"),  # loading
    ("phase", 2, "outside of a step"),  # training
    ("step", 1, "after step 1"),
    ("step", 6, "after step 6"),
    ("sample", 2, "after step 4"),
    ("validation", 1, "after step 2"),
    ("phase", 3, "outside of a step"),  # saving
    ("phase", 5, "outside of a step"),  # evaluating the base
    ("finished", 1, "outside of a step"),
]


NOT_BEGUN = {("planned", 1), ("phase", 1)}  # a run begins when its weights are there


@pytest.mark.parametrize(("event", "number", "where"), CALLS)
def test_a_listener_stops_the_run_which_goes_on_to_the_same_bits(
    event: str, number: int, where: str, recipe: dict[str, Any], data: dict[str, Any], result: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(StoppedError) as caught:
        tunesmith.train(recipe, data=data, out=out, listen=Interrupts(event, number, tunesmith.StopRun()))
    assert where in caught.value.cause
    if (event, number) in NOT_BEGUN:
        assert "begin again" in caught.value.remedy
        assert not (out / "manifest.json").exists()
        assert hashes(tunesmith.train(recipe, data=data, out=out).path) == hashes(result.path)
        return
    assert f"tunesmith resume {out}" in caught.value.remedy
    if "after" in where:
        assert (out / "checkpoints" / f"step-{int(where.split()[-1]):06d}" / "hashes.json").is_file()
    tunesmith.resume(out)
    assert hashes(out) == hashes(result.path)


@pytest.mark.parametrize(("event", "number", "where"), CALLS[3:7])
def test_a_listener_that_fails_loses_no_step(
    event: str, number: int, where: str, recipe: dict[str, Any], data: dict[str, Any], result: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError) as caught:
        tunesmith.train(recipe, data=data, out=out, listen=Interrupts(event, number, ZeroDivisionError("mine")))
    assert any(where in note and f"tunesmith resume {out}" in note for note in caught.value.__notes__)
    assert (out / "checkpoints" / f"step-{int(where.split()[-1]):06d}" / "hashes.json").is_file()
    tunesmith.resume(out)
    assert hashes(out) == hashes(result.path)


def test_a_listener_that_stops_before_there_is_a_run_leaves_nothing(plain: dict[str, Any], tmp_path: Path) -> None:
    fresh = [{"prompt": f"never seen {i}", "completion": "red"} for i in range(8)]  # nothing is told of cached rows
    stop = Interrupts("progress", 1, tunesmith.StopRun())
    with pytest.raises(StoppedError) as caught:
        tunesmith.train(plain, data={"train": fresh}, out=tmp_path / "run", listen=[check, stop])
    assert "begin again" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_several_listeners_hear_the_run_and_change_no_bit_of_it(
    recipe: dict[str, Any], data: dict[str, Any], result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    counts = {"a": 0, "b": 0}

    class Draws(Callback):
        def on_step(self, data: Any) -> None:
            torch.rand(7)
            data.clear()
            counts["a"] += 1

    def counts_too(event: str, data: Mapping[str, Any]) -> None:
        counts["b"] += event == "step"

    out = tmp_path / "run"
    tunesmith.train(recipe, data=data, out=out, listen=[counts_too, Draws()], progress=True)
    assert counts == {"a": 6, "b": 6}
    assert "step 1/6" in capsys.readouterr().err
    assert hashes(out) == hashes(result.path)


# ---------------------------------------------------------------- processes


def test_two_runs_in_one_process_equal_two_processes(
    recipe: dict[str, Any], data: dict[str, Any], result: Any, tmp_path: Path, tiny_bert: Path
) -> None:
    """A run after another of a different kind, and one in a process of its own, leave the same bits."""
    labels = [{"text": f"a {c} {i}", "label": c} for i in range(6) for c in COLOURS]
    other = {"model": str(tiny_bert), "objective": "classify", "method": "head", "train": {"max_steps": 2}}
    tunesmith.train({**other, "seed": 5}, data={"train": labels}, out=tmp_path / "other")
    tunesmith.train(recipe, data=data, out=tmp_path / "second")
    assert hashes(tmp_path / "second") == hashes(result.path)
    code = (
        "import json, sys, tunesmith; recipe, data, out = json.load(sys.stdin);"
        "tunesmith.train(recipe, data=data, out=out)"
    )
    asked = json.dumps([recipe, data, str(tmp_path / "alone")])
    subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True, check=True)
    assert hashes(tmp_path / "alone") == hashes(result.path)


def test_what_a_mapping_gives_is_no_default(plain: dict[str, Any], data: dict[str, Any]) -> None:
    taken = {default.key for default in tunesmith.plan(plain, data={"train": data["train"]}).defaults}
    assert {"train.schedule", "method.alpha", "seed"} & taken
    assert not {"model", "data.train", "method.name", "method.rank", "train.max_steps", "precision"} & taken
