"""The plan against the run: predicted peak memory and step time of recipes drawn by seed, and what came of them.

    python benchmarks/gpu/planner.py [--recipes 20] [--seed 4] [--out PLANNER.md]

Each recipe (method, precision, lengths, model, batch) is planned and trained for a few steps by the public API, in a
process of its own, and left before anything is written. Memory is what torch's allocator reserved at most in training;
time is the median step of the later half, when most lengths have been seen and compiled for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from workload import QWEN3

from tunesmith import api
from tunesmith.engine.precision import choose_device
from tunesmith.errors import StoppedError
from tunesmith.events import StopRun
from tunesmith.monitor import Monitor

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA["max_position_embeddings"] = 4096
SHAPES: dict[str, dict[str, Any]] = {
    "llama-150m": {
        **LLAMA,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "llama-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "bert-110m": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 4096,
    },
}
LEAST, STEPS, SECONDS = 10, 40, 25.0  # a run takes so many steps at least and at most, and between them so long
TOKENS = 32_768  # of a step at most
METHODS = {"lora": 0.4, "full": 0.25, "dora": 0.15, "ia3": 0.1, "prefix": 0.1}  # how often each is drawn
LENGTHS = (64, 256, 1024, 3000)


def draw(number: int, seed: int) -> dict[str, Any]:
    """The recipe of this number, and the shape of its model."""
    dice = np.random.default_rng([seed, number])
    shape = str(dice.choice(list(SHAPES)))
    method = str(dice.choice(list(METHODS), p=list(METHODS.values())))
    length = int(dice.choice(LENGTHS))
    precisions = ["bf16", "fp32"]
    if method in ("lora", "dora") and shape != "bert-110m":
        precisions.append("int4")
    if method == "lora" and shape.startswith("llama"):
        precisions.append("fp8")
    return {
        "shape": shape,
        "method": method,
        "precision": str(dice.choice(precisions)),
        "length": length,
        "batch_size": max(1, min(int(dice.choice([4, 16, 64])), TOKENS // length)),
        "free": float(dice.choice([1.0, 0.15])),  # of the card: in a small one layers have to run again
    }


def rows(drawn: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Texts of bytes, about as long as drawn: between half and the whole of it."""
    dice = np.random.default_rng([number, 1])
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    found: list[dict[str, Any]] = []
    for index in range(max(64, 4 * drawn["batch_size"])):
        length = int(dice.integers(drawn["length"] // 2, drawn["length"]))
        text = bytes(dice.choice(letters, length)).decode()
        if drawn["shape"].startswith("bert"):
            found.append({"text": f"{index} {text}", "label": "ab"[index % 2]})
        else:
            found.append({"prompt": f"{index} {text[: length // 2]}", "completion": text[length // 2 :]})
    return found


def model(shape: str, folder: Path) -> Path:
    """A model of random weights with a tokenizer of bytes, on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**SHAPES[shape])
    maker = AutoModelForMaskedLM if shape.startswith("bert") else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        made = maker.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    special = ["<pad>", "<end>", "<unk>", "<cls>", "<sep>", "<mask>"]
    words = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokens = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    names = ("pad", "eos", "unk", "cls", "sep", "mask")
    named = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **named).save_pretrained(folder)
    return folder


def measured(drawn: dict[str, Any], number: int, base: Path, out: Path) -> dict[str, Any]:
    """Predictions of the plan, and the run's own figures."""
    choose_device("cuda")  # as any run begins, before torch allocates
    if drawn["free"] < 1:
        torch.cuda.set_per_process_memory_fraction(drawn["free"])
    recipe = {
        "model": str(base),
        "objective": "classify" if drawn["shape"].startswith("bert") else "sft",
        "method": drawn["method"],
        "precision": drawn["precision"],
        "train": {
            "max_steps": STEPS,
            "batch_size": drawn["batch_size"],
            "sequence_length": 3500,
        },
        "place": {"device": "cuda", "compile": False},
    }
    lines: list[Any] = []

    def listen(event: str, data: Any) -> None:
        if event == "step":
            lines.append(data)
        if len(lines) == STEPS or (len(lines) >= LEAST and sum(line["seconds"] for line in lines) > SECONDS):
            raise StopRun

    with suppress(StoppedError), patch.object(Monitor, "save"):
        api.train(recipe, data={"train": rows(drawn, number)}, out=out, listen=listen)
    plan = json.loads((out / "plan.json").read_text())
    placement = plan["placement"]
    return {
        "predicted_gib": plan["prediction"]["peak_memory_bytes"] / 2**30,
        "reserved_gib": max(line["peak_memory_bytes"] for line in lines) / 2**30,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "predicted_ms": 1e3 * plan["prediction"]["seconds"] / STEPS,
        "step_ms": 1e3 * statistics.median(line["seconds"] for line in lines[len(lines) // 2 :]),
        "micro_batch": placement["micro_batch_tokens"],
        "again": f"{placement['recomputed']} {placement['recompute']}" if placement["recomputed"] else "-",
    }


def child(drawn: dict[str, Any], number: int, base: Path, out: Path, to: Path) -> None:
    try:
        found = measured(drawn, number, base, out)
    except Exception as error:  # whatever it is, it is a row of the table
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    to.write_text(json.dumps({**drawn, **found}))


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        f"# Plans and runs: {len(found)} recipes drawn by seed\n",
        f"Made by `benchmarks/gpu/planner.py` on {datetime.date.today()}; torch {torch.__version__}.\n",
        "| model | method | precision | lengths up to | examples a step | free | micro-batch, tokens | run again "
        "| GiB, predicted | reserved | off by | step, ms, predicted | measured | off by |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        head = f"| {row['shape']} | {row['method']} | {row['precision']} | {row['length']} | {row['batch_size']} "
        head += f"| {row['free']:.0%} "
        if "error" in row:
            lines.append(head + f"| {row['error'][:160]} |" + " |" * 7)
            continue
        memory = row["predicted_gib"] / row["reserved_gib"] - 1
        time = row["predicted_ms"] / row["step_ms"] - 1
        lines.append(
            f"{head}| {row['micro_batch']:,} | {row['again']} | {row['predicted_gib']:.2f} | {row['reserved_gib']:.2f} "
            f"| {memory:+.1%} | {row['predicted_ms']:.1f} | {row['step_ms']:.1f} | {time:+.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first recipe")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "PLANNER.md")
    asked = parser.parse_args()
    forks = multiprocessing.get_context("fork")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        for number in range(asked.first, asked.first + asked.recipes):
            drawn = draw(number, asked.seed)
            base = folder / drawn["shape"]
            if not base.is_dir():
                maker = forks.Process(target=model, args=(drawn["shape"], base))
                maker.start()
                maker.join()
            to = folder / f"{number}.json"
            began = time.perf_counter()
            one = forks.Process(target=child, args=(drawn, number, base, folder / f"run-{number}", to))
            one.start()
            one.join()
            found.append(json.loads(to.read_text()) if to.is_file() else {**drawn, "error": f"ended {one.exitcode}"})
            print(json.dumps({**found[-1], "took_s": round(time.perf_counter() - began)}), flush=True)
            asked.out.write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
