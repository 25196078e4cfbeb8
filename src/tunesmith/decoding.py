"""Settings of temperature, top-p and top-k tried on validation rows, and which of them a model is to answer by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.store import some_rows
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.code_metrics import PassAtK
from tunesmith.evaluation.groups import sources
from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.metrics import RowMetric, build, lacking, statistics
from tunesmith.evaluation.paired import compare, holm
from tunesmith.measuring import BASE, TUNED, answered
from tunesmith.models.drawing import Drawn, Setting, settings
from tunesmith.types import Prediction

if TYPE_CHECKING:
    from tunesmith.events import Listen
    from tunesmith.models.policy import Policy
    from tunesmith.planning import Assets
    from tunesmith.recipe import Recipe

LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Tried:
    """A setting's value with its interval; how far it is from the best one, and that difference's p after Holm.

    `p` is None of the best one, and where the rows allow no test (`reason`).
    """

    setting: Setting
    value: float
    low: float
    high: float
    difference: float
    p: float | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self) | asdict(self.setting)
        del plain["setting"]
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def judged(
    answers: Mapping[Setting, Sequence[Prediction]], name: str, seed: int, clusters_N: IntArray | None = None
) -> tuple[Setting, list[Tried]]:
    """The setting to take, and what was found of each, by the metric called `name` of their answers to the same rows.

    It is the simplest one that the rows do not show to be worse than the best: its paired difference from that is not
    significant after Holm's correction for all that were tried, or there can be no test. So chance alone, which makes
    the best of many look better than it is, seldom moves a model away from greedy answers.
    """
    (metric,) = build([name], next(iter(answers.values())))
    tables = {setting: statistics(metric, own) for setting, own in answers.items()}
    values = {setting: float(metric.aggregate(table.sum(axis=0))) for setting, table in tables.items()}
    best = min(values, key=lambda one: (-_better(metric, values[one]), one.plainness))
    others = {setting: own for setting, own in answers.items() if setting != best}
    effects = {one: compare(own, answers[best], metric, seed, clusters_N=clusters_N) for one, own in others.items()}
    tested = [one for one, effect in effects.items() if effect.tested]
    adjusted = dict(zip(tested, holm([effects[one].p for one in tested]), strict=True))
    tried = [
        Tried(
            setting,
            *interval(metric, tables[setting], seed, clusters_N=clusters_N),
            values[setting] - values[best],
            adjusted.get(setting),
            lacking(metric, tables[setting], clusters_N=clusters_N)
            or (effects[setting].reason if setting in effects else None),
        )
        for setting in sorted(answers, key=lambda one: one.plainness)
    ]
    chosen = next(one.setting for one in tried if one.setting == best or one.p is None or one.p > LEVEL)
    return chosen, tried


def _better(metric: RowMetric, value: float) -> float:
    if not math.isfinite(value):
        return -math.inf
    return value if metric.higher_is_better else -value


def sweep(
    recipe: Recipe, assets: Assets, policy: Policy, max_new_tokens: int, listen: Listen
) -> tuple[Drawn | None, dict[str, Any]]:
    """What the trained model, and the base if it is measured, draw answers by, and decoding.json; None, {} unasked.

    Every setting answers the same validation rows with the recipe's seed. The base has a choice of its own, so that
    the two are compared as each does best.
    """
    asked, store = recipe.evaluate.decoding, assets.prepared.validation
    if asked is None or store is None:
        return None, {}
    rows = some_rows(store, asked.limit, recipe.seed)
    cluster = recipe.evaluate.cluster
    clusters_N = None if cluster is None else sources([row.tags[cluster] for row in rows])
    code = recipe.evaluate.code if isinstance(METRICS.get(asked.metric)([]), PassAtK) else None
    code = code and code.model_copy(update={"samples": 1})
    found: dict[str, Setting] = {}
    told: dict[str, Any] = {}
    for model in (TUNED, *([BASE] if recipe.evaluate.base else [])):
        answers: dict[Setting, list[Prediction]] = {}
        with assets.method.reference(policy) if model == BASE else nullcontext():
            for setting in settings(asked):
                listen("phase", {"name": "evaluating", "what": f"{model}, {setting}", "rows": len(rows)})
                spec = setting.spec(max_new_tokens, recipe.seed)
                answers[setting] = answered(policy, rows, assets.objective, assets.renderer, spec, code, [asked.metric])
        found[model], tried = judged(answers, asked.metric, recipe.seed, clusters_N)
        told[model] = {"chosen": asdict(found[model]), "tried": [one.to_json() for one in tried]}
    drawn = Drawn(found[TUNED], found.get(BASE, Setting()), recipe.seed)
    return drawn, {"metric": asked.metric, "n": len(rows), "seed": recipe.seed, "models": told}
