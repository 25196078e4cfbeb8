"""What is written of answers: records by group and class, effects, details, and the answers themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tunesmith import measuring
from tunesmith.data.checks import row_keys
from tunesmith.evaluation.answers import asked_text
from tunesmith.evaluation.intervals import interval, wilson
from tunesmith.evaluation.metrics import Accuracy
from tunesmith.recipe_file import parse_recipe
from tunesmith.rundir import RunDir
from tunesmith.types import Prediction, Row

LABELS = ["down", "up"]
METRICS = ("accuracy", "macro_f1", "roc_auc", "ece", "loss")


def recipe(**evaluate: Any) -> Any:
    given = {"model": "m", "data": {"train": "t.jsonl"}, "objective": "classify", "method": "head"}
    return parse_recipe({**given, "evaluate": evaluate})


def objective(labels: list[str] | None = LABELS) -> Any:
    described = {} if labels is None else {"labels": labels}
    return SimpleNamespace(needs=SimpleNamespace(metrics=METRICS), describe=lambda: described)


def rows(count: int) -> list[Row]:
    """Every third row is "down"; sources have two rows each, and shops take turns."""
    return [
        Row(
            {"text": f"text {i}", "label": LABELS[i % 3 != 0]},
            f"test.jsonl:{i + 1}",
            {"shop": "north" if i % 4 < 2 else "south", "source": str(i // 2)},
        )
        for i in range(count)
    ]


def answers(given: list[Row], right: Mapping[int, bool] | bool) -> list[Prediction]:
    found: list[Prediction] = []
    for i, row in enumerate(given):
        hit = right if isinstance(right, bool) else right[i]
        output = row.value["label"] if hit else LABELS[1 - LABELS.index(row.value["label"])]
        shares = {label: 0.9 if label == output else 0.1 for label in LABELS}
        scores = {"nll": -float(np.log(shares[row.value["label"]])), "tokens": 1.0}
        found.append(Prediction(output, row.value["label"], row.where, scores, shares))
    return found


def found_of(given: list[Row]) -> dict[str, list[Prediction]]:
    return {"majority": answers(given, False), "tuned": answers(given, {i: i % 5 != 0 for i in range(len(given))})}


def value(results: Mapping[str, Any], metric: str, group: str = "all", model: str = "tuned") -> dict[str, Any]:
    (record,) = [r for r in results["records"] if (r["metric"], r["group"], r["model"]) == (metric, group, model)]
    return record


def test_groups_are_the_values_of_the_columns_asked_for() -> None:
    given = rows(40)
    results = measuring.score("test", given, found_of(given), objective(), recipe(by=["shop"]))
    groups = {r["group"] for r in results["records"]}
    assert groups == {"all", "shop=north", "shop=south", "label=up", "label=down"}
    for shop in ("north", "south"):
        inside = [i for i, row in enumerate(given) if row.tags["shop"] == shop]
        record = value(results, "accuracy", f"shop={shop}")
        assert record["n"] == len(inside) == 20
        assert record["value"] == pytest.approx(np.mean([i % 5 != 0 for i in inside]))
    # Guesses at random beat the majority class in macro-F1, so that is no test of the text having been read.
    assert {e["metric"] for e in results["effects"]} == set(METRICS) - {"macro_f1"}


def test_clusters_widen_the_interval_where_rows_of_one_source_agree() -> None:
    """Twins add nothing: 40 rows in 20 pairs that agree are worth 20, not 40."""
    statistics = np.repeat(np.column_stack([np.arange(20) % 4 != 0, np.ones(20)]), 2, axis=0).astype(float)
    pairs = np.repeat(np.arange(20), 2)
    value, low, high = interval(Accuracy(), statistics, 0, clusters_N=pairs)
    narrow = wilson(30, 40)
    honest = wilson(15, 20)
    assert value == 0.75
    assert high - low > 1.2 * (narrow[1] - narrow[0])
    assert (low, high) == pytest.approx(honest, abs=0.08)


def test_a_clustered_run_says_so_in_its_records_and_effects() -> None:
    given = rows(40)
    twins = {"majority": answers(given, False), "tuned": answers(given, {i: (i // 2) % 4 != 0 for i in range(40)})}
    alone = measuring.score("test", given, twins, objective(), recipe())
    clustered = measuring.score("test", given, twins, objective(), recipe(cluster="source"))
    a, c = value(alone, "accuracy"), value(clustered, "accuracy")
    assert a["value"] == c["value"]
    assert c["high"] - c["low"] > a["high"] - a["low"]
    assert clustered["effects"][0]["p"] > alone["effects"][0]["p"]


def test_classes_and_gaps_of_few_sources_say_why_they_have_no_interval() -> None:
    given = [replace(row, tags={**row.tags, "source": str(i % 3)}) for i, row in enumerate(rows(40))]
    results = measuring.score("test", given, found_of(given), objective(), recipe(cluster="source", by=["shop"]))
    for group, metric in (("label=up", "recall"), ("shop=north", "accuracy"), ("all", "accuracy")):
        record = value(results, metric, group)
        assert record["low"] is None
        assert "and it takes 5" in record["reason"]
    (entry,) = results["groups"]
    assert all(gap["low"] is None and "and it takes 5" in gap["reason"] for gap in entry["gaps"])


def test_details_have_the_pictures_of_a_classifier_and_nothing_else_has_any() -> None:
    given = rows(12)
    details = measuring.score("test", given, found_of(given), objective(), recipe())["details"]
    assert set(details["test"]) == {"majority", "tuned"}
    counts = np.array(details["test"]["tuned"]["confusion"]["counts"])
    assert counts.sum() == 12
    assert np.trace(counts) == sum(i % 5 != 0 for i in range(12))
    assert measuring.score("test", given, found_of(given), objective(None), recipe())["details"] == {}


def test_a_label_that_training_never_saw_has_a_row_of_its_own_in_the_confusion() -> None:
    given = [*rows(6), Row({"text": "new", "label": "sideways"}, "test.jsonl:7", {})]
    found = {
        "tuned": [
            *answers(given[:6], True),
            Prediction("up", "sideways", "test.jsonl:7", {"nll": 9, "tokens": 1}, {"up": 0.9, "down": 0.1}),
        ]
    }
    results = measuring.score("test", given, found, objective(), recipe())
    assert results["details"]["test"]["tuned"]["confusion"]["labels"] == ["down", "sideways", "up"]
    assert value(results, "recall", "label=sideways")["value"] == 0.0


@pytest.mark.parametrize(("keep", "kept"), [(None, 12), (5, 5)])
def test_predictions_hold_what_compare_and_the_report_need(tmp_path: Path, keep: int | None, kept: int) -> None:
    given = rows(12)
    measuring.write_predictions(RunDir(tmp_path), "test", given, found_of(given), keep)
    lines = [json.loads(line) for line in (tmp_path / "predictions" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == kept
    first = lines[0]
    assert first["key"] == row_keys(given[0].value)[1].hex()
    assert (first["where"], first["input"], first["reference"]) == ("test.jsonl:1", "text 0", "down")
    assert first["tags"] == {"shop": "north", "source": "0"}
    assert first["answers"]["tuned"]["probabilities"] == {"down": 0.1, "up": 0.9}
    assert first["answers"]["majority"]["probabilities"] is None


def test_no_predictions_are_written_where_none_are_kept(tmp_path: Path) -> None:
    given = rows(3)
    measuring.write_predictions(RunDir(tmp_path), "test", given, found_of(given), 0)
    assert not (tmp_path / "predictions").exists()


def test_the_question_of_a_row_is_its_last_user_turn_or_its_text() -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    said = [*turns, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    assert asked_text(Row({"messages": said}, "r")) == "three"
    assert asked_text(Row({"text": "all of it"}, "r")) == "all of it"


def test_a_second_pass_over_a_set_takes_the_place_of_the_first() -> None:
    given = rows(12)
    results = measuring.score("test", given, found_of(given), objective(), recipe())
    again = measuring.score("test", given[:6], {"tuned": answers(given[:6], True)}, objective(), recipe())
    other = measuring.score("other", given, found_of(given), objective(), recipe())
    measuring.merge(results, other)
    measuring.merge(results, again)
    assert {r["n"] for r in results["records"] if r["data"] == "test" and r["group"] == "all"} == {6}
    assert {e["data"] for e in results["effects"]} == {"other"}
    assert set(results["details"]["test"]) == {"tuned"}
    assert set(results["details"]) == {"test", "other"}


@pytest.mark.parametrize(("baseline", "tested"), [("majority", False), ("cosine", True), ("base", True)])
def test_only_the_majority_class_is_no_floor_for_macro_f1(baseline: str, tested: bool) -> None:
    given = rows(60)
    found = {baseline: answers(given, False), "tuned": answers(given, True)}
    effects = measuring.score("test", given, found, objective(), recipe(metrics=["accuracy", "macro_f1"]))["effects"]
    assert ("macro_f1" in {effect["metric"] for effect in effects}) == tested
