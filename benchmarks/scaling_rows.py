"""How many validation rows a scaling of probabilities takes: what it makes of probabilities that are true already.

    python benchmarks/scaling_rows.py [--samples 100]

Draws rows of 2, 3 and 10 classes from their probabilities, which no scaling can make better, and such as a model gives
that is twice as sure as it should be. Each scaling is fitted to few of them and judged on 4,000 others: the mean
change of the loss, in nats, and of the accuracy. Writes benchmarks/results/scaling_rows.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cpu_sft import processor
from populations import Rng
from scipy import special

from tunesmith.evaluation import scaling
from tunesmith.evaluation.metrics import FloatArray
from tunesmith.evaluation.scaling import IntArray

RESULT = Path(__file__).resolve().parent / "results" / "scaling_rows.json"
CLASSES, SURENESS, ROWS, JUDGED, APART = (2, 3, 10), (1.0, 2.0), (4, 10, 20, 50, 100, 300), 4000, 4.0


def drawn(count: int, classes: int, sure: float, rng: Rng) -> tuple[FloatArray, IntArray]:
    """Log-probabilities, `sure` times the true ones, and labels."""
    logits_NV = rng.normal(size=(count, classes))
    logits_NV[np.arange(count), rng.integers(classes, size=count)] += APART
    shares_NV = special.softmax(logits_NV, axis=-1)
    label_N = (shares_NV.cumsum(axis=-1) < rng.random((count, 1))).sum(axis=-1).clip(max=classes - 1)
    return special.log_softmax(sure * logits_NV, axis=-1), label_N


def judged(logprobs_NV: FloatArray, label_N: IntArray) -> tuple[float, float]:
    """Loss and accuracy."""
    loss = -float(logprobs_NV[np.arange(len(label_N)), label_N].mean())
    return loss, float((logprobs_NV.argmax(axis=-1) == label_N).mean())


def measured(name: str, classes: int, sure: float, rows: int, samples: int) -> dict[str, float]:
    rng = np.random.default_rng([classes, int(sure), rows])
    logprobs_NV, label_N = drawn(JUDGED, classes, sure, rng)
    before, changes = np.array(judged(logprobs_NV, label_N)), list[FloatArray]()
    while len(changes) < samples:
        some_NV, some_N = drawn(rows, classes, sure, rng)
        if len(np.unique(some_N)) < (2 if name == "temperature" else classes):
            continue
        scaled_NV = scaling.fit(name, some_NV, some_N)(logprobs_NV)
        changes.append(np.array(judged(np.log(scaled_NV), label_N)) - before)
    loss, accuracy = np.mean(changes, axis=0)
    return {"loss before": round(before[0], 3), "change": round(loss, 3), "change of accuracy": round(accuracy, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    samples = parser.parse_args().samples
    found: dict[str, dict[str, float]] = {}
    for name, classes, sure, rows in itertools.product(scaling.SCALINGS, CLASSES, SURENESS, ROWS):
        if name != "temperature" and rows < 2 * classes:
            continue
        label = f"{name}, {classes} classes, {sure:g} times as sure, {rows} rows"
        found[label] = measured(name, classes, sure, rows, samples)
        print(label, found[label], flush=True)
    outcome = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("numpy", "scipy")},
        "samples": samples,
        "figures": found,
    }
    RESULT.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
