"""Metrics of retrieval: where a query's passages stand among all that were searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient
from tunesmith.types import Prediction


def has_ranks(predictions: Sequence[Prediction]) -> bool:
    return all("rank" in prediction.scores for prediction in predictions)


def _score(prediction: Prediction, score: str, name: str) -> float:
    if score not in prediction.scores:
        raise InputError(
            f"{name} needs passages that are ranked, and {prediction.where} has none",
            f"leave {name} out of evaluate.metrics, or give each query its passages and choose the objective retrieve",
        )
    return float(prediction.scores[score])


@METRICS.register("mrr")
class MeanReciprocalRank:
    """Mean over queries of 1 / rank of the first passage that answers, among all that are searched; ties against it."""

    name: ClassVar[str] = "mrr"
    about: ClassVar[About] = About(
        "Voorhees 1999, The TREC-8 Question Answering Track Report",
        "own",
        "search where the first right passage is all that is wanted",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(has_ranks)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (1.0 / _score(prediction, "rank", self.name), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("recall_at_10")
class RecallAt10(MeanReciprocalRank):
    """Mean over queries of the share of its passages that are among the first 10 of all that are searched."""

    name: ClassVar[str] = "recall_at_10"
    about: ClassVar[About] = About(
        "the share found among the first ten",
        "own",
        "search whose finds something else reads on: a re-ranker, a language model",
    )

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (_score(prediction, "recall_at_10", self.name), 1.0)
