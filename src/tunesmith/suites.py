"""The verb evaluate on standard tasks: a model and its base on the rows of another library's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith import api, measuring
from tunesmith.data.given import PathLike
from tunesmith.errors import InputError
from tunesmith.evaluation.harness import tasks as harness
from tunesmith.evaluation.harness.tasks import Answered
from tunesmith.evaluation.metrics import RowMetric
from tunesmith.evaluation.run import measure, records_to_json
from tunesmith.loaded import Loaded, load
from tunesmith.measurable import measurable, run_of
from tunesmith.measuring import BASE, TUNED
from tunesmith.plugins import load_plugins
from tunesmith.report import write
from tunesmith.types import Metric

SUITES = ("lm-eval",)  # that tasks are named by: lm-eval:TASK
EXAMPLE = "--suite lm-eval:arc_easy"


def evaluate_suite(
    path: PathLike,
    suite: str,
    *,
    tasks: PathLike | None = None,
    limit: int | None = None,
    shots: int | None = None,
    base: bool = True,
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    listen: api.Listeners | None = None,
    progress: bool | None = None,
) -> api.Result:
    """Measures a run's model, or one exported or combined, on a standard task: records for its evaluation.json.

    `suite`: "lm-eval:TASK", a task (or a group of tasks) of lm-evaluation-harness, whose data must be here.
    `tasks`: a folder of tasks beside the library's own; functions that their files name are run.
    `limit`: the first rows of each task, all if left out. `shots`: examples before each question, the task's own if
    left out. `base`: whether the base is measured beside it; differences are paired over the same rows.
    """
    load_plugins(plugins)
    name = _task(suite)
    of_what = measurable(path := run_of(Path(path)))
    harness.check_installed()
    folder = None if tasks is None else Path(tasks)
    found = harness.find(name, folder, shots)
    run, seed = of_what.run, of_what.recipe.seed
    results = measuring.read_results(run)
    with run.hold(), api.listening(listen, progress) as tell:
        loaded = load(path, device)
        _check_model(loaded)
        tell("phase", {"name": "evaluating", "what": f"{TUNED} on {suite}"})
        answered = {TUNED: _answered(loaded, found, limit, seed)}
        if base and loaded.method.facts.reference != "none":
            tell("phase", {"name": "evaluating", "what": f"{BASE} on {suite}"})
            again = harness.find(name, folder, shots)  # a task keeps what it was answered
            with loaded.method.reference(loaded.policy):
                answered = {BASE: _answered(loaded, again, limit, seed), **answered}
        for place in range(len(answered[TUNED])):
            own = {
                model: replace(of[place], task=of[place].task + _asked(limit, shots)) for model, of in answered.items()
            }
            measuring.merge(results, _scored(own, seed))
        measuring.write_results(run, results)
        if of_what.is_run:
            write.try_report(path)
    return api.result_of(run, {**results, "decoding": {}})  # tasks say themselves how answers are drawn


def _asked(limit: int | None, shots: int | None) -> str:
    """What is added to a task's name where it was not asked as it is: so that its own results stay beside those."""
    return ("" if shots is None else f"-{shots}shot") + ("" if limit is None else f"-first{limit}")


def _task(suite: str) -> str:
    """The task that a suite names; InputError where it names none, or one of a library that is not known."""
    library, _, name = suite.partition(":")
    if library not in SUITES:
        raise InputError(f"--suite {suite}: {library!r} is no suite", f"known: {', '.join(SUITES)}; as in {EXAMPLE}")
    if not name:
        raise InputError(f"--suite {suite} names no task", f"as in {EXAMPLE}")
    return name


def _check_model(loaded: Loaded) -> None:
    if loaded.card["head"] != "lm" or loaded.policy.kind != "decoder":
        raise InputError(
            f"standard tasks ask a decoder that writes text, and this model is of kind {loaded.policy.kind}, trained "
            f"for {loaded.card['objective']['name']}",
            "measure it on rows of its own: --data FILE",
        )


def _answered(loaded: Loaded, tasks: dict[str, Any], limit: int | None, seed: int) -> list[Answered]:
    context: int | None = loaded.card["context_length"]
    return harness.answered(tasks, loaded.policy, loaded.renderer, context, limit, seed)


def _scored(answered: dict[str, Answered], seed: int) -> dict[str, Any]:
    """Records of each model on one task, and the paired effects of tuning, as `measuring.score` has them."""
    tuned = answered[TUNED]
    summed = [metric for metric in tuned.metrics if not harness.is_whole(metric)]
    records: list[Metric] = []
    for model, own in answered.items():
        records += [
            replace(record, signature=own.signature)
            for record in measure(model, own.task, own.predictions, summed, seed)
        ]
        records += [
            Metric(
                model,
                own.task,
                metric.name,
                own.values[metric.name],
                math.nan,
                math.nan,
                len(own.predictions),
                reason="no interval: lm-eval makes it of all rows at once",
                signature=own.signature,
            )
            for metric in tuned.metrics
            if harness.is_whole(metric)
        ]
    effects: list[dict[str, Any]] = []
    if BASE in answered and summed:
        effects = measuring.paired_effects(
            tuned.task, answered[BASE].predictions, tuned.predictions, summed, seed, None
        )
    details: dict[str, Any] = {tuned.task: {}}
    facts = {metric.name: _facts(metric) for metric in tuned.metrics}
    told = [record | {"facts": facts[record["metric"]]} for record in records_to_json(records)]
    return {"records": told, "effects": effects, "details": details, "groups": []}


def _facts(metric: RowMetric) -> dict[str, Any]:
    """What a report must know of a metric that is none of ours."""
    finite = all(map(math.isfinite, metric.bounds))
    return {
        "higher_is_better": metric.higher_is_better,
        "kind": metric.kind,
        "bounds": list(metric.bounds) if finite else None,
    }
