"""Predictions of one model -> records with intervals; and what a classifier that ignores the text would answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import IntArray, interval
from tunesmith.evaluation.metrics import RowMetric, lacking, statistics
from tunesmith.types import Metric, Prediction, Row

# Stands for the probability of a label that training never saw, here as in the classifier's own predictions.
SMALLEST = float(np.finfo(np.float32).tiny)


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
        limits, why = interval(metric, table, seed, clusters_N=clusters_N), lacking(metric, table)
        records.append(Metric(model_name, data_name, metric.name, *limits, len(predictions), group, why))
    return records


def majority(references_train: Mapping[str, int], rows: Sequence[Row]) -> list[Prediction]:
    """What a classifier that ignores the text would answer: the most frequent label of the training rows.

    Its probabilities are the training frequencies, so `loss` measures the entropy a model must beat.
    Ties go to the first label in alphabetical order. InputError without labels.
    """
    total = sum(references_train.values())
    if total <= 0:
        raise InputError("there is no majority label: the training rows hold no labels", "check data.train")
    probabilities = {label: references_train[label] / total for label in sorted(references_train)}
    output = max(probabilities, key=lambda label: probabilities[label])
    predictions: list[Prediction] = []
    for row in rows:
        reference = row.value.get("label")
        expected = reference if isinstance(reference, str) else None
        share = probabilities.get(expected, 0.0) if expected is not None else 0.0
        nll = -math.log(max(share, SMALLEST))
        scores = {} if expected is None else {"nll": nll, "tokens": 1.0}
        predictions.append(Prediction(output, expected, row.where, scores, probabilities))
    return predictions


def records_to_json(records: Sequence[Metric]) -> list[dict[str, Any]]:
    """The content of evaluation.json. A limit that is infinite (one row of a loss) or missing is null."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        for record in map(asdict, records)
    ]
