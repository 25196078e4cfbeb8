"""Seconds and anonymous memory of preparing a big JSONL file: python benchmarks/big_jsonl.py --megabytes 1000

Writes conversations of made-up words to a temporary folder, trains a small BPE tokenizer on some of them, runs
`prepare` twice (from nothing, then from its cache), and prints one line of JSON. `--renderer words` counts words
instead of tokenising, so that what is left is reading, checking, hashing, splitting and storing.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pyarrow

from tunesmith.data.prepare import Prepared, prepare
from tunesmith.declared import ObjectiveNeeds
from tunesmith.recipe import Data
from tunesmith.types import Example, Piece, Row

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Words:
    """One token a word, from its hash: the least that a tokenizer can do."""

    fingerprint = "words"
    sequence_length = 4096


class Answers:
    """Learns the assistant's turns."""

    needs = ObjectiveNeeds("", "lm", frozenset({"messages"}), frozenset({"decoder"}), trains_tokens=True)

    def fit(self, rows: Iterable[Row]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    def example(self, row: Row, renderer: Any) -> Example:
        if not isinstance(renderer, Words):
            made = renderer.encode(row.value["messages"])
            return Example((Piece(made.input_ids, made.weights),), cut=made.cut, cut_trained=made.cut_trained)
        parts = [np.array([len(w) for w in m["content"].split()], dtype=np.int32) for m in row.value["messages"]]
        trained = [
            np.full(len(p), m["role"] == "assistant", np.float32)
            for p, m in zip(parts, row.value["messages"], strict=True)
        ]
        return Example((Piece(np.concatenate(parts), np.concatenate(trained)),))


def write_file(path: Path, megabytes: int) -> list[str]:
    """Returns some of the texts, to train the tokenizer on."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(random.choice(letters[: 3 + i % 24], 1 + i % 9)) for i in range(30_000)]
    some: list[str] = []
    written = 0
    with path.open("wb") as stream:
        while written < megabytes * 10**6:
            drawn = random.zipf(1.3, 200 * 512) % len(words)
            texts = [" ".join(words[k] for k in drawn[at : at + 200]) for at in range(0, len(drawn), 200)]
            some += texts[: 2 if len(some) < 2000 else 0]
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                turns = [{"role": "user", "content": question[: len(question) // 2]}]
                written += stream.write(
                    orjson.dumps({"messages": [*turns, {"role": "assistant", "content": answer}]}) + b"\n"
                )
    return some


def tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


class Watch(threading.Thread):
    """Samples the anonymous memory of this process and its children, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.start()

    def run(self) -> None:
        here = psutil.Process()
        while True:
            total = 0
            for process in [here, *here.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
                except (OSError, StopIteration):  # it has just ended
                    continue
            self.peak = max(self.peak, total / 1024)
            time.sleep(0.05)


def timed(file: Path, renderer: Any, cache: Path, workers: int) -> tuple[float, dict[str, float], Prepared]:
    started = time.perf_counter()
    stages: dict[str, float] = {}

    def progress(what: str, done: int, total: int | None) -> None:
        stages[what] = round(time.perf_counter() - started, 1)

    data = Data(train=file.name, validation=0.01, allow=["truncated"])
    made = prepare(data, file.parent, Answers(), renderer, 17, cache, workers, None, progress)  # type: ignore[arg-type]
    return round(time.perf_counter() - started, 1), stages, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--renderer", choices=["real", "words"], default="real")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "big.jsonl"
        texts = write_file(file, options.megabytes)
        renderer: Any = Words()
        if options.renderer == "real":
            from tunesmith.data.chat import Renderer

            renderer = Renderer(tokenizer(texts), sequence_length=4096)
        watch = Watch()
        time.sleep(0.2)
        before = watch.peak
        first, stages, made = timed(file, renderer, Path(folder) / "cache", options.workers)
        peak = watch.peak
        again, _, _ = timed(file, renderer, Path(folder) / "cache", options.workers)
        found = {
            "megabytes": round(file.stat().st_size / 10**6),
            "rows": made.audit.train.files[0]["rows"],
            "tokens": made.audit.train.tokens,
            "renderer": options.renderer,
            "workers": options.workers,
            "seconds": first,
            "seconds_at_the_end_of": stages,
            "seconds_from_cache": again,
            "peak_anonymous_mb": round(peak),
            "anonymous_mb_before": round(before),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {psutil.cpu_count()} CPUs, {platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "orjson": orjson.__version__,
            "pyarrow": pyarrow.__version__,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
