"""Extractive question answering: where in a text its answer begins and ends, in overlapping windows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.grouped_softmax import grouped_logprobs
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe_keys import Positive, Strict
from tunesmith.types import (
    WINDOW,
    Batch,
    Example,
    LabelCounts,
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
    from tunesmith.data.two_texts import Window

LONGEST_ANSWER = 30  # tokens
START, END = 1, 2  # bits of a position's label: the answer begins there, it ends there
_SENTENCE = re.compile(r"[^.!?\u3002]*[.!?\u3002]*\s*")
_WORD = re.compile(r"\w+")
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _View:
    """A window as the head reads it: of its candidates where they are in it, and where in the context.

    One candidate is nowhere in the context: it says that the window holds no answer.
    """

    window: Window
    places: Sequence[int]
    characters: Sequence[Range | None]

    @property
    def nowhere(self) -> int:
        return self.characters.index(None)

    def find(self, answer: Range) -> Range | None:
        """The first and last candidate that hold something of the answer, if any do."""
        held = [i for i, at in enumerate(self.characters) if at and at[0] < answer[1] and answer[0] < at[1]]
        return (held[0], held[-1]) if held else None

    def text(self, found: Range) -> Range:
        """The characters from one candidate's first to another's last."""
        first, last = self.characters[found[0]], self.characters[found[1]]
        assert first is not None
        assert last is not None
        return first[0], last[1]

    def piece(self, answer: Range | None) -> Piece:
        """The window, labelled with the first and last candidate of its answer."""
        labels_T = np.full(len(self.window.input_ids), -1, np.int32)
        labels_T[list(self.places)] = 0
        start, end = answer or (self.nowhere, self.nowhere)
        labels_T[self.places[start]] |= START
        labels_T[self.places[end]] |= END
        return Piece(self.window.input_ids, role=WINDOW, labels_T=labels_T, typed_from=self.window.typed_from)


@OBJECTIVES.register("span")
class Span:
    """loss = - sum_w (log p_start(s_w) + log p_end(e_w)) / 2W, over windows w; p is a softmax over the window's tokens.

    As in Devlin et al. 2019 (arXiv 1810.04805), section 4.2 and 4.3: a head of two outputs reads each token of the
    context. A window that does not hold the whole answer points to a position of its own, CLS in an encoder and the
    last token in a decoder, with both. Of several answers the first is learned. The answer is the most probable span
    of all windows; where rows without an answer were learned, of those that prefer it to none.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="answer a question by a stretch of a text, word for word, or say that the text does not answer it",
        head="pooled",
        formats=frozenset({"span"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        windows=True,
        metrics=("span_f1", "span_exact_match"),
        baseline="overlap",
        vectors="token",
        asks=(("question", "context"),),
    )

    class Options(Strict):
        """How a long context is read, and which spans may be answers."""

        stride: Positive | None = Field(
            None,
            description="tokens from the beginning of a window to the next one's; a third of train.sequence_length "
            "by default, and never more than fits beside the question",
        )
        max_answer_tokens: Positive = Field(LONGEST_ANSWER, description="the longest answer that is given")
        hidden: Positive | None = Field(None, description="width of a hidden layer in the head; a linear head without")

    def __init__(self, options: Any) -> None:
        self.options = options
        self.unanswerable = False
        self._goes_on = False

    def fit(self, rows: Iterable[Row]) -> None:
        """Whether there are rows without an answer, so that none is an answer too.

        Raises InputError where there are and an earlier run's head, which goes on, learned from none.
        """
        found = any(not row.value["answers"] for row in rows)
        if self._goes_on and found and not self.unanswerable:
            raise InputError(
                "the training rows hold questions without an answer, which the earlier run's head does not know",
                "leave these rows out, or name the base itself as model",
            )
        self.unanswerable = self.unanswerable or found

    def describe(self) -> dict[str, Any]:
        return {"unanswerable": self.unanswerable}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.unanswerable, self._goes_on = bool(description["unanswerable"]), True

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("span", 2, ("start", "end"), self.options.hidden or 0, per_token=True)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        """An answer that no window holds whole counts as cut."""
        views, cut = self._views(row, renderer)
        found = [view.find(_of_characters(row)) for view in views]
        texts = [view.text(at) for view, at in zip(views, found, strict=True) if at is not None]
        whole = (min(a for a, _ in texts), max(b for _, b in texts)) if texts else None
        held = [at if at and view.text(at) == whole else None for view, at in zip(views, found, strict=True)]
        pieces = tuple(view.piece(at) for view, at in zip(views, held, strict=True))
        return Example(pieces, cut=cut, cut_trained=int(bool(row.value["answers"]) and not any(held)))

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"cross_entropy": float(max(1, sum(len(batch.segments) for batch in step.batches)))}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        logits_U2, sizes_W = _logits(policy, batch)
        logprobs_U2 = grouped_logprobs(logits_U2, sizes_W)
        label_U = batch.target_BT.flatten()[batch.unit_U]
        starts_U, ends_U = (label_U & START) > 0, (label_U & END) > 0
        loss_W = -(logprobs_U2[starts_U, 0] + logprobs_U2[ends_U, 1]) / 2
        return Terms({"cross_entropy": Part(loss_W, torch.ones_like(loss_W), batch.example_U[starts_U])})

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The best span of each row, exactly as its context has it; "" for none."""
        views = [(index, view) for index, row in enumerate(rows) for view in self._views(row, renderer)[0]]
        examples = ExampleList([Example((view.piece(None),)) for _, view in views])
        best: list[tuple[float, Range]] = [(-np.inf, (0, 0))] * len(rows)
        policy.eval()
        with torch.no_grad():
            for batch in batches(examples, spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad):
                logits_U2, sizes_W = _logits(policy, place(batch, policy.device))
                parts = grouped_logprobs(logits_U2, sizes_W).cpu().split(sizes_W.tolist())
                for segment, logprobs_K2 in zip(batch.segments, parts, strict=True):
                    index, view = views[batch.examples[segment.example]]
                    best[index] = max(best[index], self._best(view, logprobs_K2), key=lambda found: found[0])
        return [_prediction(row, row.value["context"][a:b]) for row, (_, (a, b)) in zip(rows, best, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """The sentence of the context that has most of the question's words; of equals the first."""
        del label_counts
        return [_prediction(row, _nearest_sentence(row.value["context"], row.value["question"])) for row in rows]

    def _views(self, row: Row, renderer: Renderer) -> tuple[list[_View], int]:
        windows, cut = renderer.passages(row.value["question"], row.value["context"], self.options.stride)
        in_front = renderer.kind == "encoder"
        return [_view(window, row.value["context"], in_front) for window in windows], cut

    def _best(self, view: _View, logprobs_K2: Tensor) -> tuple[float, Range]:
        """The most probable span of a window with its log-probability; -inf where it prefers to give none."""
        first = int(view.nowhere == 0)
        start_K, end_K = logprobs_K2[first : first + len(view.places) - 1].double().unbind(-1)
        spans_KK = start_K[:, None] + end_K
        allowed_KK = torch.ones_like(spans_KK, dtype=torch.bool).triu().tril(self.options.max_answer_tokens - 1)
        spans_KK = spans_KK.masked_fill(~allowed_KK, -torch.inf)
        if not spans_KK.numel():
            return -np.inf, (0, 0)
        value, (start, end) = float(spans_KK.max()), divmod(int(spans_KK.argmax()), len(start_K))
        if self.unanswerable and value <= float(logprobs_K2[view.nowhere].double().sum()):
            return -np.inf, (0, 0)
        return value, view.text((first + start, first + end))


def _logits(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """[U, 2] of the head at the candidates, and how many of them each window has, in their order."""
    hidden_BTD = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    window_U = batch.streams["input"].segment_ids_BT.flatten()[batch.unit_U]
    sizes_W = torch.unique_consecutive(window_U, return_counts=True)[1]
    return policy.heads["span"](hidden_BTD.flatten(0, 1).index_select(0, batch.unit_U)), sizes_W


def _view(window: Window, context: str, in_front: bool) -> _View:
    """Candidates are the tokens of the context that are more than white space, and CLS, or the last token of all."""
    nowhere = 0 if in_front else len(window.input_ids) - 1
    found: list[tuple[int, Range | None]] = [(nowhere, None)]
    for at, (start, stop) in enumerate(window.characters, window.begin):
        text = context[start:stop]
        if text.strip():
            found.append((at, (start + len(text) - len(text.lstrip()), start + len(text.rstrip()))))
    found.sort(key=lambda candidate: candidate[0])
    return _View(window, [at for at, _ in found], [characters for _, characters in found])


def _of_characters(row: Row) -> Range:
    """Where the first answer stands in the context, white space around it left out; an empty stretch for none."""
    for answer in row.value["answers"][:1]:
        text, start = answer["text"], answer["start"]
        return start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    return 0, 0


def _prediction(row: Row, output: str) -> Prediction:
    answers = row.value.get("answers")
    texts = [None] if answers is None else list(dict.fromkeys(answer["text"] for answer in answers)) or [""]
    return Prediction(output, texts[0], row.where, other_references=tuple(str(text) for text in texts[1:]))


def _nearest_sentence(context: str, question: str) -> str:
    asked = set(_WORD.findall(question.casefold()))
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(context) if sentence.strip()]
    return max(sentences, key=lambda sentence: len(asked & set(_WORD.findall(sentence.casefold()))))
