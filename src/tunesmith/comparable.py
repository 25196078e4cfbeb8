"""Runs that can be compared: opened and checked, and their answers matched row by row."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import rundir
from tunesmith.errors import InputError
from tunesmith.evaluation import answers
from tunesmith.evaluation.answers import MAJORITY, Answered
from tunesmith.evaluation.baselines import label_counts
from tunesmith.measurable import check_measured, planned, run_of
from tunesmith.types import Prediction

TUNED, ALL = "tuned", "all"
FEW = 5
PathLike = str | os.PathLike[str]
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A model that is compared: which of a run's it is, and the names of those that it is told against."""

    run: Path
    model: str
    against: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A row with what each model answered, by the model's name."""

    row: Answered
    answers: Mapping[str, Prediction]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has been measured. `labels` are None where answers are text."""

    path: Path
    name: str
    plan: Mapping[str, Any]
    seed: int
    records: Sequence[Mapping[str, Any]]

    @property
    def objective(self) -> str:
        return str(self.plan["meaning"]["objective"][0])

    @property
    def labels(self) -> list[str] | None:
        return self.plan["meaning"]["objective"][2].get("labels")

    @property
    def cluster(self) -> str | None:
        return self.plan["meaning"]["evaluate"]["cluster"]

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(str(record["data"]) for record in self.records))

    def measured(self, data: str) -> dict[str, int]:
        """The metrics of all rows of a set, with how many rows that were."""
        return {r["metric"]: r["n"] for r in self.records if (r["data"], r["group"], r["model"]) == (data, ALL, TUNED)}

    def majority(self) -> dict[str, float]:
        """The probabilities of the majority class, which are not written with every row."""
        counts = label_counts(self.plan["audit"]["train"])
        return {} if counts is None else {label: count / counts.rows for label, count in counts.of.items()}


def opened(paths: Sequence[PathLike]) -> list[Finished]:
    """The runs, each finished, with labels that can be compared; told apart by their folders' names."""
    if not paths:
        raise InputError("there is no run to compare", "give the folders of two runs, or of one to see beside its base")
    folders = [run_of(Path(path)) for path in paths]
    for one, other in itertools.combinations(folders, 2):
        if one.resolve() == other.resolve():
            raise InputError(f"the run {other} is given twice", "give each run once")
    plain = [folder.resolve().name for folder in folders]
    names = [name if plain.count(name) == 1 else str(folder) for name, folder in zip(plain, folders, strict=True)]
    runs = [_open(folder, name) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        _check_labels(runs[0], run)
    return runs


def common_sets(runs: Sequence[Finished], asked: Sequence[str] | None) -> list[str]:
    """The test sets to compare on: those asked for, else all that every run has kept answers to."""
    kept = [answers.kept(run.path) for run in runs]
    for name in asked or ():
        for run, own in zip(runs, kept, strict=True):
            if name not in run.sets:
                raise InputError(f"{run.name} was not measured on {name!r}", f"it was on {_few(run.sets)}")
            if name not in own:
                raise _nothing_kept(run, name)
    if asked:
        return list(dict.fromkeys(asked))
    for run, own in zip(runs, kept, strict=True):
        if not own:
            raise _nothing_kept(run, None)
    common = [name for name in runs[0].sets if all(name in own for own in kept)]
    if not common:
        have = "; ".join(f"{run.name} has {_few(own)}" for run, own in zip(runs, kept, strict=True))
        raise InputError(
            f"the runs have no test set in common: {have}",
            "measure them on the same rows: `tunesmith evaluate RUN --data FILE` for each",
        )
    return common


def shared_rows(runs: Sequence[Finished], name: str) -> list[list[Answered]]:
    """For each row that all runs answered, in the first run's order, what each run has of it."""
    read = [{(row.key, row.copy): row for row in answers.read(run.path, name)} for run in runs]
    for run, own in zip(runs[1:], read[1:], strict=True):
        _check_references(runs[0], read[0], run, own, name)
    keys = [key for key in read[0] if all(key in own for own in read[1:])]
    if not keys:
        sizes = ", ".join(f"{run.name} {len(own):,}" for run, own in zip(runs, read, strict=True))
        raise InputError(
            f"the runs share no row of {name} (rows with answers: {sizes})",
            "measure them on the same rows: `tunesmith evaluate RUN --data FILE` for each",
        )
    return [[own[key] for own in read] for key in keys]


def taking_part(
    runs: Sequence[Finished], rows: Mapping[str, list[list[Answered]]], with_base: bool
) -> tuple[dict[str, Entrant], dict[str, list[SharedRow]]]:
    """Who takes part, by name, and every row with what each of them answered; bases that answer alike are one.

    Each run is told against all given before it, and against its base.
    """
    places: dict[str, tuple[int, str]] = {}
    known: dict[str, list[str]] = {}
    against: list[tuple[str, ...]] = [tuple(earlier.name for earlier in runs[:index]) for index in range(len(runs))]
    for index, run in enumerate(runs if with_base else ()):
        model, outputs = _beside(run, [of[index] for shared in rows.values() for of in shared])
        name = next((name for name, answered in known.items() if answered == outputs), None)
        if name is None:
            name = f"{run.name}:{model}" if model in known else model
            known[name], places[name] = outputs, (index, model)
        against[index] += (name,)
    places |= {run.name: (index, TUNED) for index, run in enumerate(runs)}
    shares = [run.majority() for run in runs]

    def answer(of: Sequence[Answered], index: int, model: str) -> Prediction:
        own = of[index].answers[model]
        return replace(own, probabilities=shares[index]) if model == MAJORITY else own

    def matched(of: Sequence[Answered]) -> SharedRow:
        tags = {column: value for own in reversed(of) for column, value in own.tags.items()}
        return SharedRow(replace(of[0], tags=tags), {who: answer(of, *place) for who, place in places.items()})

    answered = {name: [matched(of) for of in shared] for name, shared in rows.items()}
    models = {
        name: Entrant(runs[index].path, model, against[index] if model == TUNED else ())
        for name, (index, model) in places.items()
    }
    return models, answered


def _open(path: Path, name: str) -> Finished:
    plan, seed = planned(path)
    check_measured(path)
    return Finished(path, name, plan, seed, rundir.read_json(path / "evaluation.json"))


def _check_labels(first: Finished, run: Finished) -> None:
    if (first.labels is None) != (run.labels is None):
        raise InputError(
            f"{first.name} was trained for {first.objective} and {run.name} for {run.objective}",
            "compare runs whose answers are of one kind",
        )
    mine, theirs = set(first.labels or ()), set(run.labels or ())
    if mine != theirs:
        apart = [f"only {r.name} has {_few(s)}" for r, s in ((first, mine - theirs), (run, theirs - mine)) if s]
        raise InputError(
            f"{first.name} and {run.name} chose among different labels: {'; '.join(apart)}",
            "train both on rows of the same labels",
        )


def _check_references(
    first: Finished, mine: Mapping[Key, Answered], run: Finished, theirs: Mapping[Key, Answered], name: str
) -> None:
    """Raises InputError where the same question has another expected answer in the other run."""
    alone = {row.shown: row for key, row in theirs.items() if key not in mine}
    same = [(row, theirs.get(key, alone.get(row.shown))) for key, row in mine.items()]
    changed = [(row, other) for row, other in same if other is not None and other.reference != row.reference]
    if changed:
        one, other = changed[0]
        raise InputError(
            f"{len(changed):,} rows of {name} have other references in {run.name} than in {first.name}: "
            f"{one.where} expects {_short(one.reference)}, {other.where} {_short(other.reference)}",
            "measure both runs on one file: `tunesmith evaluate RUN --data FILE` for each",
        )


def _beside(run: Finished, rows: Sequence[Answered]) -> tuple[str, list[str]]:
    """What a run was measured beside, and what that answered."""
    model = next((model for model in rows[0].answers if model != TUNED), None)
    if model is None or not all(model in row.answers for row in rows):
        raise InputError(
            f"{run.name} was measured without its base (evaluate.base: false, or --no-base)",
            "name another run to compare it with, or measure it again: `tunesmith evaluate RUN --data FILE`",
        )
    return model, [row.answers[model].output for row in rows]


def _nothing_kept(run: Finished, name: str | None) -> InputError:
    return InputError(
        f"{run.name} has kept no answers{f' to {name}' if name else ''} (evaluate.keep)",
        f"measure it again and keep them: `tunesmith evaluate {run.path} --data FILE --keep all`",
    )


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:FEW]) + (f" and {len(listed) - FEW} more" if len(listed) > FEW else "") or "none"


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
