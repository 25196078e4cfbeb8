"""Classification: cross-entropy of one label a row, from one pooled vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import PooledOptions
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
    Want,
)

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

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
        logits_NV, label_N = self._logits(policy, batch), batch.columns["label"]
        loss_N = F.cross_entropy(logits_NV, label_N, reduction="none")
        right = float((logits_NV.argmax(-1) == label_N).sum())
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({"cross_entropy": part}, {"accuracy": (right, float(len(loss_N)))})

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable label of each row, with all probabilities."""
        examples = ExampleList([self.example(row, renderer) for row in rows])
        found: dict[int, Prediction] = {}
        policy.eval()
        with torch.no_grad():
            for batch in batches(examples, spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad):
                logprobs_NV = self._logits(policy, place(batch, policy.device)).log_softmax(-1).cpu()
                for index, logprobs_V in zip(batch.examples, logprobs_NV, strict=True):
                    found[index] = self._prediction(rows[index], logprobs_V)
        return [found[index] for index in range(len(rows))]

    def _logits(self, policy: Policy, batch: Batch) -> torch.Tensor:
        pooled_SD = policy.score(batch, Want(pooled=True)).pooled_SD
        return policy.heads["label"](pooled_SD)

    def _prediction(self, row: Row, logprobs_V: torch.Tensor) -> Prediction:
        reference = row.value.get("label")
        scores: dict[str, float] = {}
        if reference is not None:
            # A label that training never saw has no probability: the smallest positive number stands for it.
            known = reference in self.labels
            nll = (
                -float(logprobs_V[self.labels.index(reference)])
                if known
                else -float(torch.tensor(torch.finfo().tiny).log())
            )
            scores = {"nll": nll, "tokens": 1.0}
        probabilities = dict(zip(self.labels, logprobs_V.exp().tolist(), strict=True))
        return Prediction(self.labels[int(logprobs_V.argmax())], reference, row.where, scores, probabilities)


def _label(row: Row) -> str:
    if "label" not in row.value:
        raise InputError(
            f"{row.where}: this row has several labels", "classify takes one label a row: give the column `label`"
        )
    return row.value["label"]
