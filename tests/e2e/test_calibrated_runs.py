"""A classifier's probabilities are calibrated: from the recipe to predict, export and report."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import InputError
from tunesmith.evaluation.calibrated import of_card
from tunesmith.evaluation.scaling import Temperature
from tunesmith.models.saved import read_card
from tunesmith.report.results import calibrations
from tunesmith.types import Prediction


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """A word tells the label, in most rows; some stand left, some right, and two in the middle."""
    said = [("red", "warm"), ("blue", "cold"), ("grey", "none")]
    sides = ["Middle"] * 2 + ["left", "right"] * count
    return [
        {"text": f"{said[i % 3][0]} {seed}-{i}", "label": said[(i + (i % 7 == 0)) % 3][1], "side": sides[i]}
        for i in range(count)
    ]


METRICS = ["accuracy", "adaptive_ece", "brier", "loss"]
DATA = {"train": rows(30, 0), "validation": rows(40, 1), "test": rows(30, 2)}


def recipe(base: Path, **evaluate: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "objective": "classify",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 12, "batch_size": 10, "learning_rate": 0.02},
        "place": {"threads": 1},
        "precision": "fp32",
        "evaluate": evaluate,
    }


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    asked = recipe(tiny_bert, calibrate="temperature", conformal=0.8, metrics=METRICS, by="side", smallest_group=10)
    api.train(asked, data=DATA, out=folder)
    return folder


def same(a: list[Prediction], b: list[Prediction]) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one.output, one.label_set) == (other.output, other.label_set)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_numbers_before_and_after_stand_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {
        (r["model"], r["metric"]): r["value"]
        for r in json.loads((run / "evaluation.json").read_text())
        if r["group"] == "all"
    }
    assert records["tuned", "accuracy"] == records["uncalibrated", "accuracy"]
    assert records["tuned", "loss"] != records["uncalibrated", "loss"]
    details = json.loads((run / "details.json").read_text())["test"]
    assert set(details["uncalibrated"]) >= {"reliability"}
    lines = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    assert set(lines[0]["answers"]) == {"majority", "tuned"}
    assert main(["evaluate", str(run)]) == 0
    told = capsys.readouterr().out
    assert "probabilities on test are calibrated: adaptive_ece" in told
    page = (run / "report.html").read_text()
    assert "Before its probabilities were scaled" in page
    assert 'class="old"' in page
    counted = Counter(row["label"] for row in DATA["train"])
    for label, count in counted.items():  # each class beside its rows of training
        assert re.search(rf'{label}</th><td class="number" data-sort="{count}">{count}</td>', page)
    assert "after temperature scaling" in (run / "model" / "MODEL_CARD.md").read_text()


def test_groups_are_told_apart_wherever_a_run_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = json.loads((run / "groups.json").read_text())
    assert (entry["judged"], entry["small"]) == ({"left": 14, "right": 14}, {"Middle": 2})
    gap = next(one for one in entry["gaps"] if one["metric"] == "accuracy")
    records = [r for r in api.evaluate(run).records if r["metric"] == "accuracy" and r["model"] == "tuned"]
    value = {r["group"]: r["value"] for r in records}
    assert gap["value"] == pytest.approx(abs(value["side=left"] - value["side=right"]))
    assert "side=Middle" not in value
    assert main(["evaluate", str(run)]) == 0
    told = capsys.readouterr().out
    for line in ("test by side: accuracy is best of", "not judged, of fewer than 10 rows: 'Middle' 2"):
        assert line in told
    page = (run / "report.html").read_text()
    assert "accuracy is best of" in page
    assert '<h3>test by side</h3><span class="keys"><span class="key before">most frequent label</span>' in page
    assert "Not judged, of fewer than 10 rows: &#39;Middle&#39; 2" in page
    assert "test by side: accuracy is best of" in str(api.report(run, format="md"))
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == [entry]


def test_other_groups_are_asked_of_a_finished_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, file = tmp_path / "run", tmp_path / "later.jsonl"
    shutil.copytree(run, copy)
    later = [{k: v for k, v in row.items() if k != "side"} | {"shop": f"s{i % 2}"} for i, row in enumerate(rows(40, 3))]
    file.write_text("".join(json.dumps(row) + "\n" for row in later))
    words = ["evaluate", str(copy), "--data", str(file)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "there is no column 'side', which evaluate or train asks for" in told
    assert main([*words, "--by", "none"]) == 0
    assert main([*words, "--by", "shop", "--name", "shops"]) == 0
    assert "shops by shop: accuracy is" in capsys.readouterr().out
    groups = {r["data"]: set() for r in api.evaluate(copy).records}
    for record in api.evaluate(copy).records:
        groups[record["data"]].add(record["group"].partition("=")[0])
    assert (groups["later"], groups["shops"]) == ({"all", "label"}, {"all", "label", "shop"})


def test_validation_rows_that_are_not_measured_need_no_groups(tiny_bert: Path, tmp_path: Path) -> None:
    data = {**DATA, "validation": [{k: v for k, v in row.items() if k != "side"} for row in DATA["validation"]]}
    asked = recipe(tiny_bert, by="side", smallest_group=10)
    assert api.plan(asked, data=data).training.total_steps == 12
    with pytest.raises(InputError, match="there is no column 'side'"):
        api.plan(asked, data={name: data[name] for name in ("train", "validation")})


def test_sets_are_judged_whatever_metrics_are_named(run: Path) -> None:
    records = json.loads((run / "evaluation.json").read_text())
    assert "conformal_coverage" not in METRICS
    named = {r["metric"] for r in records if (r["model"], r["group"], r["data"]) == ("tuned", "all", "test")}
    assert named == {*METRICS, "conformal_coverage", "conformal_set_size"}
    assert set(json.loads((run / "plan.json").read_text())["metrics"]) == named


def test_groups_are_those_of_the_rows_that_are_measured(tiny_bert: Path) -> None:
    """Of 30 rows 14 stand left; of the 8 that a limit leaves no side has 10."""
    with pytest.raises(InputError, match="no value has 10 rows or more to measure"):
        api.plan(recipe(tiny_bert, by="side", smallest_group=10, limit=8), data=DATA)


def test_rows_that_are_cut_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, file = tmp_path / "run", tmp_path / "long.jsonl"
    shutil.copytree(run, copy)
    long = [{**row, "text": row["text"] + " and so on" * (200 * (i < 3))} for i, row in enumerate(rows(10, 4))]
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    assert main(["evaluate", str(copy), "--data", str(file), "--by", "none"]) == 0
    told = capsys.readouterr().out
    assert "warning: 3 of 10 rows of long are longer than the model reads (train.sequence_length), and were cut" in told


def test_a_scaling_that_makes_probabilities_worse_is_said_to() -> None:
    def record(model: str, metric: str, value: float) -> dict[str, Any]:
        return {"data": "test", "group": "all", "model": model, "metric": metric, "value": value}

    before = [record("uncalibrated", "ece", 0.016), record("uncalibrated", "loss", 0.091)]
    (worse,) = calibrations([*before, record("tuned", "ece", 0.021), record("tuned", "loss", 0.115)])
    assert worse.endswith("no truer here: leave evaluate.calibrate out, or give more validation rows")
    (better,) = calibrations([*before, record("tuned", "ece", 0.021), record("tuned", "loss", 0.090)])
    assert better.endswith("loss 0.091 before, 0.090 after")


def test_micro_averages_are_of_the_majority_too(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    found = api.evaluate(copy, DATA["test"], name="again", metrics=["accuracy", "micro_f1"], by=())
    value = {
        (r["model"], r["metric"]): r["value"] for r in found.records if r["data"] == "again" and r["group"] == "all"
    }
    for model in ("majority", "tuned"):
        assert value[model, "micro_f1"] == pytest.approx(value[model, "accuracy"])


def test_predict_and_evaluate_answer_as_was_measured(run: Path, tmp_path: Path) -> None:
    found = api.predict(run, DATA["test"])
    kept = [
        json.loads(line)["answers"]["tuned"] for line in (run / "predictions" / "test.jsonl").read_text().splitlines()
    ]
    for prediction, answer in zip(found, kept, strict=True):
        assert prediction.probabilities == pytest.approx(answer["probabilities"], abs=1e-5)
        assert prediction.label_set == tuple(answer["label_set"])
        assert all((prediction.probabilities or {})[label] > 0 for label in prediction.label_set or ())
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in DATA["test"]))
    assert main(["predict", str(run), "--input", str(asked), "--output", str(out)]) == 0
    assert [json.loads(line)["label_set"] for line in out.read_text().splitlines()] == [a["label_set"] for a in kept]
    again = api.evaluate(run, DATA["test"], name="again", metrics=["loss", "conformal_coverage"])
    value = {(r["data"], r["model"], r["metric"]): r["value"] for r in again.records if r["group"] == "all"}
    assert value["again", "tuned", "loss"] == pytest.approx(value["test", "tuned", "loss"], abs=1e-5)
    covered = sum(p.reference in (p.label_set or ()) for p in found) / len(found)
    assert value["again", "tuned", "conformal_coverage"] == pytest.approx(covered)
    assert ("again", "majority", "conformal_coverage") not in value


def test_an_exported_model_is_calibrated_too_and_a_merged_one_in_its_head(run: Path, tmp_path: Path) -> None:
    before = api.predict(run, DATA["test"])
    api.export(run, tmp_path / "copy")
    same(api.predict(tmp_path / "copy", DATA["test"]), before)
    later = api.evaluate(tmp_path / "copy", rows(60, 5), name="later", metrics=["accuracy"], by=["side"])
    assert {r["group"] for r in later.records} >= {"all", "side=left", "side=right"}, "a model has no recipe of its own"
    api.export(run, tmp_path / "merged", merge=True, data=DATA["test"])
    same(api.predict(tmp_path / "merged", DATA["test"]), before)
    calibration = of_card(read_card(run / "model"))
    folded = of_card(read_card(tmp_path / "merged"))
    assert calibration is not None
    assert folded is not None
    assert isinstance(calibration.scaling, Temperature)
    assert folded.scaling is None
    assert folded.sets == calibration.sets
    name = "label.linear.weight"
    own, scaled = (load_file(f / "heads.safetensors")[name] for f in (run / "model", tmp_path / "merged"))
    assert (own / calibration.scaling.temperature - scaled).abs().max() < 1e-6
    assert "after temperature scaling" not in (tmp_path / "merged" / "MODEL_CARD.md").read_text()


def test_what_cannot_be_calibrated_is_refused_by_the_plan(tiny_bert: Path) -> None:
    def refused(match: str, evaluate: dict[str, Any], data: dict[str, Any], objective: str = "classify") -> None:
        with pytest.raises(InputError, match=match):
            api.plan(recipe(tiny_bert, **evaluate) | {"objective": objective}, data=data)

    sets = {name: [{"text": row["text"], "labels": [row["label"]]} for row in own] for name, own in DATA.items()}
    refused("learns no such", {"calibrate": "vector"}, sets)
    unseen = {name: own for name, own in DATA.items() if name != "validation"}
    refused(r"there are no validation rows \(set data\.validation\)", {"conformal": 0.9}, unseen)
    untested = {name: own for name, own in DATA.items() if name != "test"}
    refused(r"there are no test rows \(set data\.test\)", {"calibrate": "vector"}, untested)
    refused("takes 99 validation rows, and there are 40", {"conformal": 0.99}, DATA)
    refused(
        "takes 24 validation rows that no scaling is fitted to, and there are 20",
        {"conformal": 0.96, "calibrate": "temperature"},
        DATA,
    )
    few = {**DATA, "validation": DATA["validation"][:1]}
    refused(
        "temperature, which is fitted to validation rows .* takes 20 or more and finds 1",
        {"calibrate": "temperature"},
        few,
    )
    refused("isotonic, .* takes 30 or more and finds 20", {"calibrate": "isotonic", "conformal": 0.8}, DATA)
    warm = {**DATA, "validation": [{**row, "label": "warm"} for row in DATA["validation"]]}
    refused("finds none of 'cold', 'none'", {"calibrate": "vector"}, warm)
