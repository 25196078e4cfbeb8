"""What can be measured: a run, as its recipe says, or a model's folder that is no run, by the usual rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import rundir
from tunesmith.errors import InputError
from tunesmith.evaluation.baselines import label_counts
from tunesmith.models.saved import CARD, read_card
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import load_recipe, parse_recipe
from tunesmith.rundir import RunDir
from tunesmith.types import LabelCounts

SEED = 17  # of intervals, where no recipe names one


@dataclass(frozen=True, slots=True)
class Measurable:
    """Where results go, and how they are measured; `label_counts` are those of the training rows, where known."""

    run: RunDir
    recipe: Recipe
    label_counts: LabelCounts | None
    is_run: bool


def is_model(path: Path) -> bool:
    """Whether `path` is an exported or combined model's own folder, and no run."""
    return (path / CARD).is_file() and not (path / "manifest.json").is_file()


def run_of(path: Path) -> Path:
    """The run that `path` is the model/ of; else `path`."""
    inside = path.name == "model" and is_model(path) and (path.parent / "manifest.json").is_file()
    return path.parent if inside else path


def measurable(path: Path, by: Sequence[str] | None = None) -> Measurable:
    """InputError where `path` is neither a run nor a model's folder, RefusedError where a file of it is damaged.

    `by`: the columns that rows are grouped by, in place of the recipe's.
    """
    if not is_model(path):
        run = RunDir.open(path)
        recipe = _grouped(load_recipe(path / "recipe.yaml")[0], by)
        audit = rundir.read_record(path / "plan.json", "audit")["audit"]
        return Measurable(run, recipe, label_counts(audit["train"]), True)
    card = read_card(path)
    asked = {
        "model": card["base"]["name"],
        "data": {"train": "unknown", "columns": card.get("columns"), "format": card.get("format")},
        "objective": {"name": card["objective"]["name"], **card["objective"]["options"]},
        "method": card["method"]["name"],
        "seed": SEED,
    }
    return Measurable(RunDir(path), _grouped(parse_recipe(asked), by), None, False)


def _grouped(recipe: Recipe, by: Sequence[str] | None) -> Recipe:
    if by is None:
        return recipe
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"by": list(by)})})


def check_measured(path: Path) -> None:
    """InputError where nothing was measured yet: of a run that is not finished, or of a model's folder."""
    if (path / "evaluation.json").is_file():
        return
    if is_model(path):
        raise InputError(
            f"{path} was not measured yet", f"measure it: `tunesmith evaluate {path} --data FILE --keep all`"
        )
    raise InputError(f"{path} is not finished: nothing was measured yet", f"finish it with `tunesmith resume {path}`")


def planned(path: Path) -> tuple[dict[str, Any], int]:
    """What a comparison reads of a run's plan, and its seed; of a model's folder the same from its card."""
    if not is_model(path):
        RunDir.open(path)
        seed = int(rundir.read_record(path / "manifest.json", "seed")["seed"])
        return rundir.read_record(path / "plan.json", "meaning", "audit"), seed
    told = read_card(path)["objective"]
    meaning = {"objective": [told["name"], told["options"], told["learned"]], "evaluate": {"cluster": None}}
    return {"meaning": meaning, "audit": {"train": {"labels": None}}}, SEED
