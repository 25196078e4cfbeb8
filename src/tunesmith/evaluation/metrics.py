"""A metric is a vector of numbers for each row and a function of their sums.

Nothing else: so bootstrap, paired comparison, groups of rows and clusters of rows are sums over other rows of the
same table. Shape letters: N rows, K statistics, L labels; "..." are resamples, groups, or nothing.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.types import AnswerKind, Prediction

MetricKind = Literal["rate", "mean", "ratio", "general"]
Bounds = tuple[float, float]
FloatArray = NDArray[np.float64]
LEAST_WORTH = 10  # rows of a rate that a metric over classes must be worth: of fewer intervals hold 74% to 92%, or 99%
LEAST_UNITS = 5  # rows of a loss, sources of any metric: of 2 a loss's interval holds 42% to 60%, of 5 92% or more
LEAST_WORTH_COMPARED = 12  # with 3 rows of a class and 47 of the other a difference holds 84%
KINDS: Mapping[AnswerKind, str] = {
    "text": "texts",
    "label": "labels that were learned",
    "number": "numbers",
    "passages": "passages that are ranked",
    "tags": "tags of words",
    "choices": "choices of each row's own",
}
ABSENT = 0.05  # the share of classes that may have no row


@dataclass(frozen=True, slots=True)
class About:
    """What docs/metrics.md tells beside a metric's docstring: its source, what computes it (and what it is checked by),
    and when to use it."""

    source: str
    library: str
    use: str


class RowMetric(Protocol):
    """What `METRICS` holds. `kind` chooses the interval.

    rate: rows are 0 or 1, statistics (hit, 1). mean: statistics (value, 1). ratio: (numerator, denominator),
    and the metric is their quotient or a monotone function of it. general: any smooth function of the sums.
    `bounds` are the smallest and largest value the metric can have.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    kind: ClassVar[MetricKind]
    bounds: ClassVar[Bounds]

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        """Of one row; always of the same length. InputError if the prediction lacks what is needed."""
        ...

    def aggregate(self, sums: FloatArray) -> FloatArray:
        """[..., K] sums over rows -> [...] values; NaN where the sums define none."""
        ...


@runtime_checkable
class Joint(Protocol):
    """A metric whose statistics of a row depend on the other rows, as ranks do."""

    def joint_statistics(self, predictions: Sequence[Prediction]) -> FloatArray:
        """[N, K], a row's statistics as they are among these rows."""
        ...


@runtime_checkable
class Limited(Protocol):
    """A metric that knows its interval better than its kind does."""

    def limits(self, statistics_NK: FloatArray, seed: int, level: float) -> tuple[float, float] | None:
        """The interval of the true value; None where rows have no spread."""
        ...


@runtime_checkable
class Biased(Limited, Protocol):
    """A metric that few rows push away from its true value and that is not smooth: it knows how to judge itself."""

    def contrast(self, before_NK: FloatArray, after_NK: FloatArray) -> tuple[float, float, float]:
        """The difference on the same rows without what is owed to there being no more of them, its standard error, and
        by how much it may lie too high even so."""
        ...


@runtime_checkable
class Weighed(Protocol):
    """A metric that says how many rows of a rate would tell as much, where all rows are right.

    Infinitely many where it has this value on any rows.
    """

    def worth(self, sums_K: FloatArray) -> float: ...


@runtime_checkable
class Demanding(Protocol):
    """A metric that few rows cannot show an interval of: it says what is missing."""

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        """In a few words, of rows that were not summed to clusters; None if nothing. `compared`: for a difference."""
        ...


def lacking(
    metric: RowMetric, statistics_NK: FloatArray, compared: bool = False, clusters_N: NDArray[np.int64] | None = None
) -> str | None:
    """Why these rows give the metric no interval, or (`compared`) its difference none and no test; None if they do."""
    units = len(statistics_NK) if clusters_N is None else int(clusters_N.max(initial=-1)) + 1
    if units < LEAST_UNITS and (clusters_N is not None or not all(map(math.isfinite, metric.bounds))):
        what = ("row" if clusters_N is None else "source") + "s" * (units != 1)
        return f"no interval: {units} {what}, and it takes {LEAST_UNITS}"
    why = metric.lacks(statistics_NK, compared) if isinstance(metric, Demanding) else None
    return why and f"no interval: {why}"


@runtime_checkable
class Scoring(Protocol):
    """A metric whose numbers come from another model: worked out once for all rows, and kept with the answers."""

    def prepare(self, predictions: Sequence[Prediction]) -> None:
        """Raises what would keep `scored` from its work on predictions of these rows."""
        ...

    def scored(self, predictions: Sequence[Prediction]) -> list[Prediction]: ...


def scored(names: Sequence[str], predictions: Sequence[Prediction]) -> list[Prediction]:
    """The predictions with what those of the metrics need that ask another model."""
    for metric in build(names, predictions):
        if isinstance(metric, Scoring):
            predictions = metric.scored(predictions)
    return list(predictions)


@runtime_checkable
class Signed(Protocol):
    """A metric that another library computes, or that has settings: what others need to get the same number."""

    def signature(self) -> str: ...


@runtime_checkable
class Renamed(Protocol):
    """A metric that is equal for two models when another is, so that both are one hypothesis."""

    tested_as: ClassVar[str]


@runtime_checkable
class WithoutFloor(Protocol):
    """A metric by which random guesses beat the most frequent label: to beat that label by it shows nothing."""

    majority_is_no_floor: ClassVar[bool]


@runtime_checkable
class Selective(Protocol):
    """A metric that not all rows have: by default it is measured only where `applies` says so."""

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool: ...


@runtime_checkable
class Fitting(Protocol):
    """A metric of some kinds of answers alone: of others it would be a number without a meaning."""

    of: ClassVar[tuple[AnswerKind, ...]]


def check_fit(names: Sequence[str], predictions: Sequence[Prediction]) -> None:
    """InputError for a metric that is not of answers such as these."""
    for metric, prediction in itertools.product(build(names, ()), predictions):
        if isinstance(metric, Fitting) and prediction.kind not in metric.of:
            fitting = [name for name in METRICS if prediction.kind in getattr(METRICS.get(name), "of", KINDS)]
            raise InputError(
                f"{metric.name} is of {' and '.join(map(KINDS.__getitem__, metric.of))}, and the answer to "
                f"{prediction.where} is of {KINDS[prediction.kind]}",
                f"choose one of {KINDS[prediction.kind]}: {', '.join(fitting)}",
            )


def applicable(names: Sequence[str], predictions: Sequence[Prediction]) -> list[str]:
    """Those of the metrics that these predictions can have."""
    found = ((name, METRICS.get(name)) for name in names)
    return [name for name, metric in found if not isinstance(metric, Selective) or metric.applies(predictions)]


def build(
    names: Sequence[str], predictions: Iterable[Prediction], labels: Sequence[str] | None = None
) -> list[RowMetric]:
    """The metrics called `names`, over the label set of `labels` (else the keys of `probabilities`) and all references.

    So a test label that training never saw is a class that scores 0, as it is for scikit-learn. A generated
    answer that is no label is a miss of its reference's class; it does not become a class.
    """
    found = set(labels or ())
    for prediction in predictions:
        if labels is None:
            found.update(prediction.probabilities or ())
        found.update(prediction.expected)
    return [METRICS.get(name)(sorted(found)) for name in names]


def statistics(metric: RowMetric, predictions: Sequence[Prediction]) -> FloatArray:
    """[N, K] statistics of all rows. InputError when there are none."""
    if not predictions:
        raise InputError(f"{metric.name} was asked for over no rows", "give a test set that has rows")
    if isinstance(metric, Joint):
        return metric.joint_statistics(predictions)
    return np.array([metric.statistics(p) for p in predictions], dtype=np.float64)


def reference_of(prediction: Prediction, name: str) -> str:
    """The row's reference; InputError naming the row if it has none."""
    if prediction.reference is None:
        raise InputError(
            f"{name} needs a reference, and {prediction.where} has none",
            f"add the expected answer to that row, or leave {name} out of evaluate.metrics",
        )
    return prediction.reference


def has_references(predictions: Sequence[Prediction]) -> bool:
    """Whether there is anything to compare answers with: rows of plain text have no answers."""
    return any(p.reference is not None for p in predictions)


def quotient(sums: FloatArray) -> FloatArray:
    """First statistic by the second; NaN where the second is 0."""
    denominator = sums[..., 1]
    return np.divide(sums[..., 0], denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


class _Rate:
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "rate"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("exact_match")
class ExactMatch(_Rate):
    """Output equals reference once white space at both ends of both is taken off; nothing else is forgiven.

    Where a row has several references, one of them.
    """

    name: ClassVar[str] = "exact_match"
    of: ClassVar[tuple[AnswerKind, ...]] = ("text", "tags")
    about: ClassVar[About] = About(
        "Rajpurkar et al. 2016, arXiv 1606.05250, without their normalisation",
        "own: a comparison of texts",
        "answers that are right to the letter or wrong: codes, numbers, labels in words",
    )

    applies = staticmethod(has_references)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        right = prediction.output.strip() in {reference.strip() for reference in prediction.references}
        return (float(right), 1.0)


@METRICS.register("accuracy")
class Accuracy(_Rate):
    """The label is the reference's, character by character; of several labels, all are and no other is given."""

    name: ClassVar[str] = "accuracy"
    of: ClassVar[tuple[AnswerKind, ...]] = ("label", "text", "choices")
    about: ClassVar[About] = About(
        "the share of right answers",
        "own, as scikit-learn's accuracy_score",
        "one label a row, classes of like size and like weight; beside macro_f1 where they are not",
    )

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        """Not to numbers, which are near or far."""
        return not any(p.kind == "number" for p in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (float(prediction.output == reference_of(prediction, self.name)), 1.0)


class ClassCounts(ABC):
    """A metric of how often each class was right, predicted and true. A row may have several labels, or none.

    Statistics: L hits, L predicted, L actual.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)
    of: ClassVar[tuple[AnswerKind, ...]] = ("label", "text")
    least: ClassVar[tuple[int, int]] = (LEAST_WORTH, LEAST_WORTH_COMPARED)  # for an interval, for a comparison
    counted: ClassVar[tuple[int, str]] = (2, "a row")  # which of the three says how certain a class is, and in words

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._index = {label: i for i, label in enumerate(self.labels)}

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return any(p.answered or p.expected for p in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        count = len(self.labels)
        row = [0.0] * (3 * count)
        for label in prediction.answered:
            if (predicted := self._index.get(label)) is not None:
                row[count + predicted] = 1.0
        for label in prediction.expected:
            if (actual := self._index.get(label)) is None:
                known = ", ".join(self.labels[:20])
                raise InputError(
                    f"{prediction.where} has the label {label!r}, which is not in the label set",
                    f"known labels: {known}; correct the row, or add rows of that label to train on",
                )
            row[2 * count + actual] = 1.0
            row[actual] = row[count + actual]
        return tuple(row)

    def counts(self, sums: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Hits, predicted and actual of each class: [..., L] each."""
        hits, predicted, actual = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, len(self.labels)), -2, 0)
        return hits, predicted, actual

    @abstractmethod
    def aggregate(self, sums: FloatArray) -> FloatArray: ...

    def lacks(self, statistics_NK: FloatArray, compared: bool) -> str | None:
        told_L = self.counts(statistics_NK.sum(axis=0))[self.counted[0]]
        absent = [label for label, told in zip(self.labels, told_L, strict=True) if not told]
        if len(absent) > ABSENT * len(self.labels):
            others = f" and {len(absent) - 1} more of {len(self.labels)}" if len(absent) > 1 else ""
            return f"class {absent[0]!r}{others} without {self.counted[1]} to judge by"
        worth = self.worth(statistics_NK.sum(axis=0))
        needed = self.least[compared]
        if worth < needed:
            rarest, told = self.labels[int(np.where(told_L > 0, told_L, np.inf).argmin())], told_L[told_L > 0].min()
            return (
                f"class {rarest!r} has {told:.0f} {self.counted[1].split()[1]}{'s' * int(told != 1)}, "
                f"so all rows are worth {worth:.1f}; {needed} are needed{' to compare' * compared}"
            )
        return None

    def worth(self, sums_K: FloatArray) -> float:
        """A mean over classes is as uncertain as its rarest: the number of classes times the harmonic mean of rows."""
        told_L = self.counts(sums_K)[self.counted[0]]
        held_L = told_L[told_L > 0]
        return float(len(held_L) ** 2 / (1 / held_L).sum())


@METRICS.register("macro_f1")
class MacroF1(ClassCounts):
    """Mean over classes of F1 = 2 TP / (predicted + actual), each class counting the same.

    Classes that neither references nor predictions hold are left out, so on predictions from the label set
    it is scikit-learn's f1_score(average="macro"). A row may have several labels, or none.
    """

    name: ClassVar[str] = "macro_f1"
    about: ClassVar[About] = About(
        "Sokolova and Lapalme 2009, Inf. Process. Manag. 45(4)",
        "own, as scikit-learn's f1_score(average='macro')",
        "classes of unlike size that matter alike: a rare one counts as much as a frequent one",
    )
    majority_is_no_floor: ClassVar[bool] = True

    def aggregate(self, sums: FloatArray) -> FloatArray:
        hits, predicted, actual = self.counts(sums)
        held = predicted + actual
        f1 = np.divide(2 * hits, held, out=np.zeros_like(held), where=held > 0)
        classes = (held > 0).sum(axis=-1).astype(np.float64)
        return np.divide(f1.sum(axis=-1), classes, out=np.full(classes.shape, np.nan), where=classes > 0)
