"""Regression: squared error of one number a row, from one pooled vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunesmith.data.rows import LARGEST, labels_of
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import LongTexts, read_all, read_text, text_outputs
from tunesmith.types import Batch, Example, LabelCounts, Part, Prediction, Row, SampleSpec, Step, Terms

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer


@OBJECTIVES.register("regress")
class Regress:
    """loss = sum_i (head(pooled_i) - z_i)^2 / N with z = (score - mean) / deviation of the training rows.

    So a rate does not depend on the scores' unit, and an untrained head, which gives 0, answers the mean.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="give each text a number",
        head="pooled",
        formats=frozenset({"score"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("mae", "rmse", "pearson", "spearman"),
        baseline="mean",
    )

    class Options(LongTexts):
        """How a text becomes the vector that its number is read from."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.mean, self.scale = 0.0, 1.0
        self._goes_on = False

    def fit(self, rows: Iterable[Row]) -> None:
        """Mean and deviation of the scores, unless an earlier run's hold. Raises InputError where all are alike."""
        self.options.check()
        if self._goes_on:
            return
        scores = [float(row.value["score"]) for row in rows]
        if (largest := max(map(abs, scores))) > LARGEST:
            raise InputError(
                f"a training row has a score as large as {largest:g}, whose square is no number any more",
                "give scores in a larger unit, or check data.columns",
            )
        self.mean = math.fsum(scores) / len(scores)
        self.scale = math.sqrt(math.fsum((score - self.mean) ** 2 for score in scores) / len(scores))
        if not self.scale > 1e-12 * max(1.0, abs(self.mean)):
            raise InputError(
                f"all {len(scores)} training rows have the score {scores[0]:g}: there is nothing to learn",
                "give rows of other scores, or check data.columns",
            )

    @property
    def answers(self) -> Numbers:
        return Numbers(self.mean, self.scale)

    def describe(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.mean, self.scale = float(description["mean"]), float(description["scale"])
        self._goes_on = True

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("score", 1, hidden=self.options.hidden or 0)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        pieces, cut = read_text(row.value["text"], renderer, self.options)
        return Example(pieces, columns=self.answers.columns(row), cut=cut)

    def normalisers(self, step: Step) -> dict[str, float]:
        return {Numbers.loss: float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        loss_N, metrics = self.answers.losses(text_outputs(policy, "score", batch), batch.columns)
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({Numbers.loss: part}, metrics)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The number of each row, in the unit of the training rows."""
        outputs = read_all(policy, "score", [self.example(row, renderer) for row in rows], spec)
        return [self.answers.prediction(row, output_1) for row, output_1 in zip(rows, outputs, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """The mean of the training rows for every row."""
        del label_counts
        for row in rows:
            self.answers.columns(row)  # rows of the other kind are refused
        return [_number(row, self.mean) for row in rows]


class Numbers:
    """Squared error: each row has a score, which is learned in deviations from the mean."""

    loss: ClassVar[str] = "squared_error"

    def __init__(self, mean: float, scale: float) -> None:
        self.mean, self.scale = mean, scale

    def columns(self, row: Row) -> dict[str, float]:
        if "score" in row.value:
            return {"score": (row.value["score"] - self.mean) / self.scale}
        if labels_of(row.value):
            raise InputError(
                f"{row.where}: this row has a label, and the training rows have a score each",
                "give all rows a `score`, or train on rows such as these",
            )
        return {"score": 0.0}  # a row that is only asked about: nothing is learned from it

    def losses(self, output_N1: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        """The loss of each example [N]."""
        return (output_N1[:, 0] - columns["score"]).square(), {}

    def prediction(self, row: Row, output_1: Tensor) -> Prediction:
        return _number(row, float(output_1) * self.scale + self.mean)


def _number(row: Row, predicted: float) -> Prediction:
    """A number as an answer, beside the row's score if it has one."""
    expected = row.value.get("score")
    scores = {"predicted": predicted} if expected is None else {"predicted": predicted, "expected": float(expected)}
    return Prediction(f"{predicted:.6g}", None if expected is None else f"{expected:.9g}", row.where, scores)
