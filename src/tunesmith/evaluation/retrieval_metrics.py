"""Metrics of retrieval: where a query's passages stand among all that were searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient
from tunesmith.types import AnswerKind, Prediction


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

    of: ClassVar[tuple[AnswerKind, ...]] = ("passages",)
    name: ClassVar[str] = "mrr"
    about: ClassVar[About] = About(
        "Voorhees 1999, The TREC-8 Question Answering Track Report",
        "own",
        "search where the first right passage is all that is wanted",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    score: ClassVar[str] = "rank"  # of a prediction, which its statistic is made of

    @classmethod
    def applies(cls, predictions: Sequence[Prediction]) -> bool:
        return all(cls.score in prediction.scores for prediction in predictions)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (1.0 / _score(prediction, self.score, self.name), 1.0)

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

    score: ClassVar[str] = "recall_at_10"

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (_score(prediction, self.score, self.name), 1.0)


@METRICS.register("ndcg_at_10")
class NdcgAt10(RecallAt10):
    """Mean over queries of nDCG at 10: each passage that answers counts 1 / log2(1 + its rank) if it is among the first
    10, by the sum were they all first; ties against them."""

    name: ClassVar[str] = "ndcg_at_10"
    about: ClassVar[About] = About(
        "Järvelin and Kekäläinen 2002, ACM Trans. Inf. Syst. 20(4)",
        "own, as scikit-learn's ndcg_score",
        "search whose whole first page is read, and several passages may answer; what BEIR publishes",
    )
    score: ClassVar[str] = "ndcg_at_10"
