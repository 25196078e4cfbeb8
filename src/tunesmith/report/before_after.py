"""Records and paired effects of a run -> lines of before and after, each with what can be said of the difference."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import MAJORITY
from tunesmith.evaluation.baselines import BASELINES
from tunesmith.evaluation.metrics import WithoutFloor
from tunesmith.report.plots import Mark, Scale, scale_of

TUNED, UNCALIBRATED = "tuned", "uncalibrated"  # the latter is tuned before its probabilities were scaled
OF_A_CLASS = ("precision", "recall")
LEVEL = 0.05
# As they are written where they are spoken of; all other words of a metric's name stay as they are.
_SPELLED = {
    "f1": "F1",
    "roc": "ROC",
    "auc": "AUC",
    "ece": "ECE",
    "json": "JSON",
    "rouge": "ROUGE",
    "l": "L",
    "chrf": "chrF",
    "mae": "MAE",
    "rmse": "RMSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "mrr": "MRR",
    "ndcg": "nDCG",
    "mcc": "MCC",
    "bleu": "BLEU",
    "ter": "TER",
    "meteor": "METEOR",
    "brier": "Brier score",
}
_NEAR = 0.3  # numbers that differ by less than this share of the largest are drawn without 0, to be told apart
Standing = Literal["better", "worse", "no better", "cannot tell", ""]
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """What a reader must know of a metric. `higher` is None for a plugin's that is not loaded now."""

    name: str
    title: str
    says: str
    higher: bool | None
    kind: str
    bounds: tuple[float, float]

    @property
    def is_share(self) -> bool:
        """Whether it is a share of rows, which reads best as percent."""
        return self.kind == "rate"


@dataclass(frozen=True, slots=True)
class Line:
    """One metric on one data set or group: records of evaluation.json and the effect of comparison.json."""

    metric: MetricFacts
    before: Json | None
    after: Json
    effect: Json | None
    unsaid: Mapping[str, str] = field(default_factory=dict[str, str])  # what is not there beside others, and why

    @property
    def standing(self) -> Standing:
        """What the paired test says; "" where there was none.

        Better or worse need both the p-value and the interval to say so: they come from different arguments.
        """
        return self._standing("p")

    @property
    def corrected(self) -> Standing:
        """`standing` by the p-value that is adjusted for all metrics of the set (Holm), where there is one."""
        return self._standing("p_holm" if self.effect is not None and "p_holm" in self.effect else "p")

    @property
    def reasons(self) -> dict[str, str]:
        """Why a model's value, or the difference, is not there or has no interval."""
        found = {r["model"]: r.get("reason") for r in (self.before, self.after) if r}
        if self.effect is not None:
            found["difference"] = self.effect.get("reason")
        return {**{who: why for who, why in found.items() if why}, **self.unsaid}

    @property
    def at_one_end(self) -> bool:
        """Whether both models stand at the same end of the scale, as exact match often does for free text."""
        return (
            self.before is not None
            and self.before["value"] == self.after["value"]
            and self.after["value"] in self.metric.bounds
        )

    @property
    def is_untested(self) -> bool:
        """Whether both models were measured and no test of their difference was made."""
        return self.before is not None and self.effect is None

    @property
    def why_untested(self) -> str:
        """In a clause; "" where it is not known."""
        why = next(iter(self.reasons.values()), "")
        return self.unsaid.get("difference", why).removeprefix("not tested, as ").removeprefix("no interval: ")

    @property
    def notes(self) -> list[str]:
        """`reasons` in words, and how another library computed the metric."""
        signature = self.after.get("signature")
        return [
            *(f"{model_title(who)}: {why}" for who, why in self.reasons.items()),
            *([signature] if signature else []),
        ]

    def _standing(self, key: str) -> Standing:
        if self.effect is None or self.metric.higher is None:
            return ""
        if self.effect.get("reason"):
            return "cannot tell"
        p, low, high = (self.effect[name] for name in (key, "low", "high"))
        if p is None or p >= LEVEL or low is None or high is None or low <= 0 <= high:
            return "no better"
        return "better" if (self.effect["difference"] > 0) == self.metric.higher else "worse"

    @property
    def marks(self) -> list[Mark]:
        found = [(record, tone) for record, tone in ((self.before, "before"), (self.after, "after")) if record]
        return [Mark(model_title(r["model"]), r["value"], r["low"], r["high"], tone) for r, tone in found]

    @property
    def scale(self) -> Scale:
        """From 0 to 1 for what has these bounds, else what holds the numbers."""
        if self.metric.bounds == (0.0, 1.0):
            return Scale(0.0, 1.0)
        numbers = [n for mark in self.marks for n in (mark.value, mark.low, mark.high) if n is not None]
        near = max(numbers) - min(numbers) < _NEAR * max(abs(n) for n in numbers)
        return scale_of(numbers, include=() if near or min(numbers) < 0 else (0.0,))


@dataclass(frozen=True, slots=True)
class Table:
    """The lines of one data set, or of one group of its rows. `before` is the model that tuned is compared with."""

    data: str
    group: str
    before: str | None
    lines: tuple[Line, ...]

    @property
    def n(self) -> int:
        return int(self.lines[0].after["n"])

    def said(self, line: Line) -> Standing:
        """What a table says of a line: the verdict's was chosen beforehand, the others share the risk of chance."""
        return line.standing if line is headline(self.lines) else line.corrected


def tables(records: Sequence[Json], effects: Sequence[Json]) -> list[Table]:
    """In the order of the records, all rows of a set before its groups; classes of a classifier are not among them."""
    changes = {(effect["data"], effect["metric"]): effect for effect in effects}
    found: dict[tuple[str, str], dict[str, dict[str, Json]]] = {}
    for record in records:
        if record["metric"] not in OF_A_CLASS:
            place = found.setdefault((record["data"], record["group"]), {})
            place.setdefault(record["metric"], {})[record["model"]] = record
    made: list[Table] = []
    for (data, group), metrics in found.items():
        compared = next((str(other["model"]) for models in metrics.values() if (other := _other(models))), None)
        tested = group == "all" and any(of == data for of, _ in changes)
        lines = tuple(
            Line(
                facts_of(name, models[TUNED].get("facts")),
                _other(models),
                models[TUNED],
                changes.get((data, name)) if group == "all" else None,
                _unsaid(name, compared, _other(models), tested and (data, name) not in changes),
            )
            for name, models in metrics.items()
            if TUNED in models
        )
        if lines:
            made.append(Table(data, group, compared, lines))
    return made


def facts_of(name: str, told: Json | None = None) -> MetricFacts:
    """What is known of a metric by its name, or by what its record tells of it (`told`): another library's."""
    own, _, filtered = name.partition(",")
    title = " ".join(_SPELLED.get(word, word) for word in own.split("_")).replace("ROUGE ", "ROUGE-")
    if told is not None:
        title += f" ({filtered})" * (filtered not in ("", "none"))
        least, most = told["bounds"] or (float("-inf"), float("inf"))
        return MetricFacts(name, title, "", told["higher_is_better"], told["kind"], (least, most))
    try:
        metric = METRICS.get(name)([])
    except InputError:
        return MetricFacts(name, title, "", None, "general", (float("-inf"), float("inf")))
    says = (inspect.getdoc(type(metric)) or "").split("\n\n")[0].replace("\n", " ")
    return MetricFacts(name, title, says, metric.higher_is_better, metric.kind, metric.bounds)


def model_title(model: str) -> str:
    return BASELINES[model].title if model in BASELINES else model


def headline(lines: Iterable[Line]) -> Line | None:
    """The line that the verdict is about: the first in the recipe's order that can tell the models apart.

    One where both stand at the same end of the scale cannot; nor can one whose rows are too few to test it. One that
    is not tested at all is the last resort.
    """
    known = [line for line in lines if line.metric.higher is not None]
    telling = [line for line in known if not line.at_one_end and line.standing != "cannot tell"]
    tested = [line for line in telling if not line.is_untested]
    return next(iter([*tested, *telling, *known]), None)


def _unsaid(name: str, compared: str | None, before: Json | None, untested: bool) -> dict[str, str]:
    if compared is not None and before is None:
        return {compared: "not measured, as its answers do not hold what that takes"}
    if compared == MAJORITY and untested and name in METRICS and isinstance(METRICS.get(name)([]), WithoutFloor):
        return {"difference": f"not tested, as random guesses beat its counterpart ({model_title(compared)}) by {name}"}
    return {}


def _other(models: Mapping[str, Json]) -> Json | None:
    return next((record for model, record in models.items() if model not in (TUNED, UNCALIBRATED)), None)
