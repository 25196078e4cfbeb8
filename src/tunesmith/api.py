"""The verbs: plan, train, resume, evaluate, predict, chat, load. What the command line does is done here."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import measuring, rundir, session, training
from tunesmith.chatting import Chat, default_sampling
from tunesmith.data.formats import rows as formatted
from tunesmith.data.read import read, read_memory
from tunesmith.engine.precision import choose_device
from tunesmith.errors import InputError
from tunesmith.models.cache import cache_dir
from tunesmith.models.policy import Policy
from tunesmith.monitor import Listen
from tunesmith.planning import Assets, Plan, make_plan
from tunesmith.protocols import Method, Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import Origin, load_recipe, parse_recipe, resolve_paths, run_name
from tunesmith.report import notebook
from tunesmith.rundir import RunDir
from tunesmith.settings import Placement
from tunesmith.tracking import tracked, unfinished
from tunesmith.types import Prediction, Row, SampleSpec

Rows = Sequence[Mapping[str, Any]]
PathLike = str | os.PathLike[str]

_LOADED: dict[Path, str] = {}  # sha256 of each plugin that this process has run


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its folder, and what evaluation.json and comparison.json hold. A notebook shows it as a table."""

    path: Path
    records: list[dict[str, Any]]
    effects: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        return notebook.results_html(self.path, self.records, self.effects)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run's model, ready to answer."""

    policy: Policy
    objective: Objective
    method: Method
    renderer: Any
    card: dict[str, Any]

    def predict(self, rows: Sequence[Row], max_new_tokens: int | None = None) -> list[Prediction]:
        spec = SampleSpec(max_new_tokens or int(self.card["max_new_tokens"]))
        return self.objective.predict(self.policy, rows, self.renderer, spec)


def _watching() -> Listen:
    """Who listens if nobody was named: the cell of a notebook, else no one."""
    return notebook.view().listen if notebook.in_notebook() else _silent


def _silent(event: str, data: Mapping[str, Any]) -> None:
    """A listener that shows nothing."""


def plan(
    recipe: Recipe | Mapping[str, Any] | PathLike,
    overrides: Sequence[str] = (),
    *,
    data: Mapping[str, Rows] | None = None,
    plugins: Sequence[PathLike] = (),
    listen: Listen | None = None,
) -> Plan:
    """Plans a recipe: a file, a mapping, or a Recipe; `data` gives rows by split in place of paths."""
    load_plugins(plugins)
    planned = _planned(*_recipe(recipe, overrides, data), listen or _watching())[0]
    if listen is None and notebook.in_notebook():
        notebook.show_plan(planned)
    return planned


def train(
    recipe: Recipe | Mapping[str, Any] | PathLike,
    overrides: Sequence[str] = (),
    *,
    data: Mapping[str, Rows] | None = None,
    out: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    listen: Listen | None = None,
) -> Result:
    """Plans and runs a recipe in a new folder: `out`, the recipe's `out`, or runs/<name>."""
    listen = listen or _watching()
    hashes = load_plugins(plugins)
    typed, origin = _recipe(recipe, overrides, data)
    folder = Path(out) if out else typed.out or free_folder(run_name(origin.file) if origin.file else "run")
    training.check_run_folder(folder)
    planned, assets = _planned(typed, origin, listen)
    run = RunDir(folder)
    with run.hold():
        training.check_run_folder(folder)
        training.begin(run, typed, planned, hashes)
        listen("planned", {"run": str(folder), "plan": planned})
        with tracked(run, typed, planned.hash, listen) as tracking:
            results = training.execute(run, typed, planned, assets, tracking.listen)
            tracking.finish("finished", results["records"])
        return _result(run, results)


def resume(path: PathLike, *, plugins: Sequence[PathLike] = (), listen: Listen | None = None) -> Result:
    """Goes on with a run from its last checkpoint, to the same bits as if it had never stopped."""
    path, listen = Path(path), listen or _watching()
    run = RunDir.open(path)
    with run.hold():
        hashes = load_plugins(plugins)
        recipe, _ = load_recipe(path / "recipe.yaml")
        stored = rundir.read_json(path / "plan.json")
        if (path / "evaluation.json").is_file() and run.model.is_dir():
            listen("phase", {"name": "finished already"})
            results = measuring.read_results(run)
            if unfinished(run):
                with tracked(run, recipe, stored["hash"], listen, again=True) as tracking:
                    tracking.finish("finished", results["records"])
            return _result(run, results)
        recipe = recipe.model_copy(
            update={"place": recipe.place.model_copy(update={"threads": stored["placement"]["threads"]})}
        )
        planned, assets = _planned(recipe, Origin(), listen)
        planned = replace(planned, placement=Placement(**stored["placement"]))
        training.check_same(run, planned, hashes)
        listen("planned", {"run": str(path), "plan": planned})
        with tracked(run, recipe, planned.hash, listen, again=True) as tracking:
            results = training.execute(run, recipe, planned, assets, tracking.listen)
            tracking.finish("finished", results["records"])
        return _result(run, results)


def load(path: PathLike, device: str = "auto") -> Loaded:
    """The model of a run (or an exported model folder), ready to predict."""
    path = Path(path)
    folder = path / "model" if (path / "model" / session.CARD).is_file() else path
    if not (folder / session.CARD).is_file():
        hint = "finish it with `tunesmith resume`" if (path / "manifest.json").is_file() else "give a run's folder"
        raise InputError(f"{path} holds no model of tunesmith", hint)
    return Loaded(*session.load(folder, str(choose_device(device))))


def predict(
    path: PathLike,
    rows: PathLike | Rows,
    *,
    device: str = "auto",
    max_new_tokens: int | None = None,
    plugins: Sequence[PathLike] = (),
) -> list[Prediction]:
    """Answers of a run's model to rows of a file or in memory; labels and answers in them are optional."""
    load_plugins(plugins)
    loaded = load(path, device)
    return loaded.predict(_input_rows(rows), max_new_tokens)


def chat(
    path: PathLike,
    *,
    system: str | None = None,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    **sampling: float,
) -> Chat:
    """A conversation with a run's model: `chat("runs/x", temperature=0.7).ask("Where is my parcel?").text`.

    `sampling` is temperature, top_p, top_k, max_new_tokens and seed; greedy if left out.
    """
    load_plugins(plugins)
    loaded = load(path, device)
    return Chat(loaded, system, default_sampling(loaded).changed(**sampling))


def evaluate(
    path: PathLike,
    data: PathLike | None = None,
    *,
    metrics: Sequence[str] | None = None,
    base: bool = True,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    listen: Listen | None = None,
) -> Result:
    """Measures a run's model on more rows and adds the records to its evaluation.json.

    Without `data`, shows what the run has measured.
    """
    path, listen = Path(path), listen or _watching()
    run = RunDir.open(path)
    load_plugins(plugins)
    results = measuring.read_results(run)
    if data is None:
        return _result(run, results)
    data = Path(data)
    recipe, _ = load_recipe(path / "recipe.yaml")
    planned = rundir.read_json(path / "plan.json")
    with run.hold():
        loaded = load(path, device)
        rows = list(_rows(data, recipe.data.format, recipe.data.columns, recipe.evaluate.tags))
        spec = SampleSpec(int(loaded.card["max_new_tokens"]))
        found = measuring.measure_rows(
            data.stem,
            rows,
            loaded.policy,
            loaded.objective,
            loaded.method,
            loaded.renderer,
            spec,
            base,
            planned["audit"]["train"]["labels"],
            listen,
        )
        measuring.merge(results, measuring.score(data.stem, rows, found, loaded.objective, recipe, metrics))
        measuring.write_predictions(run, data.stem, rows, found, recipe.evaluate.keep)
        measuring.write_results(run, results)
    return _result(run, results)


def load_plugins(paths: Sequence[PathLike]) -> dict[str, str]:
    """Runs the user's files, which register names that recipes use; their sha256 by name."""
    hashes: dict[str, str] = {}
    for path in map(Path, paths):
        spec = importlib.util.spec_from_file_location(f"tunesmith_plugin_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise InputError(f"--plugin {path} is not a Python file", "give the path of a .py file")
        hashes[path.name] = rundir.sha256_file(path)
        if _LOADED.get(path.resolve()) == hashes[path.name]:
            continue  # what it registers is there since an earlier call of this process
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:
            raise InputError(f"--plugin {path} fails: {type(error).__name__}: {error}", "mend the file") from error
        _LOADED[path.resolve()] = hashes[path.name]
    return hashes


def _planned(recipe: Recipe, origin: Origin, listen: Listen) -> tuple[Plan, Assets]:
    def progress(what: str, done: int, of: int | None) -> None:
        listen("progress", {"what": what, "done": done, "of": of})

    return make_plan(recipe, Path.cwd(), origin, progress=progress)


def _recipe(
    recipe: Recipe | Mapping[str, Any] | PathLike, overrides: Sequence[str], data: Mapping[str, Rows] | None
) -> tuple[Recipe, Origin]:
    """The recipe with absolute paths, and where its keys stand."""
    if isinstance(recipe, str | os.PathLike):
        recipe = Path(recipe)
        typed, origin = load_recipe(recipe, overrides)
        return resolve_paths(typed, recipe.resolve().parent), origin
    if overrides:
        raise InputError("overrides belong to a recipe file", "change the mapping itself")
    typed = parse_recipe(_with_data(recipe, data)) if isinstance(recipe, Mapping) else recipe
    if data is not None and isinstance(recipe, Recipe):
        typed = parse_recipe(_with_data(recipe.model_dump(mode="json"), data))
    return resolve_paths(typed, Path.cwd()), Origin()


def _with_data(recipe: Mapping[str, Any], data: Mapping[str, Rows] | None) -> dict[str, Any]:
    """The recipe with rows in memory written to the cache, so that a resume finds them."""
    given = dict(recipe)
    if data is None:
        return given
    keys: dict[str, Any] = dict(given.get("data") or {})
    tests: dict[str, str] = {}
    for split, rows in data.items():
        path = str(_stored(rows, split))
        if split in ("train", "validation"):
            keys[split] = path
        else:
            tests[split] = path
    if tests:
        keys["test"] = tests
    return {**given, "data": keys}


def _stored(rows: Rows, split: str) -> Path:
    import hashlib

    lines: list[str] = []
    for index, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{split} row {index}: {error}", "give rows of text, numbers, lists and mappings"
            ) from error
    content = "".join(lines).encode()
    path = cache_dir() / "given" / hashlib.sha256(content).hexdigest()[:16] / f"{split}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_file(path, content)
    return path


def free_folder(name: str) -> Path:
    """runs/<name>, or the first of -2, -3, ... that is free."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _input_rows(rows: PathLike | Rows) -> list[Row]:
    if isinstance(rows, str | os.PathLike):
        return list(_rows(Path(rows), None, {}))
    return list(formatted(_askable(read_memory(rows, "rows")), None, {})[1])


def _rows(path: Path, format: str | None, columns: Mapping[str, str], tags: Sequence[str] = ()) -> Iterator[Row]:
    return formatted(_askable(read(path.name, path.resolve().parent, "test")), format, columns, tags)[1]


def _askable(records: Iterator[tuple[Mapping[str, Any], str]]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A prompt without its completion is a conversation that waits for its answer."""
    for raw, where in records:
        if "prompt" in raw and "completion" not in raw and isinstance(raw["prompt"], str):
            yield {"messages": [{"role": "user", "content": raw["prompt"]}]}, where
        elif "instruction" in raw and "output" not in raw and isinstance(raw["instruction"], str):
            asked = "\n\n".join(str(raw[key]) for key in ("instruction", "input") if raw.get(key))
            yield {"messages": [{"role": "user", "content": asked}]}, where
        else:
            yield raw, where


def _result(run: RunDir, results: Mapping[str, Any]) -> Result:
    return Result(run.path, list(results["records"]), list(results["effects"]))
