"""LoRA on a CPU: tokens/s of tunesmith and of TRL's SFTTrainer, on the same rows, in turns, each in its own process.

    python benchmarks/cpu_sft.py --trl-python path/to/venv/bin/python [--steps 25] [--repeats 3]

Both train on the same token ids with the same loss mask: rows are rendered once, here. What is counted are the
tokens of the rows, never padding, over all steps but the first two. Held equal: fp32, rank, targets, no dropout, AdamW
at a constant rate, the order of the rows. trl-defaults is SFTTrainer as it comes; trl-best takes rows of like length
together and recomputes nothing (its packing lets examples see each other on a CPU). tunesmith-unshared does not compute
once what rows begin with in common.

TRL has an environment of its own: python -m venv V; V/bin/pip install torch trl peft datasets
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
WARM_UP = 2
QUIET = 0.1  # a step counts while other processes have at most this share of the cores
ATTEMPTS = 3
OURS = ("tunesmith", "tunesmith-unshared")
SYSTEMS = (*OURS, "trl-best", "trl-defaults")


def conversations(folder: Path, count: int, seed: int) -> list[list[dict[str, str]]]:
    """`count` rows drawn from three data sets: intents (short), instructions, and problems with worked answers."""

    def read(name: str) -> list[dict[str, Any]]:
        path = folder / name / "train.jsonl"
        if not path.is_file():
            sys.exit(f"{path} is missing: set TUNESMITH_DATA to the folder of data sets, or give --data")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    intents = [(f"Name the intent: {r['text']}", r["label"]) for r in read("clinc150_oos")]
    seeds = read("self_instruct_seed")
    tasks = [(f"{r['instruction']}\n\n{r['input']}".strip(), r["output"]) for r in seeds]
    tasks = [(question, answer) for question, answer in tasks if len(question + answer) < 800]
    problems = [(r["question"], r["answer"]) for r in read("gsm8k")]
    draw = np.random.default_rng(seed)
    rows: list[tuple[str, str]] = []
    few = min(len(tasks), count // 5)
    for kind, size in ((intents, count - 2 * few), (tasks, few), (problems, few)):
        rows += [kind[i] for i in draw.choice(len(kind), size, replace=False)]
    order = draw.permutation(len(rows))
    return [
        [{"role": "user", "content": rows[i][0]}, {"role": "assistant", "content": rows[i][1]}] for i in order.tolist()
    ]


def job_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything a run needs to know: the base, the rows as tokens, and the settings all systems share."""
    from tunesmith.data.chat import Renderer
    from tunesmith.data.source import epoch_order
    from tunesmith.models.fetch import resolve
    from tunesmith.models.load import load_tokenizer

    local = resolve(arguments.model)
    renderer = Renderer(load_tokenizer(local))
    # Every system sees each of these rows exactly once.
    chats = conversations(arguments.data, arguments.steps * arguments.batch_size, arguments.seed)
    encoded = [renderer.encode(chat) for chat in chats]
    rows = [{"input_ids": e.input_ids.tolist(), "mask": e.weights.astype(int).tolist()} for e in encoded]
    order = epoch_order(np.ones(len(rows)), 0, arguments.seed).tolist()  # tunesmith's own, for TRL's sequential order
    # The longest row comes in the first step, so that memory has grown before the clock counts.
    longest = max(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    rows[order[0]], rows[longest] = rows[longest], rows[order[0]]
    steps = len(rows) // arguments.batch_size
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    groups = [by_length[i : i + arguments.batch_size] for i in range(0, len(rows), arguments.batch_size)]
    mixed = np.random.default_rng(arguments.seed).permutation(len(groups) - 1).tolist()
    return {
        "model": arguments.model,
        "base": str(local.folder),
        "pad": renderer.pad_id,
        "rows": rows,
        "ordered_rows": [rows[i] for i in order],
        "grouped_rows": [row for i in (len(groups) - 1, *mixed) for row in groups[i]],
        "steps": steps,
        "batch_size": arguments.batch_size,
        "rank": 16,
        "alpha": 32,
        "learning_rate": 2e-4,
        "seed": arguments.seed,
        "threads": arguments.threads,
    }


def run(job: dict[str, Any], system: str, python: str) -> dict[str, Any]:
    """One run of one system in a fresh process."""
    script = HERE / ("cpu_sft_tunesmith.py" if system in OURS else "cpu_sft_trl.py")
    threads = str(job["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # For all alike: memory that is given back and mapped anew costs most on virtual machines (see README.md).
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job | {"system": system}))
        done = subprocess.run(
            [sys.executable if system in OURS else python, str(script), str(asked), str(answered)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{system} failed:\n{done.stdout[-4000:]}")
        result = json.loads(answered.read_text())
    steps = list(zip(result["tokens"], result["seconds"], result["others"], strict=True))[WARM_UP:]
    quiet = [(tokens, seconds) for tokens, seconds, others in steps if others <= QUIET]
    result["quiet_share"] = len(quiet) / len(steps)
    counted = quiet or [(tokens, seconds) for tokens, seconds, _ in steps]
    result["tokens_per_second"] = sum(t for t, _ in counted) / sum(s for _, s in counted)
    result["tokens_per_second_all_steps"] = sum(s[0] for s in steps) / sum(s[1] for s in steps)
    return result


def run_quietly(job: dict[str, Any], system: str, python: str) -> dict[str, Any]:
    """The first of a few runs with at least half of its steps undisturbed, else the least disturbed one."""
    tried: list[dict[str, Any]] = []
    while len(tried) < ATTEMPTS and (not tried or tried[-1]["quiet_share"] < 0.5):
        tried.append(run(job, system, python))
    return max(tried, key=lambda result: result["quiet_share"])


def check_trl(python: str | None) -> str:
    if python is None:
        sys.exit("give --trl-python: the python of an environment with TRL (see --help)")
    if subprocess.run([python, "-c", "import trl, peft, datasets"], capture_output=True, check=False).returncode:
        sys.exit(f"{python} cannot import trl, peft and datasets (see --help)")
    return python


def agreement(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How far the loss curves are apart: before training exactly, afterwards as means over the last fifth."""
    ours = results["tunesmith"][-1]
    found: dict[str, float] = {}
    for system in (s for s in results if s not in OURS):
        theirs = results[system][-1]
        first = ours["losses"][0] if system == "trl-defaults" else ours["loss_on_grouped_first_step"]
        found[f"{system}: first step"] = abs(theirs["losses"][0] - first)
        if system == "trl-defaults":
            apart = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
            found[f"{system}: mean of all steps"] = statistics.fmean(apart)
            found[f"{system}: largest of all steps"] = max(apart)
    return found


def check(job: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """Ends where the runs did not train on the same tokens, or do not begin with the same loss."""
    trained = sum(sum(row["mask"][1:]) for row in job["rows"])
    tokens = sum(len(row["input_ids"]) for row in job["rows"])
    for system, repeats in results.items():
        for result in repeats:
            assert sum(result["tokens"]) == tokens, (system, sum(result["tokens"]), tokens)
            assert sum(result.get("trained_tokens", [trained])) == trained, system
            assert result["parameters"] == repeats[0]["parameters"], system
    for name, apart in agreement(results).items():
        assert apart < 1e-3 or "first step" not in name, (name, apart)


def report(job: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    lengths = [len(row["input_ids"]) for row in job["rows"]]
    summary = {
        system: {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in repeats),
            "each_repeat": [round(r["tokens_per_second"], 1) for r in repeats],
            "undisturbed_steps": [round(r["quiet_share"], 2) for r in repeats],
            "each_repeat_all_steps": [round(r["tokens_per_second_all_steps"], 1) for r in repeats],
            "peak_rss_mb": round(max(r["peak_rss_mb"] for r in repeats)),
            "padding": 1 - sum(repeats[0]["tokens"]) / sum(repeats[0].get("padded_tokens", repeats[0]["tokens"])),
            "losses": [round(loss, 4) for loss in repeats[-1]["losses"]],
            "settings": repeats[-1].get("settings", {}),
            "versions": repeats[-1]["versions"],
        }
        for system, repeats in results.items()
    }
    kept = ("model", "steps", "batch_size", "rank", "alpha", "learning_rate", "seed", "threads")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "job": {key: job[key] for key in kept}
        | {"rows": len(lengths), "tokens": sum(lengths), "mean_length": sum(lengths) / len(lengths)}
        | {"trained_tokens": sum(sum(row["mask"]) for row in job["rows"]), "warm_up_steps": WARM_UP},
        "systems": summary,
        "ratios": ratios(results),
        "loss_apart": agreement(results),
    }


def ratios(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ours over theirs: the median over repeats of the ratio of runs that followed one another."""
    return {
        f"{ours} / {theirs}": statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(results[ours], results[theirs], strict=True)
        )
        for ours in OURS
        for theirs in SYSTEMS
        if theirs not in OURS and ours in results and theirs in results
    }


def table(outcome: dict[str, Any]) -> str:
    lines = ["| system | tokens/s | each repeat | padding | peak MB | loss, first | loss, last fifth |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for system, row in outcome["systems"].items():
        fifth = row["losses"][-max(1, len(row["losses"]) // 5) :]
        lines.append(
            f"| {system} | {row['tokens_per_second']:.0f} | {', '.join(f'{x:.0f}' for x in row['each_repeat'])} "
            f"| {row['padding']:.0%} | {row['peak_rss_mb']} | {row['losses'][0]:.4f} | {statistics.fmean(fifth):.4f} |"
        )
    lines.append("")
    lines += [f"- {name}: {value:.2f} x" for name, value in outcome["ratios"].items()]
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the python of an environment with TRL")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    data = os.environ.get("TUNESMITH_DATA", str(HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_sft.json")
    arguments = parser.parse_args()
    theirs = [s for s in arguments.systems if s not in OURS]
    python = check_trl(arguments.trl_python) if theirs else ""
    job = job_of(arguments)
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in arguments.systems}
    for repeat in range(arguments.repeats):
        for system in arguments.systems:
            result = run_quietly(job, system, python)
            results[system].append(result)
            print(
                f"repeat {repeat + 1}: {system} {result['tokens_per_second']:.1f} tokens/s "
                f"({result['quiet_share']:.0%} of steps undisturbed)",
                flush=True,
            )
    if "tunesmith" in results:
        check(job, results)
    outcome = report(job, results) if "tunesmith" in results else {"systems": {}, "ratios": {}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(outcome, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(outcome) + "\n")
    print(table(outcome))


if __name__ == "__main__":
    main()
