"""Tagging: cross-entropy of one tag a word, read from the hidden state of the word's first token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import PLAIN, one_of
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.imbalance import Imbalance
from tunesmith.recipe_keys import Positive
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
    from tunesmith.data.encoded import Words


@OBJECTIVES.register("tag")
class Tag:
    """loss = - sum_w log softmax(head(h_first(w)))[tag_w] / W, over words; a word's other tokens carry no tag.

    As in Devlin et al. 2019 (arXiv 1810.04805), section 5.3. A text longer than train.sequence_length is read in
    windows that begin with a word. A word of which the tokenizer leaves no token is given the most frequent tag.
    Weights, focus and smoothing of tags are those of `losses.class_cross_entropy`.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="give each word of a text a tag: named entities, parts of speech",
        head="pooled",
        formats=frozenset({"tags"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="token",
        trains_tokens=True,
        windows=True,
        metrics=("entity_f1", "entity_precision", "entity_recall", "tag_accuracy"),
        baseline="frequent",
        vectors="token",
        asks=(("text",), ("tokens",)),
    )

    class Options(Imbalance):
        """How a tag is read from a token's hidden state, and how much each tag counts."""

        hidden: Positive | None = Field(None, description="width of a hidden layer in the head; a linear head without")

    def __init__(self, options: Any) -> None:
        self.options = options
        self.tags: list[str] = []
        self.usual = ""
        self.words: dict[str, str] = {}
        self._goes_on = False
        self._emphasis = PLAIN

    def fit(self, rows: Iterable[Row]) -> None:
        """The tag set, in code-point order, and each word's most frequent tag where that is not the most frequent one.

        Where an earlier run's head goes on, its tags and words hold. Raises InputError for fewer than two tags, and
        for a tag that the earlier run did not have.
        """
        of_word: dict[str, Counter[str]] = {}
        for row in rows:
            for word, tag in zip(row.value["tokens"], row.value["tags"], strict=True):
                of_word.setdefault(word, Counter())[tag] += 1
        total = Counter[str]()
        for counts in of_word.values():
            total.update(counts)
        if self._goes_on:
            if new := sorted(total.keys() - set(self.tags)):
                raise InputError(
                    f"the training rows have the tag {new[0]!r}, which the earlier run's head does not know",
                    "train on the same tags, or name the base itself as model",
                )
            self._emphasis = self.options.emphasis(self.tags, total)
            return
        self.tags = sorted(total)
        if len(self.tags) < 2:
            raise InputError(
                f"the training rows hold one tag ({', '.join(self.tags)}); tagging needs two or more",
                "add rows with other tags, or check data.columns",
            )
        self.usual = _most_frequent(total)
        found = {word: _most_frequent(counts) for word, counts in sorted(of_word.items())}
        self.words = {word: tag for word, tag in found.items() if tag != self.usual}
        self._emphasis = self.options.emphasis(self.tags, total)

    def describe(self) -> dict[str, Any]:
        return {"tags": self.tags, "usual": self.usual, "words": self.words}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.tags, self.usual = list(description["tags"]), str(description["usual"])
        self.words = dict(description["words"])
        self._goes_on = True

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("tag", len(self.tags), tuple(self.tags), self.options.hidden or 0, per_token=True)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        """A held-out word of a tag that training never saw has no loss."""
        index = {tag: i for i, tag in enumerate(self.tags)}
        known = [index.get(tag, -1) for tag in row.value["tags"]]
        return Example(tuple(_piece(window, known) for window in renderer.words(row.value["tokens"])))

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"cross_entropy": float(max(1, sum(len(batch.unit_U) for batch in step.batches)))}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        logits_UV = _logits(policy, batch)
        tag_U = batch.target_BT.flatten()[batch.unit_U]
        loss_U = one_of(logits_UV, tag_U, self._emphasis)
        right = float((logits_UV.argmax(-1) == tag_U).sum())
        part = Part(loss_U, torch.ones_like(loss_U), batch.example_U)
        return Terms({"cross_entropy": part}, {"tag_accuracy": (right, float(len(loss_U)))})

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The most probable tag of each word, one after the other; the words of a plain text stand between spaces."""
        found = [[self.usual] * len(_words(row)) for row in rows]
        windows = [
            (tags, window) for tags, row in zip(found, rows, strict=True) for window in renderer.words(_words(row))
        ]
        examples = ExampleList([Example((_piece(window, [0] * len(tags)),)) for tags, window in windows])
        policy.eval()
        with torch.no_grad():
            for batch in batches(examples, spec.batch_tokens, packed=policy.packed, pad_id=policy.tokens.pad):
                best_U = _logits(policy, place(batch, policy.device)).argmax(-1).cpu()
                for position, number in enumerate(batch.examples):
                    tags, window = windows[number]
                    for word, best in zip(window.first, best_U[batch.example_U == position].tolist(), strict=True):
                        tags[word] = self.tags[best]
        return [_prediction(row, tags) for row, tags in zip(rows, found, strict=True)]

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """Each word's most frequent tag of training; the most frequent tag of all for a word that was not there."""
        del label_counts
        return [_prediction(row, [self.words.get(word, self.usual) for word in _words(row)]) for row in rows]


def _logits(policy: Policy, batch: Batch) -> Tensor:
    """[U, tags] of the head at the units: rather few positions of all."""
    hidden_BTD = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    return policy.heads["tag"](hidden_BTD.flatten(0, 1).index_select(0, batch.unit_U))


def _piece(window: Words, known: Sequence[int]) -> Piece:
    """A window whose words' first tokens have the words' classes."""
    labels_T = np.full(len(window.input_ids), -1, np.int32)
    for word, position in window.first.items():
        labels_T[position] = known[word]
    return Piece(window.input_ids, role=WINDOW, labels_T=labels_T)


def _words(row: Row) -> list[str]:
    return row.value["tokens"] if "tokens" in row.value else row.value["text"].split()


def _prediction(row: Row, tags: Sequence[str]) -> Prediction:
    expected = row.value.get("tags")
    scores = {"words": float(len(tags))}
    return Prediction(" ".join(tags), None if expected is None else " ".join(expected), row.where, scores)


def _most_frequent(counts: Mapping[str, int]) -> str:
    """Of equals the first in code-point order."""
    return max(sorted(counts), key=lambda tag: counts[tag])
