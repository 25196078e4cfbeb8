"""The GPU benchmark in one command: every contestant in its own process, in turns, then one table.

    python benchmarks/gpu/run.py [--rounds 2] [--lengths LENGTHS.json] [--only NAME ...] [--unsloth FOLDER]
    python benchmarks/gpu/run.py --read LINES.jsonl [--out RESULTS.md]        a table of lines measured before

A contestant that fails is named with its last line of error. README.md beside this says what is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTESTANTS: dict[str, list[str]] = {
    "bf16": ["run_tunesmith.py", "--precision", "bf16"],
    "fp8": ["run_tunesmith.py", "--precision", "fp8"],
    "trl": ["run_trl.py"],
    "trl-no-recompute": ["run_trl.py", "--no-recompute"],
    "unsloth": ["run_unsloth.py"],
    "unsloth-no-recompute": ["run_unsloth.py", "--no-recompute"],
    "int4-least": ["run_tunesmith.py", "--precision", "int4", "--recompute", "32", "--again", "away"],
    "unsloth-4-bits": ["run_unsloth.py", "--four-bits"],
}
FULL: dict[str, list[str]] = {  # every parameter trains
    "bf16": ["run_tunesmith.py", "--precision", "bf16"],
    "bf16-8bit": ["run_tunesmith.py", "--precision", "bf16", "--optimizer", "adamw_8bit"],
    "fp8-8bit": ["run_tunesmith.py", "--precision", "fp8", "--optimizer", "adamw_8bit"],
    "trl-no-recompute": ["run_trl.py", "--no-recompute"],
    "trl-half": ["run_trl.py", "--no-recompute", "--half"],
    "unsloth-no-recompute": ["run_unsloth.py", "--no-recompute"],
}
MIXTURES: dict[str, list[str]] = {
    "bf16-mixture": [*CONTESTANTS["bf16"], "--rows", "mixture"],
    "fp8-mixture": [*CONTESTANTS["fp8"], "--rows", "mixture"],
}
HEAD = (
    "| what | rows | tokens/s | of 790 TFLOP/s | step, ms | peak GiB, allocated | reserved | first step, s "
    "| loss after n steps |\n|---|---|---:|---:|---:|---:|---:|---:|---|\n"
)


def main() -> None:
    asked = arguments()
    if asked.read is not None:
        lines = [json.loads(line) for line in asked.read.read_text(encoding="utf-8").splitlines() if line]
    else:
        lines = measured(asked)
    asked.out.write_text(table(lines), encoding="utf-8")
    print(table(lines))


def measured(asked: argparse.Namespace) -> list[dict[str, Any]]:
    chosen = CONTESTANTS | (MIXTURES if asked.lengths is not None else {}) if asked.method == "lora" else FULL
    lines: list[dict[str, Any]] = []
    for _ in range(asked.rounds):
        for name, command in chosen.items():
            if asked.only and name not in asked.only:
                continue
            extra = ["--lengths", str(asked.lengths.resolve())] if name in MIXTURES else []
            extra += ["--steps", str(asked.steps), "--warm-up", str(asked.warm_up), "--shape", asked.shape]
            extra += ["--method", asked.method, "--tokens", str(asked.tokens)]
            env = peers_own(asked.unsloth) if command[0] == "run_unsloth.py" and asked.unsloth else None
            done = subprocess.run([sys.executable, *command, *extra], cwd=HERE, capture_output=True, text=True, env=env)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
            if not found:
                print(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
            lines += found
    return lines


def peers_own(packages: Path) -> dict[str, str]:
    """The environment of a contestant whose packages, in the versions that it asks for, are in this folder."""
    path = os.pathsep.join([str(packages.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def table(lines: list[dict[str, Any]]) -> str:
    shapes = sorted({r.get("shape", "llama-3.1-8b") for r in lines})
    rows = [
        f"| {r['name']}{', ' + r['shape'] if len(shapes) > 1 else ''} | {r['rows']} "
        f"| {r['tokens_per_second']:,} | {r['share_of_peak']:.0%} | {r['step_ms']:.0f} "
        f"| {r['peak_allocated_gib']} | {r['peak_reserved_gib']} | {r['first_step_s']} "
        f"| {r['losses'][0]} -> {r['losses'][-1]} ({r['steps']}) |\n"
        for r in lines
    ]
    cards = sorted({f"{r['card']}, torch {r['torch']}" for r in lines})
    versions = sorted({f"{k} {v}" for r in lines for k, v in r.get("versions", {}).items()})
    warm = sorted({f"{r['warm_up']} of {r['steps']}" for r in lines})
    tokens = max(r["tokens_per_step"] for r in lines)
    full = all("full" in r["name"] for r in lines)
    trained = "All parameters" if full else "LoRA r=16 on all linear layers"
    return (
        f"# {trained}, {', '.join(shapes)} shape, random weights, {tokens:,} tokens a step\n\n"
        f"Made by `benchmarks/gpu/run.py` on {datetime.date.today()}; {'; '.join(cards)}"
        f"{'; ' + ', '.join(versions) if versions else ''}. Warm-up steps, not timed: {', '.join(warm)}.\n\n"
        + HEAD
        + "".join(rows)
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--warm-up", type=int, default=6)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(dict.fromkeys([*CONTESTANTS, *MIXTURES, *FULL])))
    parser.add_argument("--unsloth", type=Path, help="folder with Unsloth and the packages that it asks for")
    parser.add_argument("--read", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
