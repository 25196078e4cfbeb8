"""The two measured tasks of the spine: BANKING77 with a head, CLINC150 by LoRA, on real bases.

    python benchmarks/spine.py banking77 [--repeat 3] [key=value ...]
    python benchmarks/spine.py clinc150 [key=value ...]

Data sets are read from $TUNESMITH_DATA, or ../shared/data beside the checkout. Timings leave the
download of the base out and count everything else, from reading rows to evaluation.json. Prints one
JSON line with machine, versions and date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tunesmith import api
from tunesmith.engine.precision import device_name
from tunesmith.models.cache import cache_dir
from tunesmith.models.fetch import resolve

CHECKOUT = Path(__file__).resolve().parents[1]
SEED = 17


def data_sets() -> Path:
    named = os.environ.get("TUNESMITH_DATA")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        raise SystemExit(f"no data sets in {folder}: set TUNESMITH_DATA")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stratified(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows, as evenly over the labels as it goes, drawn with the seed."""
    draw = np.random.default_rng(SEED)
    by_label: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for index in draw.permutation(len(rows)):
        by_label[rows[index]["label"]].append(rows[index])
    rounds = [
        group[i] for i in range(max(map(len, by_label.values()))) for group in by_label.values() if i < len(group)
    ]
    return rounds[:count]


def banking77(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe = {
        "model": "all-minilm-l6-v2",
        "objective": "classify",
        "method": "head",
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
    }
    return recipe, {}


def clinc150(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    def chat(row: dict[str, Any]) -> dict[str, Any]:
        turns = (("system", "Name the intent."), ("user", row["text"]), ("assistant", row["label"].replace("_", " ")))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def inside(split: str) -> list[dict[str, Any]]:
        return [row for row in rows_of(folder / f"{split}.jsonl") if row["label"] != "oos"]

    data = {
        "train": [chat(row) for row in stratified(inside("train"), 2000)],
        "test": [chat(row) for row in stratified(inside("test"), 300)],
    }
    recipe = {
        "model": "smollm2-135m-instruct",
        "objective": "sft",
        "method": {"name": "lora", "rank": 16},
        "train": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "schedule": "cosine"},
    }
    return recipe, {"data": data}


TASKS = {"banking77": (banking77, "banking77"), "clinc150": (clinc150, "clinc150_oos")}


def put(recipe: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    *above, last = key.split(".")
    for part in above:
        recipe = recipe.setdefault(part, {})
    recipe[last] = json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("overrides", nargs="*", metavar="key=json")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    make, name = TASKS[options.task]
    recipe, keywords = make(data_sets() / name)
    for override in options.overrides:
        put(recipe, override)
    resolve(recipe["model"])
    seconds: list[float] = []
    records: list[dict[str, Any]] = []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            vectors = cache_dir() / "vectors"
            for cached in vectors.glob("*.f32"):
                cached.unlink()
            start = time.perf_counter()
            records = api.train(recipe, out=Path(folder) / "run", **keywords).records
            seconds.append(round(time.perf_counter() - start, 1))
    found = {f"{r['model']} {r['metric']}": [r["value"], r["low"], r["high"], r["n"]] for r in records}
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    line = {
        "task": options.task,
        "overrides": options.overrides,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "results": found,
        "machine": machine,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
