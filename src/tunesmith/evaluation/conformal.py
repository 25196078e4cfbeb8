"""Sets of labels that hold the right one as often as was asked for: split conformal prediction.

Shape letters: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tunesmith.data.checks import row_keys
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction, Row

OF_SETS = ("conformal_coverage", "conformal_set_size")
SOURCE = "Sadinle et al. 2019, arXiv 1609.00451; Romano et al. 2020, arXiv 2006.02544"


def least_rows(coverage: float) -> int:
    """With fewer rows no threshold has that coverage: every set would hold all labels."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def by_probability(shares: Mapping[str, float], chance: float) -> dict[str, float]:
    """How little each label fits: 1 - its probability (LAC: Sadinle et al. 2019, arXiv 1609.00451).

    No sets of one coverage are smaller; they take it from hard rows to give it to easy ones.
    """
    del chance
    return {label: 1 - share for label, share in shares.items()}


def by_rank(shares: Mapping[str, float], chance: float) -> dict[str, float]:
    """How little each label fits: the probability of all that are more probable, and a random part of its own.

    APS, randomised: Romano, Sesia and Candes 2020 (arXiv 2006.02544), section 2.1. Coverage is exact, and hard rows
    have it nearly as easy ones do.
    """
    above, found = 0.0, dict[str, float]()
    for label in sorted(shares, key=lambda label: (-shares[label], label)):
        found[label] = above + chance * shares[label]
        above += shares[label]
    return found


SCORES: Mapping[str, Callable[[Mapping[str, float], float], dict[str, float]]] = {"lac": by_probability, "aps": by_rank}


def chance(row: Row) -> float:
    """A number between 0 and 1 that is the row's own, so that it has the same set whenever it is asked."""
    return int.from_bytes(row_keys(row.value)[0][:8]) / 2**64


@dataclass(frozen=True, slots=True)
class Sets:
    """All labels whose score, by one of SCORES, is at most `threshold`: split conformal prediction.

    Of rows drawn as those it was fitted to, a share `coverage` or more have their label in it, whatever the model:
    between it and it + 1 / (N + 1) where no two scores are equal. A set may be empty: then nothing fits the row as
    well as the right labels fit theirs, or, by rank, chance left the only label out.
    """

    coverage: float
    threshold: float
    by: str = "lac"

    @classmethod
    def fit(cls, rows: Sequence[tuple[Mapping[str, float], str, float]], coverage: float, by: str = "lac") -> Sets:
        """`rows`: probabilities, the right label and the chance of each, of `least_rows` or more."""
        scores_N = [SCORES[by](shares, own).get(label, 1.0) for shares, label, own in rows]
        needed = math.ceil((len(scores_N) + 1) * coverage - 1e-9)
        return cls(coverage, sorted(scores_N)[needed - 1], by)

    def of(self, shares: Mapping[str, float], chance: float) -> tuple[str, ...]:
        """Of a row's probabilities and its chance; the most probable first."""
        held = [label for label, score in SCORES[self.by](shares, chance).items() if score <= self.threshold]
        return tuple(sorted(held, key=lambda label: (-shares[label], label)))


class _OfSets:
    """What metrics of sets share: only answers that come with a set have them."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("label",)
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
    return asdict(sets)
