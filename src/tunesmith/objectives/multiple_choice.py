"""Multiple choice: which of the texts that a row gives is right, each scored beside the question."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.losses.grouped_softmax import grouped_logprobs
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import PooledOptions, head_outputs
from tunesmith.types import Batch, Example, LabelCounts, Part, Piece, Prediction, Row, SampleSpec, Step, Terms

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

CHOICE = "choice"


@OBJECTIVES.register("multiple_choice")
class MultipleChoice:
    """loss = - sum_i log softmax_c(head(pooled(question_i, choice_ic)))[right_i] / N, over the choices c of each row.

    As for SWAG in Devlin et al. 2019 (arXiv 1810.04805), section 4.4: each choice is read behind the question, as the
    second of two texts. With a context, that is the first text, and the question stands before each choice (Lai et
    al. 2017, arXiv 1704.04683). Rows may differ in how many choices they have.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="choose the right one of the answers that a question comes with",
        head="pooled",
        formats=frozenset({"choices"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("accuracy", "ece", "loss"),
        baseline="chance",
        vectors="texts",
        asks=(("question", "choices"),),
    )

    class Options(PooledOptions):
        """How a question with a choice becomes the vector that its score is read from."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def fit(self, rows: Iterable[Row]) -> None:
        """Nothing: what may be chosen stands in each row."""

    def describe(self) -> dict[str, Any]:
        return {}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """Nothing: see `fit`."""

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("choices", 1, hidden=self.options.hidden or 0)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        """A piece for each choice; a row that is only asked about has no answer, and nothing is learned from it."""
        question, context = row.value["question"], row.value.get("context")
        texts = [
            (question, choice) if context is None else (context, f"{question} {choice}")
            for choice in row.value["choices"]
        ]
        encoded = [renderer.pair(*pair) for pair in texts]
        pieces = tuple(Piece(one.input_ids, role=CHOICE, typed_from=one.typed_from) for one in encoded)
        return Example(pieces, {"answer": row.value.get("answer", 0)}, cut=sum(one.cut for one in encoded))

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"cross_entropy": float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        logprobs_S, sizes_N = _logprobs(policy, batch)
        right_N = sizes_N.cumsum(0) - sizes_N + batch.columns["answer"]
        loss_N = -logprobs_S[right_N]
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        best_N = torch.segment_reduce(logprobs_S.detach(), "max", lengths=sizes_N)
        hits = float((logprobs_S.detach()[right_N] == best_N).sum())
        return Terms({"cross_entropy": part}, {"accuracy": (hits, float(len(loss_N)))})

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable choice of each row, with the probabilities of all."""
        examples = ExampleList([self.example(row, renderer) for row in rows])
        found: dict[int, list[float]] = {}
        policy.eval()
        with torch.no_grad():
            for batch in batches(examples, spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad):
                logprobs_S, sizes_N = _logprobs(policy, place(batch, policy.device))
                parts = logprobs_S.double().cpu().split(sizes_N.tolist())
                found.update(zip(batch.examples, (part.tolist() for part in parts), strict=True))
        return [_prediction(row, found[index]) for index, row in enumerate(rows)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """A choice drawn at random, always the same for the same row; all are as probable."""
        del label_counts
        return [_guess(row) for row in rows]


def _logprobs(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """[S] of each choice among those of its row, and how many choices each row has."""
    counts = [0] * len(batch.examples)
    for segment in batch.segments:
        counts[segment.example] += 1
    sizes_N = torch.tensor(counts, device=policy.device)
    return grouped_logprobs(head_outputs(policy, "choices", batch), sizes_N)[:, 0], sizes_N


def _prediction(row: Row, logprobs: Sequence[float], chosen: int | None = None) -> Prediction:
    choices, answer = row.value["choices"], row.value.get("answer")
    best = max(range(len(choices)), key=lambda index: logprobs[index]) if chosen is None else chosen
    probabilities = dict(zip(choices, map(math.exp, logprobs), strict=True))
    scores = {"choices": float(len(choices))}
    if answer is None:
        return Prediction(choices[best], None, row.where, scores, probabilities)
    scores |= {"nll": -logprobs[answer], "tokens": 1.0}
    return Prediction(choices[best], choices[answer], row.where, scores, probabilities)


def _guess(row: Row) -> Prediction:
    choices = row.value["choices"]
    drawn = hashlib.sha256(
        "\x1f".join([row.value["question"], row.value.get("context", ""), *choices]).encode()
    ).digest()
    even = -math.log(len(choices))
    return _prediction(row, [even] * len(choices), int.from_bytes(drawn[:8], "big") % len(choices))
