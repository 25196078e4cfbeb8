"""What classifiers gain where labels are rare, and what their probabilities are worth before and after calibration.

    python benchmarks/classifiers.py [--only rare calibrated] [--runs DIR]

`rare`: BANKING77 with one row in 50 of every other label (at least one), the test set as it is; plain training against
class weights, balanced sampling and focal loss, on the same test rows. `calibrated`: CLINC150 without its rows of no
intent, trained so that its probabilities say too little and as they come, and scaled in each way. A run takes a minute
on one core. Results go to benchmarks/results/classifiers.json, of which `make docs` makes the tables of
docs/classifiers.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha1
from pathlib import Path
from typing import Any

import torch
import transformers
from spine import data_sets, rows_of

from tunesmith import api
from tunesmith.engine.precision import device_name
from tunesmith.evaluation import answers
from tunesmith.evaluation.metrics import build
from tunesmith.evaluation.paired import compare
from tunesmith.evaluation.run import measure
from tunesmith.types import Prediction

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results" / "classifiers.json"
SEED = 17
SHARE = 50  # of a rare label's rows one is left
BASE: Mapping[str, Any] = {"model": "all-minilm-l6-v2", "method": "head", "place": {"threads": 1}, "seed": SEED}
RARE: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "class_weights: balanced": {"objective": {"class_weights": "balanced"}},
    "balance: label": {"train": {"balance": "label"}},
    "balance: {strength: 0.5}": {"train": {"balance": {"by": "label", "strength": 0.5}}},
    "focal_gamma: 2": {"objective": {"focal_gamma": 2.0}},
    "label_smoothing: 0.1": {"objective": {"label_smoothing": 0.1}},
}
TRAINED: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "label_smoothing: 0.1": {"label_smoothing": 0.1},
    "focal_gamma: 2": {"focal_gamma": 2.0},
}
SCALED = (("temperature", None), ("vector", None), ("isotonic", None), ("temperature", 0.9), ("temperature", 0.98))
METRICS = ("accuracy", "ece", "adaptive_ece", "brier", "loss")
SETS = ("conformal_coverage", "conformal_set_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--runs", type=Path, default=CHECKOUT / "runs" / "classifiers", help="where the runs go")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        kept[name] = MEASURES[name](options.runs.resolve() / name) | {"machine": machine()}
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def rare(runs: Path) -> dict[str, Any]:
    """Each way against plain training, by macro-F1 over the whole test set, which has 40 rows of each label."""
    source = data_sets() / "banking77"
    train, validation = (rows_of(source / f"{split}.jsonl") for split in ("train", "validation"))
    labels = sorted({row["label"] for row in train})
    tail = set(labels[1::2])
    data = {
        "train": written(runs / "train.jsonl", thinned(train, tail)),
        "validation": written(runs / "validation.jsonl", thinned(validation, tail)),
        "test": str(source / "test.jsonl"),
    }
    sides: dict[str, list[Prediction]] = {}
    lines: list[dict[str, Any]] = []
    for number, (way, keys) in enumerate(RARE.items()):
        objective = {"name": "classify", **keys.get("objective", {})}
        recipe = {**BASE, "data": data, "objective": objective, "train": keys.get("train", {})}
        sides[way] = answered(recipe, runs / str(number))
        lines.append({"way": way, **judged(sides[way], sides["plain"], tail)})
        print(json.dumps(lines[-1]), flush=True)
    return {
        "train": len(thinned(train, tail)),
        "rare": sorted(count(thinned(train, tail), tail))[:: len(tail) - 1],
        "lines": lines,
    }


def calibrated(runs: Path) -> dict[str, Any]:
    """Each way of training with each way of scaling: what ECE, Brier score and loss were before and are after."""
    source = data_sets() / "clinc150_oos"
    data = {
        split: written(runs / f"{split}.jsonl", (r for r in rows_of(source / f"{split}.jsonl") if r["label"] != "oos"))
        for split in ("train", "validation", "test")
    }
    lines: list[dict[str, Any]] = []
    for place, (trained, keys) in enumerate(TRAINED.items()):
        for number, (scaling, coverage) in enumerate(SCALED if trained == "plain" else SCALED[:1]):
            evaluate = {"calibrate": scaling, "conformal": coverage, "metrics": [*METRICS, *SETS * bool(coverage)]}
            recipe = {**BASE, "data": data, "objective": {"name": "classify", **keys}, "evaluate": evaluate}
            run = runs / f"{place}-{number}"
            answered(recipe, run)
            records = [r for r in json.loads((run / "evaluation.json").read_text()) if r["group"] == "all"]
            own = [r for r in records if r["model"] in ("tuned", "uncalibrated")]
            lines.append({"trained": trained, "scaling": scaling, "coverage": coverage, "records": own})
            told = [(r["model"], r["metric"], round(r["value"], 4)) for r in own]
            print(trained, scaling, coverage, told, flush=True)
    return {"lines": lines}


def judged(found: Sequence[Prediction], plain: Sequence[Prediction], tail: set[str]) -> dict[str, Any]:
    """Macro-F1 and accuracy with their intervals, the paired effect, and the recall of rare and of other labels."""
    metrics = build(["macro_f1", "accuracy"], found)
    records = measure("tuned", "test", found, metrics, SEED)
    effects = [asdict(compare(plain, found, metric, SEED)) for metric in metrics] if found is not plain else []
    recall = {
        name: sum(p.output == p.reference for p in own) / len(own)
        for name, own in (
            ("rare", [p for p in found if p.reference in tail]),
            ("other", [p for p in found if p.reference not in tail]),
        )
    }
    return {"metrics": [asdict(r) for r in records], "effects": effects, "recall": recall, "n": len(found)}


def answered(recipe: Mapping[str, Any], run: Path) -> list[Prediction]:
    """What the tuned model of the recipe answers to its test set; a run that is there is read as it stands."""
    if not (run / "evaluation.json").is_file():
        api.train(recipe, out=run, progress=False)
    return [row.answers["tuned"] for row in answers.read(run, "test")]


def thinned(rows: Iterable[dict[str, Any]], tail: set[str]) -> list[dict[str, Any]]:
    """One row in SHARE of the labels of `tail`, at least one, and all of the others; the same each time."""
    by_label: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: sha1(row["text"].encode()).hexdigest()):
        by_label[row["label"]].append(row)
    return [
        row
        for label, own in sorted(by_label.items())
        for row in own[: max(1, round(len(own) / SHARE)) if label in tail else None]
    ]


def count(rows: Iterable[dict[str, Any]], labels: set[str]) -> list[int]:
    """How many rows each of the labels has."""
    own = [row["label"] for row in rows]
    return [own.count(label) for label in labels]


def machine() -> dict[str, str]:
    """Where the figures are from."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"processor": device_name(torch.device("cpu")), "date": datetime.now(UTC).strftime("%Y-%m-%d"), **versions}


def written(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


MEASURES: Mapping[str, Callable[[Path], dict[str, Any]]] = {"rare": rare, "calibrated": calibrated}


if __name__ == "__main__":
    main()
