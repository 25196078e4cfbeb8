"""Metrics of tagged words: entities found whole, and single tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, has_references, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction

OUTSIDE = "O"
SCHEME = re.compile(
    r"O|[BIESLU](-.*)?"
)  # BIO, and its kin with marks of an entity's end (E, L) and of a lone word (S, U)
OPENS, CLOSES = frozenset("BSU"), frozenset("ESLU")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sequence of tags: type, first word, and the word behind the last.

    As conlleval reads them (Tjong Kim Sang and De Meulder 2003) and seqeval by default: an entity begins at a B, and
    at any tag that cannot go on from the one before it, such as an I behind an O or of another type.
    """
    found: set[tuple[str, int, int]] = set()
    start: int | None = None
    before = OUTSIDE
    for at, tag in enumerate([*tags, OUTSIDE]):
        goes_on = tag[0] not in OPENS and before[0] not in CLOSES and tag[1:] == before[1:]
        if start is not None and (tag == OUTSIDE or not goes_on):
            found.add((before[2:], start, at))
            start = None
        if tag != OUTSIDE and start is None:
            start = at
        before = tag
    return found


def has_entities(predictions: Sequence[Prediction]) -> bool:
    """Whether the references are tags of a scheme of entities, and there is one to be found."""
    tags = {tag for p in predictions if p.reference is not None for tag in p.reference.split()}
    return all(SCHEME.fullmatch(tag) for tag in tags) and bool(tags - {OUTSIDE})


@METRICS.register("entity_f1")
class EntityF1:
    """F1 = 2 hits / (predicted + actual) over the entities of all rows; one is hit if its type and both ends are.

    0 where there is nothing to find, as seqeval has it. Statistics: hits, predicted, actual.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text", "tags")
    name: ClassVar[str] = "entity_f1"
    about: ClassVar[About] = About(
        "Tjong Kim Sang and De Meulder 2003, cs/0306050",
        "own, as seqeval's definition",
        "named entities: a find counts only with its whole extent and its type",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(has_entities)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        actual = entities(reference_of(prediction, self.name).split())
        predicted = entities(prediction.output.split())
        return (float(len(actual & predicted)), float(len(predicted)), float(len(actual)))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return _share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])

    def worth(self, sums_K: FloatArray) -> float:
        """Rows without an entity tell nothing."""
        return float(sums_K[2])


@METRICS.register("entity_precision")
class EntityPrecision(EntityF1):
    """The share of predicted entities that are true ones; 0 where none is predicted."""

    name: ClassVar[str] = "entity_precision"
    about: ClassVar[About] = About(
        "Tjong Kim Sang and De Meulder 2003, cs/0306050",
        "own, as seqeval's definition",
        "named entities, where false finds are what costs",
    )

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return _share(sums[..., 0], sums[..., 1])


@METRICS.register("entity_recall")
class EntityRecall(EntityF1):
    """The share of the true entities that are predicted."""

    name: ClassVar[str] = "entity_recall"
    about: ClassVar[About] = About(
        "Tjong Kim Sang and De Meulder 2003, cs/0306050",
        "own, as seqeval's definition",
        "named entities, where those missed are what costs",
    )

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return _share(sums[..., 0], sums[..., 2])


@METRICS.register("tag_accuracy")
class TagAccuracy:
    """The share of words whose tag is the reference's; a word that the output has no tag for is wrong."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text", "tags")
    name: ClassVar[str] = "tag_accuracy"
    about: ClassVar[About] = About(
        "the share of right tags",
        "own",
        "parts of speech and other tags that are no entities; of entities it flatters, as most words are outside",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "ratio"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(has_references)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        expected, given = reference_of(prediction, self.name).split(), prediction.output.split()
        return (float(sum(a == b for a, b in zip(expected, given, strict=False))), float(len(expected)))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


def _share(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
