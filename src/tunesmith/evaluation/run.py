"""Predictions of one model -> records with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.metrics import RowMetric, Signed, lacking, statistics
from tunesmith.types import Metric, Prediction


def metric_names(default: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The metrics to measure: those asked for, else the objective's; each known, each once.

    InputError on an unknown name, naming the nearest, and on an empty list.
    """
    names = list(dict.fromkeys(default if asked is None else asked))
    if not names:
        raise InputError("evaluate.metrics names no metric", f"leave the key out, or choose of: {', '.join(METRICS)}")
    for name in names:
        METRICS.get(name)
    return names


def measure(
    model_name: str,
    data_name: str,
    predictions: Sequence[Prediction],
    metrics: Sequence[RowMetric],
    seed: int,
    clusters_N: IntArray | None = None,
    group: str = "all",
) -> list[Metric]:
    """One record a metric, in the order given. InputError if predictions lack what a metric needs."""
    records: list[Metric] = []
    for metric in metrics:
        table = statistics(metric, predictions)
        limits, why = (
            interval(metric, table, seed, clusters_N=clusters_N),
            lacking(metric, table, clusters_N=clusters_N),
        )
        signature = metric.signature() if isinstance(metric, Signed) else None
        records.append(Metric(model_name, data_name, metric.name, *limits, len(predictions), group, why, signature))
    return records


def records_to_json(records: Sequence[Metric]) -> list[dict[str, Any]]:
    """The content of evaluation.json. A limit that is infinite (one row of a loss) or missing is null."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        for record in map(asdict, records)
    ]
