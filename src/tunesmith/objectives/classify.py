"""Classification: cross-entropy of one label a row, from one pooled vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from tunesmith.errors import InputError
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import PooledOptions, head_outputs, read_all
from tunesmith.types import (
    Batch,
    Example,
    HeadSpec,
    ObjectiveNeeds,
    Part,
    Piece,
    Prediction,
    Row,
    SampleSpec,
    Step,
    Terms,
)

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

# Stands for the probability of a label that training never saw, here as in the classifier's own predictions.
SMALLEST = float(torch.finfo(torch.float32).tiny)
UNKNOWN = -1  # the index of a label that training never saw


@OBJECTIVES.register("classify")
class Classify:
    """loss = - sum_i log softmax(head(pooled_i))[label_i] / N; the label set is that of the training rows."""

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="give each text one label of those seen in training",
        head="pooled",
        formats=frozenset({"label"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("accuracy", "macro_f1", "roc_auc", "ece", "loss"),
        baseline="majority",
    )

    class Options(PooledOptions):
        """How a text becomes the vector that its label is read from."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.labels: list[str] = []

    def fit(self, rows: Iterable[Row]) -> None:
        """The label set, in code-point order. Raises InputError for fewer than two labels."""
        self.labels = sorted({_label(row) for row in rows})
        if len(self.labels) < 2:
            raise InputError(
                f"the training rows hold one label ({', '.join(self.labels)}); classification needs two or more",
                "add rows of another label, or check data.columns",
            )

    def describe(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.labels = list(description["labels"])

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("label", len(self.labels), tuple(self.labels), self.options.hidden or 0)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        encoded = renderer.text(row.value["text"])
        known = "label" in row.value and row.value["label"] in self.labels
        column = {"label": self.labels.index(row.value["label"]) if known else UNKNOWN}
        return Example((Piece(encoded.input_ids),), columns=column, cut=encoded.cut)

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"cross_entropy": float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        logits_NV, label_N = head_outputs(policy, "label", batch), batch.columns["label"]
        loss_N = F.cross_entropy(logits_NV, label_N, reduction="none")
        right = float((logits_NV.argmax(-1) == label_N).sum())
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({"cross_entropy": part}, {"accuracy": (right, float(len(loss_N)))})

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable label of each row, with all probabilities."""
        logits = read_all(policy, "label", [self.example(row, renderer) for row in rows], spec)
        return [self._prediction(row, logits_V.log_softmax(-1)) for row, logits_V in zip(rows, logits, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: Mapping[str, int] | None) -> list[Prediction] | None:
        """The most frequent label of training for every row; None where the counts are not known."""
        return majority(label_counts, rows) if label_counts else None

    def _prediction(self, row: Row, logprobs_V: torch.Tensor) -> Prediction:
        reference = row.value.get("label")
        scores: dict[str, float] = {}
        if reference is not None:
            # A label that training never saw has no probability: the smallest positive number stands for it.
            known = reference in self.labels
            nll = -float(logprobs_V[self.labels.index(reference)]) if known else -math.log(SMALLEST)
            scores = {"nll": nll, "tokens": 1.0}
        probabilities = dict(zip(self.labels, logprobs_V.exp().tolist(), strict=True))
        return Prediction(self.labels[int(logprobs_V.argmax())], reference, row.where, scores, probabilities)


def _label(row: Row) -> str:
    if "label" not in row.value:
        raise InputError(
            f"{row.where}: this row has several labels", "classify takes one label a row: give the column `label`"
        )
    return row.value["label"]


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
