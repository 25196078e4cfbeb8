"""Classification without a head: the label whose text a language model finds most probable behind a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.answer_choices import Ids, beginning, endings
from tunesmith.data.pack import collate, place
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import PLAIN
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.classify import Classify, OneLabel
from tunesmith.objectives.imbalance import Imbalance
from tunesmith.objectives.pooled import read_each
from tunesmith.types import Batch, Example, LabelCounts, Part, Piece, Prediction, Row, SampleSpec, Step, Terms, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

PROMPT, LABEL = "prompt", "label"
TEXT, LABELS = "{text}", "{labels}"
LISTED = 30  # labels: more of them would be most of what is read
ASKED = "Which of these labels fits the text: {labels}?\n\nText: {text}\n\nAnswer with the label alone."
UNLISTED = "Which label fits the text?\n\nText: {text}\n\nAnswer with the label alone."


@OBJECTIVES.register("classify_lm")
class ClassifyLm:
    """loss = - sum_i log softmax_k(s_ik)[label_i] / N, s_ik = sum_t log p(y_kt | prompt_i, y_k<t) over k's tokens.

    The end of the answer is one of the tokens, so a label that another one begins with has its due. With the mean over
    tokens in place of the sum it is L_LN of Liu et al. 2022 (arXiv 2205.05638). The labels compete, as in
    Schick and Schuetze 2021 (arXiv 2001.07676): the likelihood of the right one alone would leave the others as
    probable as they are, and spend itself on what all labels have in common. Weights, focus and smoothing of labels
    are those of `losses.class_cross_entropy`.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="give each text the label that a language model finds most probable as its answer to a prompt",
        head="lm",
        formats=frozenset({"label"}),
        kinds=frozenset({"decoder"}),
        coupling="example",
        trains_tokens=True,
        metrics=("accuracy", "macro_f1", "roc_auc", "ece", "loss"),
        generates=False,
        branches=True,
    )

    class Options(Imbalance):
        """What the model is asked, how a label's tokens become its score, and how much each label counts."""

        prompt: str | None = Field(
            None,
            description="what is asked, with {text} where the row's text goes and {labels} where all labels do; by "
            f"default a question that lists up to {LISTED} labels and no more than these",
            examples=["{text}\n\nIs this spam or ham?"],
        )
        score: Literal["sum", "mean"] = Field(
            "sum",
            description="a label's log-probability, or its mean over the label's tokens, by which a long label is no "
            "less probable than a short one",
        )

    def __init__(self, options: Any) -> None:
        self.options = options
        self.labels: list[str] = []
        self._around: tuple[str, str] = ("", "")
        self._emphasis = PLAIN

    def fit(self, rows: Iterable[Row]) -> None:
        """The label set, in code-point order, and the prompt.

        Raises InputError for lists of labels, for one label alone, and for a prompt that does not ask of a text.
        """
        known = Classify(Classify.Options.model_validate(self.options.model_dump(include=set(Imbalance.model_fields))))
        known.fit(rows)
        if "multi_label" in known.describe():
            raise InputError(
                "the training rows have lists of labels, and classify_lm gives each text the one that is most probable",
                "set objective to classify, which gives any of them",
            )
        asked = self.options.prompt or (ASKED if len(known.labels) <= LISTED else UNLISTED)
        if asked.count(TEXT) != 1:
            raise InputError(
                f"objective.prompt has {TEXT} {asked.count(TEXT)} times",
                f"write it once, where the text of the row goes: {UNLISTED.splitlines()[2]!r}",
            )
        before, after = (part.replace(LABELS, ", ".join(known.labels)) for part in asked.split(TEXT))
        self.labels, self._around, self._emphasis = known.labels, (before, after), known.emphasis

    def describe(self) -> dict[str, Any]:
        return {"labels": self.labels, "prompt": list(self._around)}

    def adopt(self, description: Mapping[str, Any]) -> None:
        before, after = description["prompt"]
        self.labels, self._around = list(description["labels"]), (before, after)

    def heads(self) -> list[HeadSpec]:
        return []

    def example(self, row: Row, renderer: Renderer) -> Example:
        """The prompt, and what follows it for each label; of a text that is too long the end is cut."""
        labels = tuple(self.labels)
        prompt_T, cut = beginning(self._around, row.value["text"], labels, renderer)
        answers = [Piece(ids_T, np.ones(len(ids_T), np.float32), LABEL) for ids_T in endings(renderer, labels)]
        return Example((Piece(prompt_T, role=PROMPT), *answers), self._answers.columns(row), cut)

    def normalisers(self, step: Step) -> dict[str, float]:
        return {OneLabel.loss: float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        loss_N, metrics = self._answers.losses(self.scores(policy, batch), batch.columns)
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({OneLabel.loss: part}, metrics)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable label of each row, with the probabilities of all."""
        del spec
        alone = SampleSpec(0, batch_tokens=1)  # each row by itself, so that its prompt runs once
        scores = read_each(policy, self.scores, [self.example(row, renderer) for row in rows], alone)
        return [self._answers.prediction(row, score_K) for row, score_K in zip(rows, scores, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """The most frequent label of training for every row: such answers as the model will give."""
        for row in rows:
            self._answers.columns(row)  # lists of labels are refused
        return self._answers.unread(label_counts, rows) if label_counts else None

    def scores(self, policy: Policy, batch: Batch) -> Tensor:
        """[N, K]: of each label behind each prompt."""
        scores = policy.score(place(_behind_prompts(policy, batch), policy.device), Want(logprobs=True))
        assert scores.logprob_U is not None
        sizes_S = torch.tensor([s.length for s in batch.segments if s.role == LABEL], device=policy.device)
        reduction = "sum" if self.options.score == "sum" else "mean"
        score_S = torch.segment_reduce(scores.logprob_U, reduction, lengths=sizes_S, unsafe=True)
        return score_S.view(len(batch.examples), -1)

    @property
    def _answers(self) -> OneLabel:
        return OneLabel(self.labels, self._emphasis)


def _behind_prompts(policy: Policy, batch: Batch) -> Batch:
    """The batch with each label's tokens behind those of its row's prompt."""
    ids_BT = batch.streams["input"].input_ids_BT.cpu().numpy().astype(np.int32)
    parts: list[list[Ids]] = [[] for _ in batch.examples]
    for segment in batch.segments:
        parts[segment.example].append(ids_BT[segment.row, segment.start : segment.stop])
    examples = [Example(tuple(_joined(prompt_T, own_T) for own_T in endings)) for prompt_T, *endings in parts]
    return collate(examples, batch.examples, packed=policy.packed, pad_id=policy.tokens.pad)


def _joined(prompt_T: Ids, own_T: Ids) -> Piece:
    weights_T = np.concatenate([np.zeros(len(prompt_T), np.float32), np.ones(len(own_T), np.float32)])
    return Piece(np.concatenate([prompt_T, own_T]), weights_T, LABEL)
