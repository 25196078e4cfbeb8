"""Classification: one label a row or several, from one pooled vector."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.rows import labels_of
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import PLAIN, Emphasis, one_of
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.imbalance import Imbalance
from tunesmith.objectives.label_sets import SMALLEST, LabelSets
from tunesmith.objectives.pooled import LongTexts, read_all, read_text, text_outputs
from tunesmith.types import Batch, Example, LabelCounts, Part, Prediction, Row, SampleSpec, Step, Terms

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

UNKNOWN = -1  # the index of a label that training never saw
NEVER = -math.log(SMALLEST)  # nats: such a label has no probability, and the smallest positive number stands for it
THRESHOLD = 0.5
Metrics = dict[str, tuple[float, float]]


class Answers(Protocol):
    """What the head's outputs say: one label of several, or any of them."""

    loss: ClassVar[str]

    def columns(self, row: Row) -> Mapping[str, float | int]:
        """What an example holds of its row's labels."""
        ...

    def losses(self, logits_NV: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """The loss of each example [N], and what else is worth a curve."""
        ...

    def prediction(self, row: Row, logits_V: Tensor) -> Prediction: ...
    def unread(self, counts: LabelCounts, rows: Sequence[Row]) -> list[Prediction]: ...


@OBJECTIVES.register("classify")
class Classify:
    """loss = sum_i l(head(pooled_i), labels_i) / N; the label set is that of the training rows.

    l = - log softmax(logits)[label] where rows have a `label`. Where they have a list of `labels`, it is the mean over
    labels of the binary cross-entropy of sigmoid(logit) (Nam et al. 2014, arXiv 1312.5419). With weights, focus or
    smoothing it is that of `losses.class_cross_entropy`.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="give each text one label of those seen in training, or several",
        head="pooled",
        formats=frozenset({"label"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("micro_f1", "accuracy", "macro_f1", "roc_auc", "ece", "loss"),
        baseline="majority",
    )

    class Options(LongTexts, Imbalance):
        """How a text becomes the vector that its labels are read from, when they are given, and how much they count."""

        threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
            None,
            description="the probability from which on a label is given; only for rows of `labels`; 0.5 by default",
        )

    def __init__(self, options: Any) -> None:
        self.options = options
        self.labels: list[str] = []
        self._multi_label = False
        self.emphasis = PLAIN

    def fit(self, rows: Iterable[Row]) -> None:
        """The label set, in code-point order, and whether rows have lists of them.

        Raises InputError where there is nothing to tell apart: fewer than two labels, or the same list everywhere.
        """
        self.options.check()
        answers = Counter[tuple[str, ...]]()
        multi_label = False
        for row in rows:
            multi_label = multi_label or "labels" in row.value
            answers[tuple(sorted(labels_of(row.value)))] += 1
        counts = Counter[str]()
        for answer, times in answers.items():
            counts.update(dict.fromkeys(answer, times))
        labels = sorted(counts)
        if len(answers) < 2:
            raise InputError(
                f"the training rows hold one {'list of labels' if multi_label else 'label'} "
                f"({', '.join(labels) or 'none'}); classification needs two or more",
                "add rows of another label, or check data.columns",
            )
        if self.options.threshold is not None and not multi_label:
            raise InputError(
                "objective.threshold does nothing where each row has one label: the most probable one is given",
                "leave it out, or give rows with a list of `labels`",
            )
        self.labels, self._multi_label = labels, multi_label
        self.emphasis = self.options.emphasis(labels, counts, answers.total() if multi_label else None)

    def describe(self) -> dict[str, Any]:
        return {"labels": self.labels, **({"multi_label": True} if self._multi_label else {})}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.labels, self._multi_label = list(description["labels"]), description.get("multi_label", False)

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("label", len(self.labels), tuple(self.labels), self.options.hidden or 0)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        pieces, cut = read_text(row.value["text"], renderer, self.options)
        return Example(pieces, columns=self.answers.columns(row), cut=cut)

    def normalisers(self, step: Step) -> dict[str, float]:
        return {self.answers.loss: float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        answers = self.answers
        loss_N, metrics = answers.losses(text_outputs(policy, "label", batch), batch.columns)
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({answers.loss: part}, metrics)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable label of each row, or all that are probable enough; with all probabilities."""
        answers = self.answers
        logits = read_all(policy, "label", [self.example(row, renderer) for row in rows], spec)
        return [answers.prediction(row, logits_V) for row, logits_V in zip(rows, logits, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """The most frequent label of training for every row; None where the counts are not known.

        Of lists of labels, those that more than half of the rows have take its place, if there are any.
        """
        for row in rows:
            self.answers.columns(row)  # rows of the other kind are refused
        return self.answers.unread(label_counts, rows) if label_counts else None

    @property
    def answers(self) -> Answers:
        if self._multi_label:
            return LabelSets(self.labels, self.options.threshold or THRESHOLD, self.emphasis)
        return OneLabel(self.labels, self.emphasis)


class OneLabel:
    """Cross-entropy: each row has exactly one label."""

    loss: ClassVar[str] = "cross_entropy"

    def __init__(self, labels: Sequence[str], emphasis: Emphasis = PLAIN) -> None:
        self.labels, self._emphasis = labels, emphasis

    def columns(self, row: Row) -> dict[str, int]:
        other = {"labels": "a list of labels", "score": "a score"}
        if found := next((said for key, said in other.items() if key in row.value), None):
            raise InputError(
                f"{row.where}: this row has {found}, and the training rows have one label each",
                "give all rows a `label`, or train on rows such as these",
            )
        known = "label" in row.value and row.value["label"] in self.labels
        return {"label": self.labels.index(row.value["label"]) if known else UNKNOWN}

    def losses(self, logits_NV: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        label_N = columns["label"]
        found_N = one_of(logits_NV, label_N, self._emphasis, ignore=UNKNOWN)
        loss_N = torch.where(label_N == UNKNOWN, NEVER, found_N)
        right = float((logits_NV.argmax(-1) == label_N).sum())
        return loss_N, {"accuracy": (right, float(len(loss_N)))}

    def prediction(self, row: Row, logits_V: Tensor) -> Prediction:
        logprobs_V, reference = logits_V.log_softmax(-1), row.value.get("label")
        scores: dict[str, float] = {}
        if reference is not None:
            nll = -float(logprobs_V[self.labels.index(reference)]) if reference in self.labels else NEVER
            scores = {"nll": nll, "tokens": 1.0}
        probabilities = dict(zip(self.labels, logprobs_V.exp().tolist(), strict=True))
        return Prediction(self.labels[int(logprobs_V.argmax())], reference, row.where, scores, probabilities)

    def unread(self, counts: LabelCounts, rows: Sequence[Row]) -> list[Prediction]:
        return majority(counts.of, rows)


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
