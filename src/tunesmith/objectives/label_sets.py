"""Answers of a classifier that are sets of labels: a sigmoid each, its loss, and how an example holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.rows import labels_of
from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import PLAIN, Emphasis, any_of
from tunesmith.types import LabelCounts, Prediction, Row

# Stands for the probability of a label that training never saw, here as in the classifier's own predictions.
SMALLEST = float(torch.finfo(torch.float32).tiny)
WORD = 63  # labels in one column: its numbers have 64 bits, one of them for the sign


class LabelSets:
    """Binary cross-entropy, the mean over labels; a row is given every label of probability `threshold` or more.

    Shape letters: N examples, V labels, W columns of an example. A column holds WORD labels, a bit each: 200 labels
    cost an example 32 bytes, not a file of numbers for every label.
    """

    loss: ClassVar[str] = "binary_cross_entropy"

    def __init__(self, labels: Sequence[str], threshold: float, emphasis: Emphasis = PLAIN) -> None:
        self.labels, self.threshold, self._emphasis = labels, threshold, emphasis
        self._place = {label: place for place, label in enumerate(labels)}
        self._columns = [f"labels_{number}" for number in range(-(-len(labels) // WORD))]

    def columns(self, row: Row) -> dict[str, int]:
        if "label" in row.value:
            raise InputError(
                f"{row.where}: this row has one label, and the training rows have lists of them",
                "give all rows `labels`, or all of them a `label`",
            )
        words = dict.fromkeys(self._columns, 0)
        for place in self._known(row):
            words[self._columns[place // WORD]] |= 1 << place % WORD
        return words

    def losses(self, logits_NV: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        actual_NV = self.targets(columns)
        loss_N = any_of(logits_NV, actual_NV, self._emphasis)
        said_NV = logits_NV.sigmoid() >= self.threshold
        right, hits = (said_NV == actual_NV).all(-1).sum(), (said_NV & actual_NV).sum()
        return loss_N, {
            "micro_f1": (2 * float(hits), float(said_NV.sum() + actual_NV.sum())),
            "accuracy": (float(right), float(len(loss_N))),
        }

    def targets(self, columns: Mapping[str, Tensor]) -> Tensor:
        """[N, V]: which examples have which labels."""
        words_NW = torch.stack([columns[name] for name in self._columns], dim=-1)
        bits = torch.arange(WORD, device=words_NW.device)
        return (words_NW[..., None] >> bits & 1).flatten(1)[:, : len(self.labels)].bool()

    def prediction(self, row: Row, logits_V: Tensor) -> Prediction:
        shares = logits_V.sigmoid().tolist()
        actual_V = torch.zeros_like(logits_V)
        actual_V[self._known(row)] = 1.0
        nll = float(F.binary_cross_entropy_with_logits(logits_V, actual_V, reduction="sum"))
        chosen = [label for label, share in zip(self.labels, shares, strict=True) if share >= self.threshold]
        return self._answer(row, chosen, dict(zip(self.labels, shares, strict=True)), nll)

    def unread(self, counts: LabelCounts, rows: Sequence[Row]) -> list[Prediction]:
        """The labels that more than half of the training rows have, else the most frequent, for every row.

        Probabilities are the shares of training rows. Ties go to the first label in code-point order.
        """
        shares = {label: counts.of.get(label, 0) / counts.rows for label in self.labels}
        chosen = [label for label, share in shares.items() if share > 0.5]
        chosen = chosen or [max(shares, key=lambda label: shares[label])]
        found: list[Prediction] = []
        for row in rows:
            actual = {self.labels[place] for place in self._known(row)}
            right = (share if label in actual else 1 - share for label, share in shares.items())
            found.append(self._answer(row, chosen, shares, -math.fsum(math.log(max(p, SMALLEST)) for p in right)))
        return found

    def _known(self, row: Row) -> list[int]:
        """The places of the row's labels, without those that training never saw."""
        return [self._place[label] for label in labels_of(row.value) if label in self._place]

    def _answer(self, row: Row, chosen: Sequence[str], shares: Mapping[str, float], nll: float) -> Prediction:
        """`nll`: of the decisions on all labels of training; a label that it never saw is one more, and wrong."""
        expected = sorted(labels_of(row.value)) if row.value.keys() & {"label", "labels"} else None
        scores: dict[str, float] = {}
        if expected is not None:
            unseen = sum(label not in self._place for label in expected)
            scores = {"nll": nll - unseen * math.log(SMALLEST), "tokens": float(len(self.labels) + unseen)}
        reference = None if expected is None else _text(expected)
        return Prediction(_text(chosen), reference, row.where, scores, shares, multi_label=True)


def _text(labels: Sequence[str]) -> str:
    return json.dumps(labels, ensure_ascii=False)
