"""MODEL_CARD.md: what a run's model is, in the hub's format, from facts alone.

The card is part of the model's folder, whose bytes repeat: it names no time, and no folder of this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tunesmith.declared import ObjectiveNeeds
from tunesmith.methods import METHODS, adapter_hub
from tunesmith.models.catalog import Entry, entry_named, entry_of_hub_id
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.classify import THRESHOLD
from tunesmith.objectives.span import LONGEST_ANSWER
from tunesmith.report.before_after import TUNED, facts_of
from tunesmith.report.findings import file_name
from tunesmith.report.markdown import render
from tunesmith.report.summary import Summary, train_files
from tunesmith.report.verdict import limits

Library = Literal["transformers", "peft", "adapters", "tunesmith"]

# Licences by the words that the hub has for them; any other is "other" with its name and link.
HUB_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "LicenseRef-Llama-3.1": "llama3.1",
    "LicenseRef-Llama-3.2": "llama3.2",
    "LicenseRef-Gemma": "gemma",
}
TASKS = {
    ("lm", "text"): "text-generation",
    ("pooled", "text"): "text-classification",
    ("pooled", "token"): "token-classification",
    ("pooled", "pair"): "text-classification",
}
FINDS, RANKS = "sentence-similarity", "text-ranking"
FILLS = "fill-mask"
QUESTIONS = {"span": "question-answering", "choices": "multiple-choice"}  # by the kind of rows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOCAL = re.compile(r"[/\\]|\.\w{1,8}$")
WEAKEST = 3  # classes named among the limits


def model_card(summary: Summary, library: Library, merged: str | None = None) -> str:
    """The whole of MODEL_CARD.md. `library`: what loads the folder; see `library_of`.

    `merged`: the dtype of weights that the run's adapter was merged into.
    """
    plan = summary.plan
    objective, method = str(plan["meaning"]["objective"][0]), str(plan["meaning"]["method"][0])
    options, learned = plan["meaning"]["objective"][1], plan["meaning"]["objective"][2] or {}
    needs = OBJECTIVES.get(objective).needs
    head, asked = str(needs.head), next(iter(needs.formats & QUESTIONS.keys()), None)
    task = _task(needs, asked, str(plan["base"]["kind"]))
    entry = _entry(str(plan["base"]["name"]))
    data = ModelCardData(
        base_model=_hub_id(summary, entry),
        base_model_relation="finetune" if library == "transformers" else "adapter",
        library_name=library,
        pipeline_tag=task,
        tags=["tunesmith", objective, method],
        datasets=_hub_datasets(summary) or None,
        metrics=list(dict.fromkeys(line.metric.name for table in summary.tables for line in table.lines)) or None,
        model_name=summary.title,
        eval_results=_results(summary, task) or None,
        **_licence(summary),
    )
    body = render(
        "model_card.md",
        {
            "run": summary,
            "plan": plan,
            "train": plan["meaning"]["train"],
            "files": train_files(plan),
            "head": head,
            "masked": task == FILLS,
            "two_sided": plan["base"]["kind"] == "encoder-decoder",
            "library": library,
            "merged": merged,
            "plugged": adapter_hub.is_plugged(str(plan["base"]["model_type"])),
            "tokens": plan["meaning"]["method"][1].get("tokens"),
            "behind": _behind(method, plan["meaning"]["method"][1]),
            "score": options.get("score") or "sum",
            "chat": set(plan["audit"]["train"]["formats"]) != {"text"},
            "labels": learned.get("labels"),
            "finds": task == FINDS,
            "ranks": task == RANKS,
            "two": _compared(options) if needs.vectors == "pair" else None,
            "tags": learned.get("tags"),
            "asked": asked,
            "layer": "rank" if task == RANKS else asked or _layer(needs.vectors, learned),
            "longest": options.get("max_answer_tokens") or LONGEST_ANSWER,
            "unanswerable": learned.get("unanswerable"),
            "hidden": options.get("hidden"),
            "windows": _windows(options),
            "threshold": _threshold(options, learned),
            "base": _base(summary, entry),
            "converted": _is_converted(summary, entry),
            "weakest": _weakest(summary),
            "calibrated": _scaled(plan, head if merged else ""),
        },
    )
    return str(ModelCard(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body}", ignore_metadata_errors=False))


def _scaled(plan: Mapping[str, Any], merged_head: str) -> str | None:
    """How probabilities are scaled behind the weights, if they are; a merged model's head has its temperature in it."""
    scaling = plan["meaning"]["evaluate"].get("calibrate")
    return None if merged_head == "pooled" and scaling == "temperature" else scaling


def _threshold(options: Mapping[str, Any], learned: Mapping[str, Any]) -> float | None:
    """From which probability on a label is given, where a text may have several."""
    return (options.get("threshold") or THRESHOLD) if learned.get("multi_label") else None


def _task(needs: ObjectiveNeeds, asked: str | None, kind: str) -> str:
    """The hub's word for what the model does."""
    if asked:
        return QUESTIONS[asked]
    if needs.searches:
        return RANKS if needs.rereads else FINDS
    if needs.head == "lm" and kind == "encoder":
        return FILLS
    return TASKS[needs.head if needs.writes else "pooled", needs.vectors]


def _behind(method: str, options: Mapping[str, Any]) -> str:
    """What takes the hidden states of a method's virtual tokens off, as Python."""
    chosen = METHODS.get(method)
    facts = chosen(chosen.Options.model_validate(options), 0.0).facts
    return f", {facts.virtual_tokens}:" if facts.virtual_tokens and not facts.feeds_attention else ""


def _layer(vectors: str, learned: Mapping[str, Any]) -> str:
    """What the head is called."""
    if vectors == "pair":
        return "pair"
    return "tag" if "tags" in learned else "label" if "labels" in learned else "score"


def _windows(options: Mapping[str, Any]) -> str | int | None:
    """How far apart windows of long texts begin, "all" for as many tokens as fit; None where texts are cut."""
    return (options.get("stride") or "all") if options.get("long") == "windows" else None


def _compared(options: Mapping[str, Any]) -> str:
    """How two texts come to the head: together, as vectors, or as their cosine."""
    return "together" if options.get("encode") == "together" else str(options.get("compare") or "cosine")


def library_of(folder: Path, model_type: str) -> Library:
    """What loads a model's folder as it is, by its files; bottleneck adapters of some families load here alone."""
    if (folder / adapter_hub.WEIGHTS).is_file():
        return "adapters" if adapter_hub.serves(model_type) else "tunesmith"
    return "peft" if (folder / adapter_hub.CONFIG).is_file() else "transformers"


def _entry(name: str) -> Entry | None:
    return entry_named(name) or entry_of_hub_id(name)


def _hub_id(summary: Summary, entry: Entry | None) -> str | None:
    """The base's id on the hub, if it has one."""
    name = str(summary.plan["base"]["name"])
    if entry is not None:
        return entry.hub_id
    return name if _HUB_ID.fullmatch(name) else None


def _base(summary: Summary, entry: Entry | None) -> str:
    """How code that loads the base names it, as Python."""
    if entry is not None and _is_converted(summary, entry):
        return f"resolve({entry.name!r}).folder"
    return repr(_hub_id(summary, entry) or f"path/to/{file_name(str(summary.plan['base']['name']))}")


def _is_converted(summary: Summary, entry: Entry | None) -> bool:
    """Whether the base was converted from a package's copy, which no other library finds by a name."""
    return entry is not None and entry.package is not None and summary.plan["base"]["name"] == entry.name


def _licence(summary: Summary) -> dict[str, Any]:
    """That of the base, which what is made from it inherits; nothing where it is not known."""
    found = summary.plan["base"]["licence"]
    if not found:
        return {}
    if found in HUB_LICENCES:
        return {"license": HUB_LICENCES[found]}
    return {
        "license": "other",
        "license_name": str(found).lower(),
        "license_link": summary.licence.url if summary.licence else None,
    }


def _hub_datasets(summary: Summary) -> list[str]:
    """Training sets that are read from the hub: an owner and a name, and no path of a file."""
    names = [str(file["name"]) for file in summary.plan["audit"]["train"]["files"]]
    return list(dict.fromkeys(n for n in names if _HUB_ID.fullmatch(n) and not _LOCAL.search(n.partition("/")[2])))


def _results(summary: Summary, task: str) -> list[EvalResult]:
    """The tuned model's numbers over all rows of each set; the interval and n stand in the metric's name."""
    found: list[EvalResult] = []
    for record in summary.records:
        if record["model"] != TUNED or record["group"] != "all" or not math.isfinite(record["value"]):
            continue
        split = summary.splits.get(record["data"])
        facts = facts_of(record["metric"])
        span = "no interval" if record.get("reason") else f"95% interval {limits(facts, record)}"
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=file_name(split["files"][0]["name"]) if split and split["files"] else str(record["data"]),
                dataset_name=str(record["data"]),
                metric_type=str(record["metric"]),
                metric_name=f"{facts.title} ({span}, n = {record['n']:,})",
                metric_value=float(f"{record['value']:.6g}"),
            )
        )
    return found


def _weakest(summary: Summary) -> list[tuple[str, float, int]]:
    """Classes of the lowest recall on the first set: label, recall, rows."""
    if not summary.classes:
        return []
    lines = [line for line in summary.classes[0].lines if line.recall is not None]
    return [
        (line.label, line.recall.value, line.n) for line in lines[:WEAKEST] if line.recall and line.recall.value < 1
    ]
