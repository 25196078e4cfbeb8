"""The demo: customer messages, sorted. Its rows were written one by one for this project, from no template.

Each row of train, validation and test.jsonl has a message and four labels. The full demo learns to
answer with strict JSON of all four; the quick one learns the intent alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import Result
    from tunesmith.events import Listen

SPLITS = ("train", "validation", "test")
FIELDS = ("intent", "product", "urgency", "sentiment")
SYSTEM = "Sort the customer's message. Answer in JSON."


def recipe(quick: bool) -> dict[str, Any]:
    """The demo's recipe without its data."""
    if quick:
        return {
            "model": "all-minilm-l6-v2",
            "objective": "classify",
            "method": "head",
            "train": {"epochs": 40, "batch_size": 32},
        }
    return {
        "model": "smollm2-135m-instruct",
        "objective": "sft",
        "method": {"name": "lora", "rank": 16},
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "schedule": "cosine", "evaluate_every": 59},
        "evaluate": {"metrics": ["exact_match", "schema_valid", "field_accuracy", "loss", "perplexity"]},
    }


def rows(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The demo's rows by split: conversations, or text and label for the quick demo."""
    make = _labelled if quick else _conversation
    found: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        lines = (Path(__file__).parent / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found[split] = [make(json.loads(line)) for line in lines]
    return found


def run_demo(quick: bool, out: Path | None, listen: Listen) -> Result:
    """Trains and measures the demo in a new folder, runs/demo or the first free name after it."""
    from tunesmith import api, rundir

    folder = out or rundir.free_folder("demo-quick" if quick else "demo")
    return api.train(recipe(quick), data=rows(quick), out=folder, listen=listen)


def _conversation(row: Mapping[str, str]) -> dict[str, Any]:
    answer = json.dumps({field: row[field] for field in FIELDS})
    turns = (("system", SYSTEM), ("user", row["message"]), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _labelled(row: Mapping[str, str]) -> dict[str, Any]:
    return {"text": row["message"], "label": row["intent"]}
