"""Every method on two real tasks: what it reaches, what it trains, what it leaves on disk, seconds and memory.

    python benchmarks/methods.py [--task banking77|demo] [--only lora full ...] [--again]

banking77: intents of customers' messages (77), all-minilm-l6-v2 with a head. demo: the JSON of `tunesmith demo`,
smollm2-135m-instruct. Each cell is one run in a process of its own; what it gave is kept in results/methods.json,
and a cell that is there is not run again unless --again asks. docs/methods.md is written from that file.

Rates are each method's own: on BANKING77 `RATES` and `HEAD_RATES` (full's two are the best of 16 pairs by validation
loss, 5e-6 to 5e-5 with 5e-4 to 3e-2 for the head; LoRA's of two; the others one try each), on the demo's task the
defaults. All else is the same for every method of a task.
Seconds are of the whole run, the fetching of the base left out, and were measured where the table says.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spine

from tunesmith import demo

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results" / "methods.json"
PAGE = CHECKOUT / "docs" / "methods.md"
HEADLINE = {"banking77": "accuracy", "demo": "field_accuracy"}
BASELINE = {"banking77": "majority", "demo": "base"}
# name of the row: method as a recipe has it. "partial" stands for itself and for BitFit.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "partial (top half)": {"name": "partial", "top": 0.5},
    "partial (biases: BitFit)": {"name": "partial", "only": "biases"},
    "partial (norms)": {"name": "partial", "only": "norms"},
    "head": {"name": "head"},
    "lora": {"name": "lora", "rank": 16},
    "dora": {"name": "dora", "rank": 16},
    "adalora": {"name": "adalora"},
    "vera": {"name": "vera"},
    "ia3": {"name": "ia3"},
    "loha": {"name": "loha"},
    "lokr": {"name": "lokr"},
    "oft": {"name": "oft"},
    "bottleneck": {"name": "bottleneck"},
    "prompt": {"name": "prompt"},
    "p_tuning": {"name": "p_tuning"},
    "prefix": {"name": "prefix"},
}
RATES: dict[str, dict[str, float]] = {
    "banking77": {
        "full": 1e-5,
        "partial (top half)": 3e-4,
        "partial (biases: BitFit)": 5e-3,
        "partial (norms)": 5e-3,
        "lora": 2e-3,
        "dora": 2e-3,
        "adalora": 5e-3,
        "vera": 1e-2,
        "ia3": 1e-2,
        "loha": 2e-3,
        "lokr": 2e-3,
        "oft": 1e-3,
        "bottleneck": 2e-3,
        "prompt": 1e-2,
        "p_tuning": 3e-3,
        "prefix": 1e-2,
    },
    "demo": {},
}
# of a new head, where the rest of the model wants a much smaller rate; the other methods' heads take the method's own
HEAD_RATES: dict[str, dict[str, float]] = {"banking77": {"full": 1e-3}, "demo": {}}
NOT_THERE = {"demo": {"partial (biases: BitFit)": "SmolLM2 has no biases"}}


def recipe_of(
    task: str, name: str, rate: float | None = None, head_rate: float | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe, and the keywords of `train` beside it."""
    method = dict(METHODS[name])
    if task == "banking77":
        recipe, keywords = spine.banking77(spine.data_sets() / "banking77")
        recipe["precision"] = "fp32"  # steps of so small a model wait for launches, and casts are more of them
        recipe["train"] = {"epochs": 10, "batch_size": 32, "dropout": 0.1, "schedule": "cosine"}
    else:
        recipe, keywords = demo.recipe(quick=False), {"data": demo.rows(quick=False)}
        recipe["train"] = {k: v for k, v in recipe["train"].items() if k not in ("learning_rate", "evaluate_every")}
        if name == "head":
            method["untie"] = True
    if rate := rate or RATES[task].get(name):
        recipe["train"]["learning_rate"] = rate
    if head_rate := head_rate or HEAD_RATES[task].get(name):
        recipe["train"]["head_learning_rate"] = head_rate
    return {**recipe, "method": method}, keywords


def cell(task: str, name: str, device: str, *rates: float | None) -> dict[str, Any]:
    """Runs it here and measures it. Rates: the method's and its head's, where they are not those of the table."""
    import torch

    from tunesmith import api
    from tunesmith.engine.precision import device_name
    from tunesmith.models.fetch import resolve

    recipe, keywords = recipe_of(task, name, *rates)
    recipe["place"] = {"device": device}
    resolve(recipe["model"])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = api.train(recipe, out=Path(folder) / "run", **keywords)
        seconds = time.perf_counter() - start
        plan = json.loads((result.path / "plan.json").read_text())
        size = sum(f.stat().st_size for f in (result.path / "model").glob("*.safetensors"))
        steps = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
        (effect,) = [e for e in result.effects if e["metric"] == HEADLINE[task]]
    used = torch.device(plan["placement"]["device"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tuned, base = (result.record(HEADLINE[task], model=model) for model in ("tuned", BASELINE[task]))
    return {
        "value": [tuned[key] for key in ("value", "low", "high", "n")],
        "base": base["value"],
        "p": effect["p"],
        "validation": min(line["validation"]["loss"] for line in steps if "validation" in line),
        "trainable": plan["parameters"]["trainable"],
        "total": plan["parameters"]["total"],
        "learning_rate": plan["meaning"]["train"]["learning_rate"],
        "head_learning_rate": plan["meaning"]["train"].get("head_learning_rate"),
        "artefact_bytes": size,
        "seconds": round(seconds, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if used.type == "cuda" else peak,
        "machine": f"{device_name(used)}, {plan['placement']['precision']}"
        + (f", {torch.get_num_threads()} threads" if used.type == "cpu" else ""),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/methods.md from what was measured."""
    lines = [
        "# Methods, measured",
        "",
        "Written by `python benchmarks/methods.py`, which says what is held equal. `tunesmith methods` has when to",
        "choose which. Intervals are of 95%; p is of the paired test against the base (on BANKING77, which gives the",
        "base a new head, against the majority class). Memory is the peak of the process, libraries included, or on a",
        "GPU that of its allocator; the artefact is the weights in `model/`. Rows measured on an H100",
        "ran four at once on a card, so a run alone takes less than their seconds.",
    ]
    for task, metric in HEADLINE.items():
        found = results.get(task, {})
        if not found:
            continue
        title = "BANKING77, all-minilm-l6-v2" if task == "banking77" else "The demo's task, smollm2-135m-instruct"
        first = next(iter(found.values()))
        lines += ["", f"## {title}", "", f"{metric} on {first['value'][3]:,} test rows; base: {first['base']:.3f}.", ""]
        lines += [
            f"| method | {metric} | p | trains | artefact | rate | seconds | peak memory | on |",
            "|---" * 9 + "|",
        ]
        lines += [_row(name, found[name]) for name in METHODS if name in found]
        lines += ["", *(f"- {name}: not there, {why}." for name, why in NOT_THERE.get(task, {}).items())]
        lines += [f"- {name}: not measured." for name in METHODS if name not in found | NOT_THERE.get(task, {})]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, found: Mapping[str, Any]) -> str:
    value, low, high, _ = found["value"]
    p = "<0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
    of_head = f", head {found['head_learning_rate']:g}" if found.get("head_learning_rate") else ""
    return (
        f"| {name} | {value:.3f} [{low:.3f}, {high:.3f}] | {p} | {100 * found['trainable'] / found['total']:.3g}% "
        f"| {found['artefact_bytes'] / 1e6:.3g} MB | {found['learning_rate']:g}{of_head} | {found['seconds']:.0f} "
        f"| {found['peak_bytes'] / 2**30:.2f} GiB | {found['machine']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(HEADLINE))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--again", action="store_true", help="run what has been measured already, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cell", action="store_true", help="one cell in this process, as JSON")
    parser.add_argument("--rate", type=float, help="with --cell: another learning rate, to find the method's own")
    parser.add_argument("--head-rate", type=float, help="with --cell: another learning rate of the head")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options.task, options.only[0], options.device, options.rate, options.head_rate)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for task in [options.task] if options.task else sorted(HEADLINE):
        for name in options.only or METHODS:
            held = results.setdefault(task, {})
            if name in NOT_THERE.get(task, {}) or (name in held and not options.again):
                continue
            words = ["--cell", "--task", task, "--only", name, "--device", options.device]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{task}, {name}: failed with {done.returncode}")
            held[name] = json.loads(done.stdout.splitlines()[-1])
            print(task, name, held[name]["value"], f"{held[name]['seconds']} s", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            PAGE.write_text(page(results))
    if RESULTS.is_file():
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
