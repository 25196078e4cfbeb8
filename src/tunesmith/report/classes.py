"""A classifier class by class: precision and recall, what is taken for what, what its confidence is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluation.intervals import wilson
from tunesmith.report.before_after import OF_A_CLASS, TUNED, UNCALIBRATED
from tunesmith.report.plots import Mark

Json = Mapping[str, Any]
_NONE: Json = {"bins": [], "ece": None}
MOST_PAIRS = 12  # confusions that are listed
NAMED = 24  # more classes leave no room for their names beside the picture
SHADES = 8


@dataclass(frozen=True, slots=True)
class ClassLine:
    """Precision and recall of one label, where it was given or is true; `n` rows have it, `trained` of training."""

    label: str
    precision: Mark | None
    recall: Mark | None
    n: int
    given: int
    trained: int


@dataclass(frozen=True, slots=True)
class Cell:
    """`count` rows of label `row` were given label `column`: the share of all rows of that label."""

    row: int
    column: int
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """Cells that are not empty; and the most frequent mistakes, a pair of labels and its rows."""

    labels: list[str]
    cells: list[Cell]
    pairs: list[tuple[str, str, int, int]]
    outside: int

    @property
    def named(self) -> bool:
        """Whether there is room for the names beside the picture."""
        return len(self.labels) <= NAMED

    def shades(self) -> list[tuple[bool, int, str]]:
        """The picture as few paths: whether right, the shade (1 to SHADES), and its squares as the d of a path."""
        squares: dict[tuple[bool, int], list[str]] = {}
        for cell in self.cells:
            key = (cell.row == cell.column, max(1, round(SHADES * cell.share)))
            squares.setdefault(key, []).append(f"M{cell.column} {cell.row}h1v1h-1z")
        return [(right, shade, "".join(parts)) for (right, shade), parts in sorted(squares.items())]


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of about one confidence, and how many of them are right, with its interval."""

    n: int
    confidence: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Classes:
    """One data set's classes, of the tuned model. Where rows have several labels, none is taken for another.

    `bins_before` are those of its probabilities before they were scaled, none where they were not.
    """

    data: str
    lines: list[ClassLine]
    confusion: Confusion | None
    bins: list[Bin]
    ece: float | None
    bins_before: list[Bin]
    ece_before: float | None

    @property
    def largest_bin(self) -> int:
        return max((one.n for one in (*self.bins, *self.bins_before)), default=1)


def classes_of(
    records: Sequence[Json], details: Mapping[str, Json], trained: Mapping[str, int] | None = None
) -> list[Classes]:
    """For each data set that has details of the tuned model; `trained`: how many training rows have each label."""
    found: list[Classes] = []
    for data, models in details.items():
        if TUNED in models:
            own = models[TUNED]
            confusion: Json | None = own.get("confusion")
            reliability, before = (of.get("reliability") or _NONE for of in (own, models.get(UNCALIBRATED, {})))
            found.append(
                Classes(
                    data,
                    _lines(
                        [r for r in records if r["data"] == data and r["model"] == TUNED],
                        (confusion or own)["labels"],
                        trained or {},
                    ),
                    None if confusion is None else _confusion(confusion),
                    [_bin(one) for one in reliability["bins"]],
                    reliability["ece"],
                    [_bin(one) for one in before["bins"]],
                    before["ece"],
                )
            )
    return found


def _lines(records: Sequence[Json], labels: Sequence[str], trained: Mapping[str, int]) -> list[ClassLine]:
    """The worst recall first, where a reader should look."""
    marks = {
        (r["group"], r["metric"]): Mark(r["metric"], r["value"], r["low"], r["high"])
        for r in records
        if r["metric"] in OF_A_CLASS
    }
    counts = {(r["group"], r["metric"]): int(r["n"]) for r in records if r["metric"] in OF_A_CLASS}
    lines = [
        ClassLine(
            label,
            marks.get((group := f"label={label}", "precision")),
            marks.get((group, "recall")),
            counts.get((group, "recall"), 0),
            counts.get((group, "precision"), 0),
            trained.get(label, 0),
        )
        for label in labels
    ]
    return sorted(lines, key=lambda c: (c.recall.value if c.recall else 2.0, -c.n, c.label))


def _confusion(found: Json) -> Confusion:
    labels: list[str] = found["labels"]
    cells: list[Cell] = []
    for i, row in enumerate(found["counts"]):
        total = sum(row)
        cells += [Cell(i, j, count, count / total) for j, count in enumerate(row) if count]
    wrong = sorted((c for c in cells if c.row != c.column), key=lambda c: (-c.count, -c.share, c.row, c.column))
    totals = [sum(row) for row in found["counts"]]
    pairs = [(labels[c.row], labels[c.column], c.count, totals[c.row]) for c in wrong[:MOST_PAIRS]]
    return Confusion(labels, cells, pairs, max(0, len(wrong) - MOST_PAIRS))


def _bin(found: Json) -> Bin:
    low, high = wilson(round(found["accuracy"] * found["n"]), found["n"])
    return Bin(found["n"], found["confidence"], found["accuracy"], low, high)
