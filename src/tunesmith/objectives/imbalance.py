"""Options of objectives whose classes do not count alike: a few rows of some, and many of others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from tunesmith.errors import InputError
from tunesmith.losses.class_cross_entropy import Emphasis
from tunesmith.recipe_keys import Strict, Weight


class Imbalance(Strict):
    """How much a class counts, what is hard, and what a label is worth."""

    class_weights: Literal["balanced"] | Annotated[dict[str, Weight], Field(min_length=1)] | None = Field(
        None,
        description="how much the loss of a class counts: `balanced` (the rarer the more, so that all classes count "
        "alike), or a number for each class that is not to count 1",
        examples=["balanced", {"fraud": 10}],
    )
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0, description="focal loss: how much less what is sure already counts; 2 in its paper, 0 for none"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="the part of a label that is spread over all classes"
    )

    def emphasis(self, classes: Sequence[str], counts: Mapping[str, int], of: int | None = None) -> Emphasis:
        """What the loss is told of `classes`, of which the training rows have so many each; no `counts`: not known.

        Balanced is total / (classes * count), whose mean over the rows is 1; of classes that `of` rows have or have
        not, it is the rows without it / the rows with it. InputError for weights of a class that there is none of.
        """
        given = self.class_weights
        weight_V: tuple[float, ...] | None = None
        if isinstance(given, dict):
            if unknown := sorted(given.keys() - set(classes)):
                near = difflib.get_close_matches(unknown[0], classes, n=1)
                raise InputError(
                    f"objective.class_weights names {unknown[0]!r}, which no training row has",
                    f"write {near[0]!r}" if near else f"take it out; the classes are {', '.join(classes[:20])}",
                )
            weight_V = tuple(given.get(name, 1.0) for name in classes)
        elif given is not None and counts:
            total = sum(counts.values())
            weight_V = tuple(_balanced(counts.get(name, 0), total, len(classes), of) for name in classes)
        return Emphasis(weight_V, self.focal_gamma, self.label_smoothing)


def _balanced(count: int, total: int, classes: int, of: int | None) -> float:
    if not count or count == of:  # what no row has, or all have, teaches nothing of the class
        return 1.0
    return total / (classes * count) if of is None else (of - count) / count
