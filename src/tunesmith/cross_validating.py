"""Cross-validation: every row is answered by a model that was not trained on it, and a last model is trained on all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import api, measuring, rundir, training
from tunesmith.data.given import PathLike, Rows
from tunesmith.data.ingest import FOLD
from tunesmith.errors import InputError, RefusedError, StoppedError
from tunesmith.evaluation import answers
from tunesmith.models.saved import folder_of, read_card
from tunesmith.plugins import load_plugins
from tunesmith.recipe import Fold, Recipe
from tunesmith.recipe_file import load_recipe, run_name
from tunesmith.report import write
from tunesmith.rundir import RunDir
from tunesmith.session import objective_of
from tunesmith.types import Prediction, Row

FREE = ("out", "place", "report_to")  # of a recipe: what may differ where a cross-validation is gone on with
_UNSEEN = {"in_train": 0, "in_validation": 0}  # of a fold's rows, by the model that answers them


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """`result` is the run on all rows, whose records of the set "folds" are over the answers of all folds.

    `spread`: for each metric its value in each fold, their mean and standard deviation.
    """

    result: api.Result
    folds: list[Path]
    spread: dict[str, dict[str, Any]]

    @property
    def path(self) -> Path:
        return self.result.path


def crossval(
    recipe: Recipe | Mapping[str, Any] | PathLike,
    overrides: Sequence[str] = (),
    *,
    folds: int = 5,
    by: str | None = None,
    data: Mapping[str, Rows] | None = None,
    out: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    listen: api.Listeners | None = None,
    progress: bool | None = None,
) -> CrossValidation:
    """Trains a recipe once on all rows of `data.train`, and once without each of `folds` parts, which it then answers.

    Parts have as many rows and labels of each kind as can be; rows that are alike, and rows of one value of the column
    `by`, stay in one part. The run on all rows is `out`, the others are `out`/folds/1, 2, ... What exists of them is
    gone on with. The other arguments, and what is raised, are those of `tunesmith.train`.
    """
    typed, name = _recipe(recipe, overrides, data)
    if folds < 2:
        raise InputError(f"cross-validation has at least 2 folds, not {folds}", "ask for 5 or 10")
    if typed.data.fold is not None:
        raise InputError("data.fold is what cross-validation sets itself", "leave it out of the recipe")
    if typed.evaluate.keep is not None:
        raise InputError(
            "evaluate.keep drops answers of the folds, which are measured together", "leave evaluate.keep out"
        )
    path = Path(out) if out else typed.out or Path("runs") / name
    options: dict[str, Any] = {"plugins": plugins, "listen": listen, "progress": progress}
    parts = [path / rundir.FOLDS / str(number) for number in range(1, folds + 1)]
    runs = {run: _fold(typed, number, folds, by) for number, run in enumerate([path, *parts])}
    _check(runs, plugins)
    for run, of_run in runs.items():
        try:
            _trained(of_run, run, options)
        except StoppedError as stopped:
            raise StoppedError(f"{stopped.cause}, in {run}", "go on with the same command") from stopped
    spread = _spread(parts)
    result = _measured(path, typed, parts, {"folds": folds, "by": by, "metrics": spread})
    return CrossValidation(result, parts, spread)


def _fold(recipe: Recipe, number: int, of: int, by: str | None) -> Recipe:
    """The recipe of one part; of number 0 that of all rows."""
    update: dict[str, Any] = {"fold": Fold(number=number, of=of, by=by), **({"test": None} if number else {})}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def _recipe(
    recipe: Recipe | Mapping[str, Any] | PathLike, overrides: Sequence[str], data: Mapping[str, Rows] | None
) -> tuple[Recipe, str]:
    typed, origin = api.read_recipe(recipe, overrides, data)
    return typed, f"{run_name(origin.file) if origin.file else 'run'}-crossval"


def _check(runs: Mapping[Path, Recipe], plugins: Sequence[PathLike]) -> None:
    """Tells what is wrong with any of the runs before one is trained: rows that make no such parts, or another recipe
    or other rows than an earlier command began with.
    """
    begun = [path for path in runs if (path / "manifest.json").is_file()]
    for path in begun:
        before, _ = load_recipe(path / "recipe.yaml")
        fold, asked = before.data.fold, runs[path].data.fold
        if fold is not None and asked is not None and (fold.of, fold.by) != (asked.of, asked.by):
            by = f" by {fold.by!r}" if fold.by else ""
            raise RefusedError(
                f"{path} is of {fold.of} folds{by}", "ask for the same, give another --out, or delete it"
            )
        if _meaning(before) != _meaning(runs[path]):
            raise RefusedError(f"{path} is a run of another recipe", "give another --out, or delete it")
    hashes = load_plugins(plugins)
    for path, recipe in runs.items():
        planned = api.plan(recipe, plugins=plugins, progress=False)
        if path in begun:
            training.check_same(RunDir.open(path), planned, hashes)


def _trained(recipe: Recipe, path: Path, options: Mapping[str, Any]) -> api.Result:
    """The run of a recipe in a folder: begun, gone on with, or finished before."""
    if not (path / "manifest.json").is_file():
        return api.train(recipe, out=path, **options)
    return api.go_on(path, **options)


def _meaning(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=set(FREE))


def _spread(parts: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Metrics of all rows of the tuned model that every fold has."""
    of_parts = [
        {
            str(record["metric"]): float(record["value"])
            for record in measuring.read_results(RunDir(part))["records"]
            if (record["model"], record["group"], record["data"]) == (measuring.TUNED, measuring.ALL, FOLD)
            and record["value"] is not None
        }
        for part in parts
    ]
    found: dict[str, dict[str, Any]] = {}
    for metric in of_parts[0]:
        if all(metric in one for one in of_parts):
            values = [one[metric] for one in of_parts]
            found[metric] = {"values": values, "mean": statistics.fmean(values), "sd": statistics.stdev(values)}
    return found


def _measured(path: Path, recipe: Recipe, parts: Sequence[Path], told: Mapping[str, Any]) -> api.Result:
    """Measures the answers of all folds as one set, and adds that to the run on all rows."""
    run = RunDir.open(path)
    objective = objective_of(read_card(folder_of(path)))  # of all rows, so that it knows every label
    rows: list[Row] = []
    found: dict[str, list[Prediction]] = {}
    for answered in (row for part in parts for row in answers.read(part, FOLD)):
        rows.append(Row({}, answered.where, dict(answered.tags)))
        for model, prediction in answered.answers.items():
            found.setdefault(model, []).append(prediction)
    with run.hold():
        results = measuring.read_results(run)
        whole = {model: own for model, own in found.items() if len(own) == len(rows)}
        measuring.merge(
            results, measuring.score(rundir.FOLDS, rows, whole, objective, recipe, counts=_UNSEEN | _unknown(parts))
        )
        kept = path / answers.FOLDER
        kept.mkdir(exist_ok=True)
        rundir.write_file(kept / f"{rundir.FOLDS}.jsonl", b"".join(_lines(parts)))
        rundir.write_json(path / rundir.CROSSVAL, told)
        measuring.write_results(run, results)
        write.try_report(path)
    return api.result_of(run, results)


def _unknown(parts: Sequence[Path]) -> dict[str, int]:
    """How many rows have labels that the model which answered them does not know; nothing where none has."""
    counts = [
        next(int(record.get("unknown_labels", 0)) for record in measuring.read_results(RunDir(part))["records"])
        for part in parts
    ]
    return {"unknown_labels": sum(counts)} if any(counts) else {}


def _lines(parts: Sequence[Path]) -> Iterator[bytes]:
    return ((part / answers.FOLDER / f"{FOLD}.jsonl").read_bytes() for part in parts)
