"""What a model is compared with whose base has no trained head: answers that nothing has learned to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.protocols import Objective, Unread
from tunesmith.types import LabelCounts, Prediction, Row


@dataclass(frozen=True, slots=True)
class Baseline:
    """How tables call it, what a model is better than, and what a plan and a report say that it is compared with."""

    title: str
    than: str
    shown: str

    @property
    def why(self) -> str:
        return f"A base without a trained head gives no answers, so the comparison is with {self.shown}."


# By the name that an objective's needs give, which is that of the model in records.
BASELINES: Mapping[str, Baseline] = {
    "majority": Baseline(
        "most frequent label",
        "always answering the most frequent label",
        "the majority class, the label that is most frequent in the training rows",
    ),
    "mean": Baseline(
        "mean of training", "always answering the mean of the training rows", "the mean of the training rows"
    ),
    "cosine": Baseline(
        "fitted cosine",
        "the cosine of its base's vectors, fitted to the training rows",
        "the cosine of the base's vectors of both texts, with a threshold (or line) fitted to the training rows",
    ),
    "frequent": Baseline(
        "most frequent tag of each word",
        "giving each word the tag that it has most often in training",
        "the tag that each word has most often in the training rows",
    ),
    "vectors": Baseline(
        "order by the base's vectors",
        "the order of passages by its base's vectors",
        "the order of the passages by the base's own vectors, before any is read beside the query",
    ),
    "chance": Baseline("guess at random", "guessing at random", "a choice drawn at random for each row"),
    "overlap": Baseline(
        "sentence nearest to the question",
        "answering with the sentence that has most of the question's words",
        "the sentence of the context that has most of the question's words",
    ),
}


def label_counts(train: Mapping[str, Any]) -> LabelCounts | None:
    """Of the training rows, by what their audit says as plan.json has it; None where they have no labels."""
    return LabelCounts(train["labels"], train["rows"]) if train["labels"] else None


def unread(objective: Objective, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
    """What the objective's model is compared with where its base has no head; None where that is not known."""
    return objective.unread(rows, label_counts) if isinstance(objective, Unread) else None


def tried(objective: Objective, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
    """What metrics are tried on before the model answers: as `unread`, and of labels whose counts are not known as if
    all were equally frequent.
    """
    labels: Sequence[str] = objective.describe().get("labels", ())
    if label_counts is None and labels:
        label_counts = LabelCounts(dict.fromkeys(labels, 1), len(labels))
    return unread(objective, rows, label_counts)
