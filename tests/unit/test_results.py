"""docs/results.md is what was measured; every example is measured; the linear models are given a fair try."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith import api
from tunesmith.data.checks import row_keys
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import Answered
from tunesmith.evaluation.metrics import statistics
from tunesmith.recipe_file import dump_recipe, load_recipe, resolve_paths

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
KEPT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_page_is_what_was_measured() -> None:
    from results_page import page

    told = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert told == page(KEPT), "run `python benchmarks/results.py`"


def test_every_example_is_measured_and_all_that_is_measured_are_examples() -> None:
    from results_page import TASKS

    assert {task.recipe for task in TASKS.values()} == {path.name for path in EXAMPLES}
    assert KEPT.keys() <= TASKS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_recipe_that_says_what_it_is_for(path: Path) -> None:
    load_recipe(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"tunesmith train examples/{path.name}" in text


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "distilled"], ids=lambda path: path.stem)
def test_an_example_plans(path: Path, model_cache: Path) -> None:
    recipe = resolve_paths(load_recipe(path)[0], path.parent)
    if not Path(str(recipe.data.train)).is_file():
        pytest.skip("the data sets are not beside the checkout")
    assert api.plan(path).hash


def figure(before: float, after: float, p: float | None) -> dict[str, Any]:
    return {"before": [before, 0, 1], "after": [after, 0, 1], "p": p}


@pytest.mark.parametrize(
    ("name", "before", "after", "p", "wins"),
    [
        ("vader_label", 0.7, 0.8, 0.009, True),
        ("vader_label", 0.7, 0.8, 0.01, False),
        ("vader_label", 0.8, 0.7, 0.001, False),
        ("vader_label", 0.7, 0.8, None, False),
        ("nist_sp800_53", 10.0, 6.9, 0.001, True),
        ("nist_sp800_53", 10.0, 7.1, 0.001, False),
        ("nist_sp800_53", 10.0, 13.0, 0.001, False),
    ],
)
def test_to_beat_is_to_be_better_by_more_than_chance_and_by_what_was_asked(
    name: str, before: float, after: float, p: float | None, wins: bool
) -> None:
    from results_page import TASKS, beats

    assert beats(TASKS[name], figure(before, after, p)) is wins


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path) -> None:
    from results import trained

    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "evaluation.json").write_text("[]")
    recipe = ROOT / "examples" / "vader_label.yaml"
    asked, _ = load_recipe(recipe, [f"out={tmp_path}", "place.threads=1"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(resolve_paths(asked, recipe.parent)))
    assert trained(recipe, tmp_path) == tmp_path
    with pytest.raises(SystemExit, match=r"is a run of another recipe than vader_label\.yaml is now"):
        trained(recipe, tmp_path, "train.epochs=9")


WORDS = {"joy": "glad happy", "fear": "afraid scared", "anger": "furious cross"}


def texts(count: int, start: int) -> Iterator[dict[str, Any]]:
    """Rows whose labels, class and rating their words tell."""
    for number in range(start, start + count):
        label = sorted(WORDS)[number % 3]
        both = [label, "joy"] if number % 4 == 0 and label != "joy" else [label]
        said = " ".join(WORDS[one].split()[number % 2] for one in both)
        yield {"text": f"{said} {number}", "labels": both, "label": label, "rating": float(number % 3)}


def asked(rows: list[dict[str, Any]], column: str) -> list[Answered]:
    def reference(row: dict[str, Any]) -> str:
        return json.dumps(sorted(row[column])) if column == "labels" else str(row[column])

    keys = [row_keys({"text": row["text"]})[0].hex() for row in rows]
    return [
        Answered(key, key, 1, f"test.jsonl:{n}", row["text"], reference(row), {}, {})
        for n, (row, key) in enumerate(zip(rows, keys, strict=True), 1)
    ]


@pytest.mark.parametrize(
    ("rival", "column", "metric"),
    [("label_sets", "labels", "micro_f1"), ("labels", "label", "accuracy"), ("scores", "rating", "pearson")],
)
def test_a_linear_model_learns_what_words_tell_and_is_chosen_on_the_validation_rows(
    rival: str, column: str, metric: str
) -> None:
    import tfidf

    train, validation, test = (list(texts(count, start)) for count, start in ((60, 0), (30, 100), (30, 200)))
    found, chosen = getattr(tfidf, rival)(train, validation, asked(test, column))
    measure = METRICS.get(metric)(())
    assert float(measure.aggregate(statistics(measure, found).sum(axis=0))) > 0.95
    assert chosen["validation"] > 0.95
    assert [p.where for p in found] == [f"test.jsonl:{n}" for n in range(1, 31)]


def test_a_linear_model_does_not_learn_from_rows_that_are_asked_about() -> None:
    from tfidf import unseen

    rows = list(texts(6, 0))
    assert unseen(rows, asked(rows[:2], "label")) == rows[2:]
