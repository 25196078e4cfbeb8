"""Base and tuned model on the same held-out rows: records of evaluation.json, and the answers behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith import rundir
from tunesmith.evaluation.metrics import build
from tunesmith.evaluation.run import compare, majority, measure, records_to_json
from tunesmith.models.policy import Policy
from tunesmith.monitor import Listen
from tunesmith.planning import Assets, Plan
from tunesmith.protocols import Method, Objective
from tunesmith.rundir import RunDir
from tunesmith.types import Prediction, Row, SampleSpec

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.store import TokenStore
    from tunesmith.recipe import Recipe

BASE, TUNED, MAJORITY = "base", "tuned", "majority"
FILES = {"records": "evaluation.json", "effects": "comparison.json"}


def measure_run(
    run: RunDir, recipe: Recipe, plan: Plan, assets: Assets, policy: Policy, listen: Listen
) -> dict[str, Any]:
    """Measures every test set, or the validation rows where there is none, and writes what was found."""
    stores: dict[str, TokenStore] = dict(assets.prepared.tests)
    if not stores and assets.prepared.validation is not None:
        stores = {"validation": assets.prepared.validation}
    counts = plan.audit["train"]["labels"]
    spec = SampleSpec(plan.training.max_new_tokens)
    results: dict[str, Any] = {"records": [], "effects": []}
    for name, store in stores.items():
        rows = _rows(store, recipe.evaluate.limit, recipe.seed)
        found = measure_rows(
            name,
            rows,
            policy,
            assets.objective,
            assets.method,
            assets.renderer,
            spec,
            recipe.evaluate.base,
            counts,
            listen,
        )
        write_predictions(run, name, found, recipe.evaluate.keep)
        merge(results, score(name, found, plan.metrics, assets.objective, recipe.seed))
    write_results(run, results)
    return results


def measure_rows(
    name: str,
    rows: Sequence[Row],
    policy: Policy,
    objective: Objective,
    method: Method,
    renderer: Renderer,
    spec: SampleSpec,
    with_base: bool,
    label_counts: Mapping[str, int] | None,
    listen: Listen,
) -> dict[str, list[Prediction]]:
    """Answers of the tuned model and, if asked for, of what it is compared with, to the same rows."""
    listen("phase", {"name": "evaluating", "what": f"{TUNED} on {name}", "rows": len(rows)})
    found = {TUNED: objective.predict(policy, rows, renderer, spec)}
    if with_base and not objective.heads():
        listen("phase", {"name": "evaluating", "what": f"{BASE} on {name}", "rows": len(rows)})
        with method.reference(policy):
            found = {BASE: objective.predict(policy, rows, renderer, spec), **found}
    elif with_base and label_counts:
        found = {MAJORITY: majority(label_counts, rows), **found}
    return found


def score(
    name: str, found: Mapping[str, Sequence[Prediction]], metrics: Sequence[str], objective: Objective, seed: int
) -> dict[str, Any]:
    """Records with intervals for each model, and the paired effect of tuning on each metric.

    A limit that is infinite (one row of a loss) is null, as JSON has none.
    """
    built = build(metrics, found[TUNED], objective.describe().get("labels"))
    records = [r for model, predictions in found.items() for r in measure(model, name, predictions, built, seed)]
    effects: list[dict[str, Any]] = []
    before = next((found[model] for model in (BASE, MAJORITY) if model in found), None)
    if before is not None:
        for metric in built:
            effect = compare(before, found[TUNED], metric, seed)
            numbers = {key: number if math.isfinite(number) else None for key, number in asdict(effect).items()}
            effects.append({"data": name, "metric": metric.name, **numbers})
    return {"records": records_to_json(records), "effects": effects}


def merge(results: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Adds records of a data set to results, in place of earlier ones of the same set."""
    names = {entry["data"] for entry in new["records"]}
    for key in ("records", "effects"):
        results[key] = [entry for entry in results[key] if entry["data"] not in names] + list(new[key])


def read_results(run: RunDir) -> dict[str, Any]:
    """Records and effects as measured so far; none of either before the first."""
    found: dict[str, Any] = {"records": [], "effects": []}
    for key, name in FILES.items():
        if (run.path / name).is_file():
            found[key] = rundir.read_json(run.path / name)
    return found


def write_results(run: RunDir, results: Mapping[str, Any]) -> None:
    """The records, and the effects beside them. Records come last: with evaluation.json a run is finished."""
    for key in ("effects", "records"):
        rundir.write_json(run.path / FILES[key], results[key])


def write_predictions(run: RunDir, name: str, found: Mapping[str, Sequence[Prediction]], keep: int) -> None:
    """The first `keep` rows' answers, one line a row, each model's beside the reference."""
    if not keep:
        return
    lines: list[str] = []
    for row in range(min(keep, len(found[TUNED]))):
        tuned = found[TUNED][row]
        answers = {model: predictions[row].output for model, predictions in found.items()}
        lines.append(json.dumps({"where": tuned.where, "reference": tuned.reference, **answers}, ensure_ascii=False))
    (run.path / "predictions").mkdir(exist_ok=True)
    rundir.write_file(run.path / "predictions" / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())


def _rows(store: TokenStore, limit: int | None, seed: int) -> list[Row]:
    chosen = np.arange(len(store))
    if limit is not None and limit < len(store):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(store))[:limit])
    return [store.row(int(i)) for i in chosen]
