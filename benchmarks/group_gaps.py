"""What the interval of a gap between groups is worth: how often it holds the true gap, and calls chance a gap.

    python benchmarks/group_gaps.py [--samples 2000]

Draws the rows of 2, 5 and 10 groups from populations whose true values are known (populations.py) and gives them to
`evaluate.by`'s gap. Equal groups: how often the interval leaves 0 out. Groups of which half are better: how often it
holds the true gap between the two groups that look best and worst, and how often the largest true gap. Writes
benchmarks/results/group_gaps.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cpu_sft import processor
from populations import FIVE_WAY, Rng, classified, hits, scores

from tunesmith.evaluation.groups import gap
from tunesmith.evaluation.metrics import Accuracy, FloatArray, MacroF1, RowMetric
from tunesmith.evaluation.text_metrics import TokenF1

RESULT = Path(__file__).resolve().parent / "results" / "group_gaps.json"
GROUPS, ROWS, MANY = (2, 5, 10), (50, 200), 500_000
FIVE_CLASSES = MacroF1("abcde")
Draw = Callable[[int, bool, Rng], FloatArray]


def of(draw: Callable[[int, float, Rng], tuple[FloatArray, FloatArray]], gain: float) -> Draw:
    """Rows of a plain group, or of a better one."""
    return lambda count, better, rng: draw(count, gain, rng)[better]


POPULATIONS: tuple[tuple[str, RowMetric, Draw], ...] = (
    ("accuracy of 80%", Accuracy(), of(hits(0.8), 0.1)),
    ("accuracy of 95%", Accuracy(), of(hits(0.95), 0.04)),
    ("token F1", TokenF1(), of(scores, 0.2)),
    ("macro-F1, 5 classes", FIVE_CLASSES, of(classified(FIVE_CLASSES, FIVE_WAY), 0.6)),
)


def measured(metric: RowMetric, draw: Draw, groups: int, rows: int, samples: int) -> dict[str, float]:
    rng = np.random.default_rng([groups, rows])
    truth = [float(metric.aggregate(draw(MANY, better, rng).sum(axis=0))) for better in (False, True)]
    alarms = chosen = largest = given = equal = 0
    for seed in range(samples):
        found = gap(metric, {str(i): draw(rows, False, rng) for i in range(groups)}, seed)
        equal += found is not None and found.reason is None
        alarms += found is not None and found.low > 0
        found = gap(metric, {str(i): draw(rows, i % 2 == 1, rng) for i in range(groups)}, seed)
        if found is None or found.reason is not None:
            continue
        given += 1
        true = truth[int(found.best) % 2] - truth[int(found.worst) % 2]
        chosen += found.low <= true <= found.high
        largest += found.low <= truth[1] - truth[0] <= found.high
    return {
        "equal groups called apart": round(alarms / equal, 4),
        "holds the gap of the groups named": round(chosen / given, 4),
        "holds the largest gap": round(largest / given, 4),
        "true gap": round(truth[1] - truth[0], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    found: dict[str, Any] = {}
    for (name, metric, draw), groups, rows in itertools.product(POPULATIONS, GROUPS, ROWS):
        label = f"{name}, {groups} groups of {rows}"
        found[label] = measured(metric, draw, groups, rows, samples)
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
