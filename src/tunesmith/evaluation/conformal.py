"""Sets of labels that hold the right one as often as was asked for: split conformal prediction.

Shape letters: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import Prediction

OF_SETS = ("conformal_coverage", "conformal_set_size")
SOURCE = "Sadinle et al. 2019, arXiv 1609.00451"


def least_rows(coverage: float) -> int:
    """With fewer rows no threshold has that coverage: every set would hold all labels."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


@dataclass(frozen=True, slots=True)
class Sets:
    """All labels whose probability is at least 1 - `threshold` (Sadinle et al. 2019, arXiv 1609.00451).

    Of rows drawn as those it was fitted to, a share `coverage` or more have their label in it, whatever the model:
    between it and it + 1 / (N + 1) where no two scores are equal. A set may be empty: then nothing fits the row as
    well as the right labels fit theirs.
    """

    coverage: float
    threshold: float

    @classmethod
    def fit(cls, right_N: FloatArray, coverage: float) -> Sets:
        """`right_N`: the probability of each row's own label, of `least_rows` rows or more."""
        needed = math.ceil((len(right_N) + 1) * coverage - 1e-9)
        return cls(coverage, float(np.sort(1 - right_N)[needed - 1]))

    def of(self, probabilities: Mapping[str, float]) -> tuple[str, ...]:
        """The most probable first."""
        held = [label for label, share in probabilities.items() if 1 - share <= self.threshold]
        return tuple(sorted(held, key=lambda label: (-probabilities[label], label)))


class _OfSets:
    """What metrics of sets share: only answers that come with a set have them."""

    name: ClassVar[str]
    kind: ClassVar[MetricKind] = "mean"

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return all(p.label_set is not None and p.reference is not None for p in predictions)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)

    def _set(self, prediction: Prediction) -> tuple[str, ...]:
        if prediction.label_set is None:
            raise InputError(
                f"{self.name} needs a set of labels, and the answer to {prediction.where} has none",
                f"set evaluate.conformal to a coverage such as 0.9, or leave {self.name} out of evaluate.metrics",
            )
        return prediction.label_set


@METRICS.register("conformal_coverage")
class ConformalCoverage(_OfSets):
    """The share of rows whose label is in their conformal set: what evaluate.conformal asks for, or a little more."""

    name: ClassVar[str] = "conformal_coverage"
    about: ClassVar[About] = About(SOURCE, "own", "whether sets keep what they promise on rows that they never saw")
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "rate"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (float(reference_of(prediction, self.name) in self._set(prediction)), 1.0)


@METRICS.register("conformal_set_size")
class ConformalSetSize(_OfSets):
    """How many labels a conformal set holds, the mean over rows: the fewer, the more a set says."""

    name: ClassVar[str] = "conformal_set_size"
    about: ClassVar[About] = About(SOURCE, "own", "what the coverage costs: sets of one label are answers")
    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[Bounds] = (0.0, float("inf"))

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (float(len(self._set(prediction))), 1.0)


def to_json(sets: Sets) -> dict[str, Any]:
    return {"coverage": sets.coverage, "threshold": sets.threshold}
