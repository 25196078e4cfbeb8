"""Cross-validation: which part each row is in, what the parts' models are asked, and what is told of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunesmith
from tunesmith.cli import main
from tunesmith.data.checks import as_keys
from tunesmith.data.split import folds
from tunesmith.errors import InputError, RefusedError, StoppedError
from tunesmith.evaluation import answers
from tunesmith.recipe_evaluation import Evaluate


def _keys(numbers: list[int]) -> Any:
    return as_keys(b"".join(number.to_bytes(16, "little") for number in numbers))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=80),
    st.integers(2, 6),
    st.booleans(),
    st.integers(0, 9),
)
def test_rows_that_belong_together_stay_in_one_part(
    rows: list[tuple[int, int, int]], count: int, grouped: bool, seed: int
) -> None:
    keys, labels = [key for key, _, _ in rows], np.array([label for _, label, _ in rows])
    groups = [str(group) for _, _, group in rows] if grouped else None
    part_N = folds(_keys(keys), count, seed, labels, groups)
    assert set(part_N.tolist()) <= set(range(count))
    for same in (keys, groups or []):
        parts: dict[Any, set[int]] = {}
        for value, part in zip(same, part_N.tolist(), strict=bool(same)):
            parts.setdefault(value, set()).add(part)
        assert all(len(found) == 1 for found in parts.values())
    order = np.random.default_rng(seed).permutation(len(rows))
    again_N = folds(_keys([keys[i] for i in order]), count, seed, labels[order], groups and [groups[i] for i in order])
    assert np.array_equal(again_N, part_N[order]), "the order of the rows decides"


def test_parts_are_alike_in_size_and_labels() -> None:
    labels = np.array([0] * 50 + [1] * 23 + [2] * 7)
    part_N = folds(_keys(list(range(80))), 5, 3, labels)
    assert Counter(part_N.tolist()).keys() == set(range(5))
    assert max(Counter(part_N.tolist()).values()) - min(Counter(part_N.tolist()).values()) <= 2
    for label in range(3):
        shares = np.bincount(part_N[labels == label], minlength=5)
        assert shares.max() - shares.min() <= 1
    assert not np.array_equal(part_N, folds(_keys(list(range(80))), 5, 4, labels))


ROWS = [{"text": f"{'good' if i % 2 else 'bad'} thing {i}", "label": "ab"[i % 2], "of": str(i // 4)} for i in range(24)]


def _recipe(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"train": "rows.jsonl"},
        "objective": "classify",
        "method": "head",
        "train": {"max_steps": 3, "batch_size": 4},
        "precision": "fp32",
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("crossval")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(json.dumps(_recipe(tiny_bert)))
    return folder


@pytest.fixture(scope="module")
def found(project: Path) -> tunesmith.CrossValidation:
    return tunesmith.crossval(project / "recipe.yaml", folds=3, by="of", out=project / "run")


def test_every_row_is_answered_once_by_a_model_that_has_not_seen_it(
    found: tunesmith.CrossValidation, project: Path
) -> None:
    held = [[row.input for row in answers.read(part, "fold")] for part in found.folds]
    assert sorted(text for part in held for text in part) == sorted(row["text"] for row in ROWS)
    of = {row["text"]: row["of"] for row in ROWS}
    groups = [{of[text] for text in part} for part in held]
    assert not any(groups[i] & groups[j] for i in range(3) for j in range(i))
    for part, texts in zip(found.folds, held, strict=True):
        records = json.loads((part / "evaluation.json").read_text())
        assert {(r["n"], r["in_train"]) for r in records if r["group"] == "all"} == {(len(texts), 0)}
        assert (part / "model").is_dir()
    plan = json.loads((found.path / "plan.json").read_text())
    assert plan["audit"]["train"]["rows"] == len(ROWS)


def test_all_answers_are_measured_as_one_set_and_the_spread_is_told(found: tunesmith.CrossValidation) -> None:
    accuracy = found.result.record("accuracy", data="folds")
    assert accuracy["n"] == len(ROWS)
    assert accuracy["low"] < accuracy["value"] <= accuracy["high"]
    pooled = [row.answers["tuned"] for part in found.folds for row in answers.read(part, "fold")]
    assert accuracy["value"] == pytest.approx(np.mean([p.output == p.reference for p in pooled]))
    values = [
        next(r["value"] for r in json.loads((part / "evaluation.json").read_text()) if r["metric"] == "accuracy")
        for part in found.folds
    ]
    tuned = found.spread["accuracy"]
    assert tuned["mean"] == pytest.approx(np.mean(tuned["values"]))
    assert tuned["sd"] == pytest.approx(np.std(tuned["values"], ddof=1))
    assert len(values) == len(tuned["values"]) == 3
    assert found.result.effects, "the majority class of the rows that a model was trained on is its floor"
    page = (found.path / "report.html").read_text()
    assert "trained without it and without all rows of its of" in page
    assert "rows, each answered by a model that was trained without it" in page
    assert "<dt>Rows of all folds</dt>" in page
    assert "each held out once" in page
    assert "standard deviation" in str(tunesmith.api.report(found.path, format="md"))
    assert [row.input for row in answers.read(found.path, "folds")]
    assert tunesmith.predict(found.path, [{"text": "good"}])[0].output in ("a", "b")


def test_what_exists_is_gone_on_with_and_another_recipe_is_refused(
    found: tunesmith.CrossValidation, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (found.folds[0] / "evaluation.json").stat().st_mtime_ns
    words = ["crossval", str(project / "recipe.yaml"), "--folds", "3", "--by", "of", "--out", str(found.path)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "measured on folds" in told
    assert "spread over 3 folds" in told
    for why in ("macro_f1 (difference) on folds: not tested", "roc_auc (majority) on folds: not measured"):
        assert why in told, "each dash of the table has its reason"
    assert (found.folds[0] / "evaluation.json").stat().st_mtime_ns == before
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spread"] == found.spread
    with pytest.raises(RefusedError, match="is a run of another recipe"):
        tunesmith.crossval(project / "recipe.yaml", ["train.max_steps=4"], folds=3, by="of", out=found.path)
    with pytest.raises(RefusedError, match="is of 3 folds by 'of'"):
        tunesmith.crossval(project / "recipe.yaml", folds=4, by="of", out=found.path)


def test_a_part_is_gone_on_with_by_the_command_that_began_all(found: tunesmith.CrossValidation, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(found.path, run)
    assert tunesmith.resume(run).path == run, "what is done is returned as it is"
    (run / "crossval.json").unlink()
    for part in (run, run / "folds" / "2"):
        with pytest.raises(RefusedError, match="is a part of a cross-validation that is not done") as refused:
            tunesmith.resume(part)
        assert f"tunesmith crossval RECIPE --folds 3 --by of --out {run}" in refused.value.remedy


def test_a_column_given_twice_is_one() -> None:
    assert Evaluate.model_validate({"by": ["language", "age", "language"]}).by == ["language", "age"]


def test_folds_judge_what_is_fitted_to_validation_rows(project: Path, tmp_path: Path) -> None:
    """Calibration asks for other rows to judge it: those of the folds will do, and no plan says that nothing does."""
    overrides = ["data.validation=0.7", "evaluate.calibrate=temperature", "evaluate.conformal=0.5"]
    rows = [{**row, "text": f"{row['text']} of set {i}"} for i in range(5) for row in ROWS]
    made = tunesmith.crossval(project / "recipe.yaml", overrides, folds=2, out=tmp_path / "run", data={"train": rows})
    assert {record["data"] for record in made.result.records} == {"folds"}
    assert made.result.record("conformal_coverage", data="folds")["n"] == len(rows)
    card = json.loads((tmp_path / "run" / "model" / "tunesmith.json").read_text())
    assert card["calibration"]["sets"]["coverage"] == 0.5
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["warnings"] == []
    assert tunesmith.predict(tmp_path / "run", [{"text": "good"}])[0].label_set is not None


@pytest.mark.parametrize(
    ("overrides", "options", "cause"),
    [
        ([], {"folds": 1}, "at least 2 folds, not 1"),
        (["data.fold={number: 1, of: 2}"], {}, "data.fold is what cross-validation sets"),
        (["evaluate.keep=3"], {}, "evaluate.keep drops answers"),
        ([], {"folds": 7, "by": "of"}, "7 parts, and there are only 6 values of 'of' that share no row"),
        ([], {"folds": 30}, "30 parts, and there are only 24 different rows"),
    ],
)
def test_what_makes_no_cross_validation_is_refused(
    overrides: list[str], options: dict[str, Any], cause: str, project: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=cause):
        tunesmith.crossval(project / "recipe.yaml", overrides, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists(), "nothing is trained before it is known that there are such parts"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"fold": {"number": 3, "of": 2}}, "part 3 of 2"),
        ({"fold": {"number": 1, "of": 2}, "test": {"fold": "rows.jsonl"}}, "a set called 'fold'"),
    ],
)
def test_a_fold_that_is_none_is_refused(data: dict[str, Any], cause: str, project: Path, tiny_bert: Path) -> None:
    recipe = _recipe(tiny_bert)
    given = {
        key: {k: str(project / v) for k, v in value.items()} if key == "test" else value for key, value in data.items()
    }
    with pytest.raises(InputError, match=cause):
        tunesmith.plan({**recipe, "data": {"train": str(project / "rows.jsonl"), **given}})


def test_folds_of_other_rows_are_not_put_together(project: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Stopped between two folds and begun again after the file has changed: half the answers would be of other rows."""
    file, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    file.write_text((project / "rows.jsonl").read_text())
    recipe.write_text(json.dumps(_recipe(tiny_bert)))

    def stop(event: str, data: dict[str, Any]) -> None:
        if event == "step" and (tmp_path / "run/folds/1/evaluation.json").exists():
            raise tunesmith.StopRun

    with pytest.raises(StoppedError, match=r"stopped after step 1, as asked, in .*folds/2") as stopped:
        tunesmith.crossval(recipe, folds=3, out=tmp_path / "run", listen=stop)
    assert stopped.value.remedy == "go on with the same command"
    whole = file.read_text()
    file.write_text(whole.replace("good thing 3", "other thing"))
    with pytest.raises(RefusedError, match=r"run cannot go on as it began: .*train"):
        tunesmith.crossval(recipe, folds=3, out=tmp_path / "run")
    file.write_text(whole)
    assert tunesmith.crossval(recipe, folds=3, out=tmp_path / "run").result.record("accuracy", data="folds")["n"] == 24


def test_what_is_wrong_with_a_later_fold_is_told_before_the_first(project: Path, tmp_path: Path) -> None:
    odd = {"text": "an odd one", "label": "odd", "of": "odd"}
    with pytest.raises(RefusedError, match="1 rows of fold have labels that train lacks: 'odd'"):
        tunesmith.crossval(project / "recipe.yaml", folds=3, out=tmp_path / "run", data={"train": [*ROWS, odd]})
    assert not (tmp_path / "run").exists()


def test_rows_whose_label_their_own_model_does_not_know_are_told(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model that is left knows the label, those of the folds do not: the numbers are theirs."""
    odd = {"text": "an odd one", "label": "odd", "of": "odd"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, odd]))
    words = ["crossval", str(project / "recipe.yaml"), f"data.train={tmp_path}/rows.jsonl", "--folds", "3"]
    assert main([*words, "data.allow=[unknown_labels]", "--out", str(tmp_path / "run")]) == 0
    told = "1 of 25 rows of folds have labels that the model does not know"
    assert told in capsys.readouterr().out
