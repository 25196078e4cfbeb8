"""A run's folder -> everything its report says, typed and without a look at the clock or the machine.

Nothing here draws: the page, the Markdown and the model card are made from one `Summary`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import rundir
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.power import detectable_rate
from tunesmith.methods import METHODS
from tunesmith.models.catalog import Licence, catalog
from tunesmith.objectives import OBJECTIVES
from tunesmith.report.answers import BUDGET, Answers, gather
from tunesmith.report.before_after import Table, tables
from tunesmith.report.classes import Classes, classes_of
from tunesmith.report.curves import Training, last_by_step, read_training
from tunesmith.report.figures import large, percent, plain
from tunesmith.report.findings import Finding, file_name, findings, splits
from tunesmith.report.verdict import Verdict, verdicts

Json = Mapping[str, Any]
PLANNED = ("meaning", "base", "audit", "parameters", "prediction", "placement", "hash")
MEASURED = {
    "records": "evaluation.json",
    "effects": "comparison.json",
    "details": "details.json",
    "groups": "groups.json",
    "decoding": "decoding.json",
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What the plan predicted of training, and what the steps took; the measured ones are 0 before the first."""

    predicted_seconds: float
    seconds: float
    predicted_memory: int
    memory: int
    tokens: int
    tokens_per_second: float
    examples_per_second: float
    repeated: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a report says of one run; `plan` and `manifest` are those of its folder, `licence` what the base's allows.

    `objective` and `method` are what the recipe names and what that means.
    """

    name: str
    title: str
    objective: tuple[str, str]
    method: tuple[str, str]
    asked: str
    finished: bool
    recipe: str
    plan: Json
    manifest: Json
    records: list[Json]
    effects: list[Json]
    groups: list[Json]
    decoding: Json | None
    tables: list[Table]
    classes: list[Classes]
    answers: dict[str, Answers]
    verdicts: list[Verdict]
    training: Training
    cost: Cost
    findings: list[Finding]
    licence: Licence | None
    crossval: Json | None

    @property
    def commands(self) -> str:
        """How to make the run again and go on with it, as lines of a shell in the folder that holds the run's."""
        run = shlex.quote(self.name)
        tests = next(iter(self.plan["audit"]["tests"]), "test")
        lines = [
            (f"tunesmith plan {run}/recipe.yaml", f"must say plan {self.plan['hash'][:12]}…"),
            (f"tunesmith train {run}/recipe.yaml", "the run again"),
            (f"tunesmith evaluate {run} --data more.jsonl", f"on rows beside {tests}"),
            (f"tunesmith predict {run} --input new.jsonl", "answers to rows without a reference"),
        ]
        width = max(len(command) for command, _ in lines)
        return "\n".join(f"{command:{width}}  # {what}" for command, what in lines)

    @property
    def splits(self) -> dict[str, Json]:
        return splits(self.plan["audit"])


def summarise(run: Path) -> Summary:
    """The summary of a run, finished or not. InputError if `run` is no run, or a file of it is damaged."""
    rundir.RunDir.open(run)
    plan = rundir.read_record(run / "plan.json", *PLANNED)
    manifest = rundir.read_record(run / "manifest.json", "libraries", "machine", "seed")
    found = {k: rundir.read_json(run / name) if (run / name).is_file() else None for k, name in MEASURED.items()}
    own = {data: place for place, data in enumerate(plan["audit"]["tests"])}  # the recipe's sets come first
    records = sorted(found["records"] or [], key=lambda record: own.get(record["data"], len(own)))
    effects = found["effects"] or []
    finished = found["records"] is not None and (run / "model").is_dir()
    measured = tables(records, effects) if finished else []
    answers = _answers(run, measured)
    training = read_training(run, plan["meaning"]["train"], _higher(plan))
    crossval = _crossval(run)
    steps = (training.steps, int(plan["meaning"]["train"]["total_steps"]))
    return Summary(
        name=run.resolve().name,
        title=_title(plan),
        objective=(str(plan["meaning"]["objective"][0]), _meaning(OBJECTIVES, plan["meaning"]["objective"][0])),
        method=(method_text(plan), _meaning(METHODS, plan["meaning"]["method"][0])),
        asked=_asked(plan),
        finished=finished,
        recipe=rundir.read_text(run / "recipe.yaml"),
        plan=plan,
        manifest=manifest,
        records=records,
        effects=effects,
        groups=found["groups"] or [],
        decoding=found["decoding"],
        tables=measured,
        classes=classes_of(records, found["details"] or {}, plan["audit"]["train"]["labels"]) if finished else [],
        answers=answers,
        verdicts=verdicts(measured, finished, steps, _detectable(answers), crossval is not None),
        training=training,
        cost=_cost(run, plan),
        findings=findings(plan["audit"]),
        licence=catalog().licences.get(plan["base"]["licence"] or ""),
        crossval=crossval,
    )


def _answers(run: Path, measured: list[Table]) -> dict[str, Answers]:
    """The kept answers of every set that was measured, which share the room of a page."""
    whole = [table for table in measured if table.group == "all"]
    found: dict[str, Answers] = {}
    for table in whole:
        names = [line.metric.name for line in table.lines]
        path = run / "predictions" / f"{table.data}.jsonl"
        answers = gather(path, table.data, names, table.n, BUDGET // len(whole))
        if answers is not None:
            found[table.data] = answers
    return found


def _crossval(run: Path) -> Json | None:
    """What cross-validation found in its folds; None of a run that is not the last of one."""
    path = run / rundir.CROSSVAL
    return rundir.read_record(path, "folds", "by", "metrics") if path.is_file() else None


def _detectable(answers: Mapping[str, Answers]) -> dict[tuple[str, str], float]:
    """By data set and metric, the smallest difference of rates that its rows could have shown."""
    found: dict[tuple[str, str], float] = {}
    for data, own in answers.items():
        if own.judge is not None and own.changing is not None and METRICS.get(own.judge)([]).kind == "rate":
            least = detectable_rate(own.changing, own.measured)
            if least is not None:
                found[data, own.judge] = least
    return found


def _higher(plan: Json) -> bool:
    """Whether more is better of the number that chose the checkpoint."""
    name = (plan["meaning"]["train"]["early_stopping"] or {}).get("metric") or "loss"
    try:
        return name != "loss" and METRICS.get(name)([]).higher_is_better
    except InputError:  # a plugin's, not loaded now
        return True


def _cost(run: Path, plan: Json) -> Cost:
    lines, repeated = last_by_step(run / "timings.jsonl")
    seconds = sum(line["seconds"] for line in lines)
    examples = sum(line["seconds"] * line["examples_per_second"] for line in lines)
    tokens = sum(line["seconds"] * line["tokens_per_second"] for line in lines)
    return Cost(
        predicted_seconds=plan["prediction"]["seconds"],
        seconds=seconds,
        predicted_memory=plan["prediction"]["peak_memory_bytes"],
        memory=max((line["peak_memory_bytes"] for line in lines), default=0),
        tokens=round(tokens),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        examples_per_second=examples / seconds if seconds else 0.0,
        repeated=repeated,
    )


def train_files(plan: Json) -> str:
    names = list(dict.fromkeys(file_name(file["name"]) for file in plan["audit"]["train"]["files"]))
    return " + ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def method_text(plan: Json) -> str:
    """The method with its rank, if it has one, and what else is not as it is by default: lora (rank 16, plus 16)."""
    name, options = plan["meaning"]["method"]
    try:
        usual: Json = METHODS.get(name).Options().model_dump(mode="json")
    except (InputError, ValueError):  # a plugin's that is not loaded now, or one that must be told something
        usual = {}
    told = {key: value for key, value in options.items() if key == "rank" or value != usual.get(key)}
    texts = [f"{key} {plain(value)}" for key, value in told.items()]
    return f"{name} ({', '.join(texts)})" if texts else str(name)


def _title(plan: Json) -> str:
    return f"{file_name(plan['base']['name'])}, tuned on {train_files(plan)}"


def _asked(plan: Json) -> str:
    """Objective, method, data and length in a sentence, and how much of the model trains."""
    training, rows = plan["meaning"]["train"], plan["audit"]["train"]["examples"]
    trainable, total = plan["parameters"]["trainable"], plan["parameters"]["total"]
    step = f"{training['batch_size']} rows" if training["batch_size"] else f"{training['batch_tokens']:,} tokens"
    epochs = training["epochs"]
    length = f"for {epochs:g} epoch{'s' * (epochs != 1)} of {rows:,} rows" if epochs else f"on {rows:,} rows"
    earlier = plan["meaning"]["earlier run"]
    return (
        f"Asked for: {plan['meaning']['objective'][0]} by {method_text(plan)}, {length}, "
        f"{training['total_steps']:,} steps of {step}"
        + (f", going on from the run {file_name(earlier)}" if earlier else "")
        + f". {large(trainable)} of {large(total)} parameters train ({percent(trainable / total)})."
    )


def _meaning(registry: Any, name: str) -> str:
    """What the class behind a name says of itself, where it is loaded."""
    try:
        found = registry.get(name)
    except InputError:
        return ""
    return str((getattr(found, "needs", None) or found.facts).summary)
