"""The examples on their data sets: what each tuned model reaches, and what it has to beat, with intervals and tests.

    python benchmarks/results.py [--only NAME ...] [--again] [--runs DIR]

Each row trains a recipe of examples/ by the command line, in a process of its own, and is kept in results/results.json;
a row that is there is not measured again unless --again or --only asks, a run that was stopped is gone on with, and one
that is finished and of the same recipe is read as it stands (delete its folder to train again). docs/results.md is
written from that file. The data sets must lie where the examples look for them: ../shared/data beside the checkout.

On two cores all rows take two to three hours: a good hour of that is distillation (three trainings), a quarter of an
hour each are SciTLDR and NIST; the others take minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results_page import FOLDS, TASKS, Task, page
from spine import data_sets, rows_of
from tfidf import RIVALS, unseen

from tunesmith import demo
from tunesmith.data.ingest import FOLD
from tunesmith.evaluation import answers
from tunesmith.evaluation.answers import Answered
from tunesmith.evaluation.metrics import build
from tunesmith.evaluation.paired import compare
from tunesmith.evaluation.run import measure
from tunesmith.measuring import BASE, TUNED
from tunesmith.recipe_file import load_recipe, resolve_paths
from tunesmith.rundir import read_json
from tunesmith.types import Prediction

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results" / "results.json"
PAGE = CHECKOUT / "docs" / "results.md"
SHRUNK = 8  # layers of the student
PARTS = 5  # of all articles but validation's
ELSEWHERE = {"gsm8k": ("question", "answer"), "self_instruct_seed": ("instruction", "input", "output")}
AT_MOST = 150  # of their rows
Clusters = NDArray[np.int64] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), metavar="NAME", default=[])
    parser.add_argument("--again", action="store_true", help="measure all rows again, not only those that are missing")
    parser.add_argument("--runs", type=Path, default=CHECKOUT / "runs" / "results", help="where the runs go")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only or [name for name in TASKS if options.again or name not in kept]:
        kept[name] = MEASURES.get(name, measured)(TASKS[name], options.runs.resolve())
        keep(kept)
        print(name, json.dumps(kept[name]["figures"][0]), flush=True)
    keep(kept)


def keep(kept: Mapping[str, Any]) -> None:
    """The rows, and the page of them: made from the file, so that it is what the file says."""
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


# ---------------------------------------------------------------- rows


def measured(task: Task, runs: Path) -> dict[str, Any]:
    """The example's run, against what tunesmith measured it beside or against scikit-learn's answers."""
    recipe = CHECKOUT / "examples" / task.recipe
    run = trained(recipe, runs / task.name)
    asked = list(answers.read(run, "test"))
    chosen: dict[str, Any] = {}
    if task.rival in RIVALS:
        data = resolve_paths(load_recipe(recipe)[0], recipe.parent).data
        train, validation = rows_of(Path(str(data.train))), rows_of(Path(str(data.validation)))
        before, chosen = RIVALS[task.rival](unseen(train, asked), validation, asked)
    else:
        before = of(asked, next(model for model in asked[0].answers if model != TUNED))
    found = figures(run, task.metrics, "test", asked, before, of(asked, TUNED), clusters(run, task, asked))
    return told([run], found) | ({"chosen": chosen} if chosen else {})


def adapted(task: Task, runs: Path) -> dict[str, Any]:
    """Domain adaptation, and what became of other texts: problems in words, and instructions with their answers."""
    row, run = measured(task, runs), runs / task.name
    for name, columns in ELSEWHERE.items():
        texts = runs / "texts" / f"{name}.jsonl"
        rows = enumerate(rows_of(data_sets() / name / "test.jsonl")[:AT_MOST])
        # The recipe keeps texts of one family together: each of these is its own.
        write_rows(texts, ({"text": "\n".join(row[c] for c in columns if row[c]), "family": n} for n, row in rows))
        if name not in answers.kept(run):
            tunesmith("evaluate", str(run), "--data", str(texts), "--name", name)
        asked = list(answers.read(run, name))
        row["figures"] += figures(run, task.metrics, name, asked, of(asked, BASE), of(asked, TUNED))
    return row


def distilled(task: Task, runs: Path) -> dict[str, Any]:
    """A teacher, a student of some of its layers, and that student trained without and with the teacher."""
    recipe = CHECKOUT / "examples" / task.recipe
    for split, rows in demo.rows(quick=False).items():
        write_rows(runs / "demo-rows" / f"{split}.jsonl", rows)
    data = [f"data.{split}={runs / 'demo-rows' / split}.jsonl" for split in demo.SPLITS]
    alone = ["objective=sft", "teacher=null"]
    large = ["model=smollm2-135m-instruct", "train.learning_rate=5e-5", "train.epochs=2"]
    teacher = trained(recipe, runs / "teacher", *data, *alone, *large)
    start = runs / "start"
    if not start.is_dir():
        tunesmith("shrink", str(teacher), "--layers", str(SHRUNK), "--to", str(start))
    student = [*data, f"model={start}"]
    labels = trained(recipe, runs / "labels-only", *student, *alone)
    result = trained(recipe, runs / task.name, *student, f"teacher={teacher}")
    sides = [list(answers.read(run, "test")) for run in (labels, result, teacher)]
    before, after, of_teacher = (of(asked, TUNED) for asked in sides)
    row = told([teacher, labels, result], figures(result, task.metrics, "test", sides[0], before, after))
    row["teacher"] = figures(teacher, task.metrics, "test", sides[0], before, of_teacher)[0]["after"]
    return row


def crossed(task: Task, runs: Path) -> dict[str, Any]:
    """The rows of all articles but validation's, each answered by a model that was trained without its article.

    As `tunesmith crossval --by article` does, but for its last model of all rows; beside it the test rows alone.
    """
    recipe, of_test = CHECKOUT / "examples" / task.recipe, measured(task, runs)
    data = resolve_paths(load_recipe(recipe)[0], recipe.parent).data
    rows = {split: rows_of(Path(str(getattr(data, split)))) for split in ("train", "validation", "test")}
    joined = {"train": [*rows["train"], *rows["test"]], "validation": rows["validation"]}
    for split, kept in joined.items():
        write_rows(runs / "joined" / f"{split}.jsonl", ({**row, "article": article(row)} for row in kept))
    given = [f"data.{split}={runs / 'joined' / split}.jsonl" for split in joined]
    given += ["data.test=null", "evaluate.cluster=article"]
    parts: list[Path] = []
    for part in range(1, PARTS + 1):
        held = f"data.fold={{number: {part}, of: {PARTS}, by: article}}"
        parts.append(trained(recipe, runs / f"{task.name}-folds" / str(part), *given, held))
    asked = [row for part in parts for row in answers.read(part, FOLD)]
    sources = clusters(parts[0], task, asked)
    found = figures(parts[0], task.metrics, FOLDS, asked, of(asked, BASE), of(asked, TUNED), sources)
    return told(parts, [*found, *of_test["figures"]])


def article(row: Mapping[str, Any]) -> str:
    """xq-21-0 is a paragraph of the article 21."""
    return str(row["positive_ids"][0]).split("-")[1]


MEASURES: Mapping[str, Callable[[Task, Path], dict[str, Any]]] = {
    "nist_sp800_53": adapted,
    "distilled": distilled,
    "xquad_retrieval": crossed,
}


# ---------------------------------------------------------------- figures


def of(asked: Sequence[Answered], model: str) -> list[Prediction]:
    return [row.answers[model] for row in asked]


def figures(
    run: Path,
    metrics: Sequence[str],
    data: str,
    asked: Sequence[Answered],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    clusters_N: Clusters = None,
) -> list[dict[str, Any]]:
    """Both models by each metric, with intervals, and the paired test: as `evaluate` and `compare` make them."""
    seed = int(read_json(run / "manifest.json")["seed"])
    labels: list[str] | None = read_json(run / "plan.json")["meaning"]["objective"][2].get("labels")
    found: list[dict[str, Any]] = []
    for metric in build(metrics, after, labels):
        one, other = (measure("", data, side, [metric], seed, clusters_N)[0] for side in (before, after))
        effect = compare(before, after, metric, seed, clusters_N=clusters_N)
        found.append(
            {
                "data": data,
                "metric": metric.name,
                "n": len(asked),
                "clusters": None if clusters_N is None else int(clusters_N.max()) + 1,
                "before": finite(one.value, one.low, one.high),
                "after": finite(other.value, other.low, other.high),
                "difference": finite(effect.difference, effect.low, effect.high),
                "p": finite(effect.p)[0],
                **({} if clusters_N is None else {"p of rows": finite(compare(before, after, metric, seed).p)[0]}),
            }
        )
    return found


def finite(*numbers: float) -> list[float | None]:
    """As JSON has them: null for a limit or p that the rows cannot carry."""
    return [number if math.isfinite(number) else None for number in numbers]


def clusters(run: Path, task: Task, asked: Sequence[Answered]) -> Clusters:
    """Which rows come from one source: by the task, else by the recipe's column; None where each stands for itself."""
    column = read_json(run / "plan.json")["meaning"]["evaluate"]["cluster"]
    if task.source is None and column is None:
        return None
    sources = [task.source(row) if task.source else row.tags[column] for row in asked]
    return np.unique(sources, return_inverse=True)[1]


def told(runs: Sequence[Path], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The row: its figures, and of its runs the model, the machine and the seconds of all their steps."""
    manifest, plan = (read_json(runs[-1] / name) for name in ("manifest.json", "plan.json"))
    machine, libraries, placement = manifest["machine"], manifest["libraries"], plan["placement"]
    times = [json.loads(line)["seconds"] for run in runs for line in (run / "timings.jsonl").read_text().splitlines()]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if placement["device"] == "cpu" else ""
    return {
        "figures": found,
        "method": plan["meaning"]["method"][0],
        "seconds": round(sum(times), 1),
        "machine": f"{machine['device']}, {placement['precision']}{threads}",
        "versions": ", ".join(f"{name} {libraries[name]}" for name in ("tunesmith", "torch", "transformers", "peft")),
        "python": machine["python"],
        "date": manifest["created"][:10],
    }


# ---------------------------------------------------------------- runs


def trained(recipe: Path, run: Path, *overrides: str) -> Path:
    """The run of the recipe in that folder: made, gone on with, or finished before."""
    if not (run / "manifest.json").is_file():
        tunesmith("train", str(recipe), *overrides, f"out={run}")
        return run
    if meaning(recipe, overrides) != meaning(run / "recipe.yaml"):
        sys.exit(f"{run} is a run of another recipe than {recipe.name} is now: delete it, or give other --runs")
    if not (run / "evaluation.json").is_file():
        tunesmith("resume", str(run))
    return run


def meaning(path: Path, overrides: Sequence[str] = ()) -> str:
    """All of a recipe but where it runs, and where to."""
    recipe, _ = load_recipe(path, overrides)
    return resolve_paths(recipe, path.parent).model_dump_json(exclude={"out", "place"})


def tunesmith(*words: str) -> None:
    """The command line, whose own output says how it goes."""
    print("tunesmith", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "tunesmith", *words], check=False)
    if done.returncode:
        sys.exit(f"tunesmith {words[0]} ended with {done.returncode}")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
