"""The verbs: plan, train, resume, evaluate, predict, chat, export, report: what the command line does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tunesmith import exporting, measuring, probing, rundir, training
from tunesmith.chatting import Chat, default_sampling
from tunesmith.data.given import PathLike, Rows, check_kinds, check_name, paths, questions, to_answer
from tunesmith.errors import InputError, RefusedError, StoppedError
from tunesmith.evaluation.baselines import tried
from tunesmith.evaluation.calibrated import of_card
from tunesmith.evaluation.preflight import check_metrics
from tunesmith.events import Listen, StopRun, Together
from tunesmith.exporting import Exported
from tunesmith.loaded import Passages, load
from tunesmith.measurable import check_measured, is_model, measurable, run_of
from tunesmith.models.cache import cache_dir
from tunesmith.models.drawing import of_card as drawn_of
from tunesmith.models.saved import folder_of
from tunesmith.planning import Assets, Plan
from tunesmith.plugins import load_plugins
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import Origin, leaves, load_recipe, parse_recipe, resolve_paths, run_name
from tunesmith.report import notebook, write
from tunesmith.report.live import View
from tunesmith.result import Result, result_of
from tunesmith.rundir import RunDir
from tunesmith.settings import Placement
from tunesmith.tracking import tracked, unfinished
from tunesmith.types import Prediction

Listeners = Listen | Sequence[Listen]


def plan(
    recipe: Recipe | Mapping[str, Any] | PathLike,
    overrides: Sequence[str] = (),
    *,
    data: Mapping[str, Rows] | None = None,
    plugins: Sequence[PathLike] = (),
    listen: Listeners | None = None,
    progress: bool | None = None,
) -> Plan:
    """What a recipe would do, without doing it. A notebook draws it.

    The arguments are those of `train`. Raises InputError with every conflict, RefusedError for data that would
    spoil the run, ResourceError where it cannot fit.
    """
    load_plugins(plugins)
    with listening(listen, progress) as tell:
        planned = _planned(*read_recipe(recipe, overrides, data), tell)[0]
    if listen is None and progress is None and notebook.in_notebook():
        notebook.show_plan(planned)
    return planned


def train(
    recipe: Recipe | Mapping[str, Any] | PathLike,
    overrides: Sequence[str] = (),
    *,
    data: Mapping[str, Rows] | None = None,
    out: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    listen: Listeners | None = None,
    progress: bool | None = None,
) -> Result:
    """Plans a recipe, trains it in a new folder and measures the result against its base.

    `recipe`: a file, a mapping of the same keys, or a Recipe. Relative paths start at the file's folder, else at
    the working directory.
    `overrides`: keys set over those of a file, such as `["train.epochs=1"]`.
    `data`: rows by split in place of the recipe's paths: "train", "validation", "corpus" for passages that are
    searched, and any other name is a test set.
    Rows are a list of mappings, or a table of pandas, polars, pyarrow or datasets.
    `out`: the run's folder; left out, the recipe's `out`, else the first free one of runs/<name>, runs/<name>-2, ...
    `plugins`: Python files that register metrics, methods or objectives.
    `listen`: one listener or several that hear the run's events (`tunesmith.events`).
    `progress`: whether the run is drawn, in a notebook's cell or on stderr; left out, in a notebook only.

    Raises InputError, RefusedError and ResourceError as `plan` does and as docs/errors.md lists them, and
    StoppedError once a signal or a listener has stopped the run, which `resume` then goes on with.
    """
    hashes = load_plugins(plugins)
    typed, origin = read_recipe(recipe, overrides, data)
    folder = Path(out) if out else typed.out or rundir.free_folder(run_name(origin.file) if origin.file else "run")
    training.check_run_folder(folder)
    with listening(listen, progress, folder) as tell:
        planned, assets = _planned(typed, origin, tell)
        run = RunDir(folder)
        with run.hold():
            training.check_run_folder(folder)
            tell("planned", {"run": str(folder), "plan": planned})
            policy = training.load_policy(planned, assets, tell)
            training.begin(run, typed, planned, assets, hashes)
            with tracked(run, typed, planned.hash, tell) as tracking:
                results = training.execute(run, typed, planned, assets, policy, tracking.listen)
                write.try_report(folder)
                tracking.finish("finished", results["records"])
            return result_of(run, results)


def resume(
    path: PathLike,
    *,
    plugins: Sequence[PathLike] = (),
    listen: Listeners | None = None,
    progress: bool | None = None,
) -> Result:
    """Goes on with a run from its last checkpoint, to the same bits as if it had never stopped.

    A finished run is returned as it is. Raises RefusedError naming what changed since the run began, or for a part of
    a cross-validation that is not done, and what `train` raises; its arguments mean the same here.
    """
    path = Path(path)
    _check_no_part(RunDir.open(path))
    return go_on(path, plugins=plugins, listen=listen, progress=progress)


def _check_no_part(run: RunDir) -> None:
    """Folds are gone on with together: a part by itself would leave them out."""
    fold = load_recipe(run.path / "recipe.yaml")[0].data.fold
    if fold is None:
        return
    root = run.path if fold.number == 0 else run.path.resolve().parent.parent
    if (root / "manifest.json").is_file() and not (root / rundir.CROSSVAL).is_file():
        by = f" --by {fold.by}" if fold.by else ""
        raise RefusedError(
            f"{run.path} is a part of a cross-validation that is not done",
            f"go on with all of it, by its recipe: `tunesmith crossval RECIPE --folds {fold.of}{by} --out {root}`",
        )


def go_on(
    path: Path,
    *,
    plugins: Sequence[PathLike] = (),
    listen: Listeners | None = None,
    progress: bool | None = None,
) -> Result:
    """As `resume`, of any run: a cross-validation goes on with its parts one by one."""
    run = RunDir.open(path)
    with run.hold(), listening(listen, progress, path) as tell:
        hashes = load_plugins(plugins)
        recipe, _ = load_recipe(path / "recipe.yaml")
        stored = rundir.read_record(path / "plan.json", "hash", "placement")
        if (path / "evaluation.json").is_file() and run.model.is_dir():
            tell("phase", {"name": "finished already"})
            if not write.is_current(path):
                write.try_report(path)
            results = measuring.read_results(run)
            if unfinished(run):
                with tracked(run, recipe, stored["hash"], tell, again=True) as tracking:
                    tracking.finish("finished", results["records"])
            return result_of(run, results)
        recipe = recipe.model_copy(
            update={"place": recipe.place.model_copy(update={"threads": stored["placement"]["threads"]})}
        )
        planned, assets = _planned(recipe, Origin(), tell)
        planned = replace(planned, placement=Placement(**stored["placement"]))
        training.check_same(run, planned, hashes)
        tell("planned", {"run": str(path), "plan": planned})
        policy = training.load_policy(planned, assets, tell)
        with tracked(run, recipe, planned.hash, tell, again=True) as tracking:
            results = training.execute(run, recipe, planned, assets, policy, tracking.listen)
            write.try_report(path)
            tracking.finish("finished", results["records"])
        return result_of(run, results)


def predict(
    path: PathLike,
    rows: PathLike | Rows,
    *,
    device: str = "auto",
    max_new_tokens: int | None = None,
    corpus: Passages | None = None,
    plugins: Sequence[PathLike] = (),
) -> list[Prediction]:
    """Answers of a run's model to rows of a file or in memory; labels and answers in them are optional.

    `corpus`: passages to be searched in place of the run's, as `load` takes them. To ask again, `load` the model once.
    """
    load_plugins(plugins)
    return load(path, device, corpus).predict(rows, max_new_tokens)


def chat(
    path: PathLike,
    *,
    system: str | None = None,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    **sampling: float,
) -> Chat:
    """A conversation with a run's model: `chat("runs/x", temperature=0.7).ask("Where is my parcel?").text`.

    `sampling` is temperature, top_p, top_k, max_new_tokens and seed; if left out as the run chose, or greedy.
    """
    load_plugins(plugins)
    loaded = load(path, device)
    return Chat(loaded, system, default_sampling(loaded).changed(**sampling))


def export(
    path: PathLike,
    to: PathLike,
    *,
    merge: bool = False,
    dtype: str | None = None,
    data: PathLike | Rows | None = None,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
) -> Exported:
    """Writes a run's model, or one exported or combined, to a new folder, or to a new file where `to` ends in .gguf.

    `merge` makes adapter and base one model, checked on the rows of `data`, the run's own if left out; a GGUF file
    always is one model. `dtype` (fp32, bf16, fp16; q8_0 in GGUF) is of a merged model's or GGUF file's weights.
    """
    path, to = Path(path), Path(to)
    folder = folder_of(path)
    load_plugins(plugins)
    gguf = to.suffix.lower() == ".gguf"
    if gguf and to.is_dir():
        raise InputError(f"{to} is a folder, and a GGUF file is a file", "give another path")
    rundir.check_free(to)
    if dtype is not None and not (merge or gguf):
        raise InputError("dtype is of a merged model, and merge is not asked for", "add --merge, or leave --dtype out")
    if dtype is not None and dtype not in (known := exporting.dtypes(gguf)):
        raise InputError(f"no {'GGUF file' if gguf else 'folder'} has weights of {dtype}", f"one of {', '.join(known)}")
    if data is None and (merge or gguf) and not (path / "recipe.yaml").is_file():
        raise InputError(f"{path} is no run: it has no rows to check a merged model on", "give them with --data FILE")
    loaded = load(path, device)
    if not merge and not gguf:
        return exporting.copy(folder, to)
    if data is None:
        recipe, _ = load_recipe(path / "recipe.yaml")
        rows = exporting.rows_to_check(_planned(recipe, Origin(), Together([]))[1].prepared)
    else:
        rows = to_answer(data, loaded.card.get("columns", {}), loaded.card.get("format"))[: exporting.CHECKED_ROWS]
        check_kinds(rows, loaded.objective.needs, asking=False)
    parts = (loaded.policy, loaded.objective, loaded.method, loaded.renderer, loaded.card)
    if gguf:
        return exporting.to_gguf(parts, rows, to, dtype or "fp32")
    return exporting.merge(parts, rows, to, dtype or "fp32", write.merged_cards(path, dtype or "fp32"))


def evaluate(
    path: PathLike,
    data: PathLike | Rows | None = None,
    *,
    name: str | None = None,
    metrics: Sequence[str] | None = None,
    by: Sequence[str] | None = None,
    keep: int | Literal["all"] | None = None,
    base: bool = True,
    corpus: Passages | None = None,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    listen: Listeners | None = None,
    progress: bool | None = None,
) -> Result:
    """Measures a run's model, or one exported or combined, on more rows: records for its evaluation.json, under `name`.

    `name`: of these rows in the results; left out, the file's own without its ending, or "rows" for rows in memory.
    `metrics`, `by` (columns whose values are groups), `keep` (answers, or "all"): in place of the recipe's.
    `base`: whether the base (or what the objective is compared with) is measured beside it.
    `corpus`: passages to be searched, as `load` takes them. Without `data`, returns what the run has measured.
    """
    load_plugins(plugins)
    of_what = measurable(path := run_of(Path(path)), by)
    run, recipe, counts = of_what.run, of_what.recipe, of_what.label_counts
    results = measuring.read_results(run)
    if data is None:
        check_measured(path)
        return result_of(run, results)
    if name is not None:
        check_name(name)
    of = name or (Path(data).stem if isinstance(data, str | os.PathLike) else "rows")
    with run.hold(), listening(listen, progress) as tell:
        loaded = load(path, device, corpus)
        rows = questions(data, recipe.data.format, recipe.data.columns, recipe.evaluate.tags)
        check_kinds(rows, loaded.objective.needs, asking=False)
        asked, usual = metrics or recipe.evaluate.metrics or [], loaded.objective.needs.metrics
        without = tried(loaded.objective, rows, counts)
        check_metrics(asked, usual, of, rows, without, recipe.evaluate.code, loaded.gives_sets)
        measuring.check_same_set(run, of, rows)
        found = measuring.measure_rows(
            of,
            rows,
            *(loaded.policy, loaded.objective, loaded.method, loaded.renderer),
            drawn_of(loaded.card).specs(int(loaded.card["max_new_tokens"])),
            base,
            counts,
            tell,
            recipe.evaluate.code,
            asked,
            of_card(loaded.card),
        )
        known = measuring.count_seen(run, rows) | measuring.count_cut(loaded.objective, loaded.renderer, rows)
        measuring.merge(results, measuring.score(of, rows, found, loaded.objective, recipe, metrics, known))
        kept = recipe.evaluate.keep if keep is None else None if keep == "all" else keep
        measuring.write_predictions(run, of, rows, found, kept, recipe.evaluate.groups)
        measuring.write_results(run, results)
        if of_what.is_run:
            write.try_report(path)
    return result_of(run, results)


def report(
    path: PathLike,
    *,
    format: Literal["html", "md"] = "html",
    out: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
) -> Path | str:
    """Makes the report of a run, finished or not: its path, or the text of a Markdown one that has no `out`.

    Without `out`, a page replaces the run's report.html and renews the card in model/.
    """
    path = run_of(Path(path))
    if is_model(path):
        raise InputError(
            f"{path} is a model without its run, so there is no training to report",
            f"see what was measured with `tunesmith evaluate {path}`, or report the run that it is of",
        )
    run = RunDir.open(path)
    load_plugins(plugins)
    if format == "html" and out is None:
        with run.hold():
            write.write_report(path)
        return path / write.REPORT
    text = write.FORMATS[format](write.summarise(path))
    if out is None:
        return text
    rundir.write_file(Path(out), text.encode())
    return Path(out)


@contextmanager
def listening(listen: Listeners | None, progress: bool | None, run: Path | None = None) -> Generator[Listen]:
    """Everyone who hears the events, as one; a listener that asks for a stop outside of a step is obeyed at once."""
    given = [] if listen is None else [listen] if callable(listen) else list(listen)
    drawn = notebook.in_notebook() if progress is None else progress
    view = None if not drawn else notebook.view() if notebook.in_notebook() else View(sys.stderr, with_plan=False)
    try:
        with view or nullcontext():
            yield Together([*([view.listen] if view else []), *given])
    except StopRun as asked:
        resumable = run is not None and (run / "manifest.json").is_file()
        remedy = f"go on with `tunesmith resume {run}`" if resumable else "begin again; nothing was left half done"
        raise StoppedError("stopped as a listener asked, outside of a step", remedy) from asked


def _planned(recipe: Recipe, origin: Origin, listen: Listen) -> tuple[Plan, Assets]:
    def progress(what: str, done: int, of: int | None) -> None:
        listen("progress", {"what": what, "done": done, "of": of})

    return probing.planned(recipe, Path.cwd(), origin, progress)


def read_recipe(
    recipe: Recipe | Mapping[str, Any] | PathLike, overrides: Sequence[str], data: Mapping[str, Rows] | None
) -> tuple[Recipe, Origin]:
    """The recipe with absolute paths, and which of its keys were given, where."""
    held = {} if data is None else paths(data, cache_dir())
    if isinstance(recipe, str | os.PathLike):
        recipe = Path(recipe)
        set_here = [f"data.{key}={json.dumps(value)}" for key, value in held.items()]
        typed, origin = load_recipe(recipe, [*overrides, *set_here])
        return resolve_paths(typed, recipe.resolve().parent), origin
    if overrides:
        raise InputError("overrides belong to a recipe file", "change the mapping itself")
    typed = recipe if isinstance(recipe, Recipe) else None
    if typed is None or held:
        keys = dict(recipe) if isinstance(recipe, Mapping) else recipe.model_dump(mode="json", exclude_unset=True)
        own: Any = keys.get("data") or {}
        typed = parse_recipe({**keys, "data": {**own, **held}} if held else keys)
    origin = Origin(given=frozenset(leaves(typed.model_dump(mode="json", exclude_unset=True))))
    return resolve_paths(typed, Path.cwd()), origin
