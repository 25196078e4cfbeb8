"""Answers of the models side by side: what tuning changed in each row, in little space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import read_file
from tunesmith.evaluation.metrics import Joint, RowMetric
from tunesmith.report.before_after import TUNED
from tunesmith.report.findings import file_name
from tunesmith.types import Prediction

if TYPE_CHECKING:
    from tunesmith.comparable import SharedRow

OUTCOMES = ("better", "worse", "wrong", "right", "same")  # same: unchanged, where right and wrong have no meaning
BUDGET = 1_800_000  # bytes of all answers in a page, so that it stays below 3 MB and opens at once
LONGEST = 4000  # characters of a text that are shown
AT_LEAST = 40  # rows of each outcome in a sample
TOP = 3  # labels whose probability is shown
JUDGES = ("rate", "mean", "ratio")  # kinds of metrics that have a number for one row


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of predictions/<set>.jsonl, judged. `before` is None where only the tuned model answered.

    `scores` are the row's numbers of before and after under the judging metric, None where there is none.
    """

    where: str
    asked: str
    reference: str | None
    before: str | None
    after: str
    outcome: str
    scores: tuple[float | None, float | None]
    top: tuple[tuple[str, float], ...]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answers:
    """Those of one data set that were kept: `shown` of `kept` rows of the `measured`, judged by the metric `judge`.

    `before` and `after` are the names of the models.
    """

    data: str
    before: str | None
    after: str
    judge: str | None
    measured: int
    kept: int
    counts: Mapping[str, int]
    shown: tuple[Answer, ...]

    @property
    def sampled(self) -> bool:
        return len(self.shown) < self.kept

    @property
    def changing(self) -> float | None:
        """The share of rows that tuning changed, where all were kept and each is right or wrong."""
        if self.kept < self.measured or not self.kept or self.counts.get("same"):
            return None
        return (self.counts.get("better", 0) + self.counts.get("worse", 0)) / self.kept


def gather(path: Path, data: str, metrics: Sequence[str], measured: int, budget: int = BUDGET) -> Answers | None:
    """The answers of a file of predictions; None if none were kept. A sample of each outcome where all are too much."""
    if not path.is_file():
        return None
    judge = _judge(metrics)
    rows = list(read_file(path))
    if not rows:
        return None
    before = next((model for model in rows[0].answers if model != TUNED), None)
    for number, row in enumerate(rows, 1):
        if lacking := {before or TUNED, TUNED} - row.answers.keys():
            raise InputError(f"{path}:{number} is damaged: it has no answer of {min(lacking)}", "measure the set again")
    found = [
        _judged(judge, row.where, row.input, row.answers[before] if before else None, row.answers[TUNED], row.tags)
        for row in rows
    ]
    return _sample(data, before, TUNED, judge, measured, found, budget)


def gather_pair(
    rows: Sequence[SharedRow], data: str, before: str, after: str, metrics: Sequence[str], budget: int = BUDGET
) -> Answers:
    """The answers of two of the models that are compared, as `gather`."""
    judge = _judge(metrics)
    found = [_judged(judge, r.row.where, r.row.input, r.answers[before], r.answers[after], r.row.tags) for r in rows]
    return _sample(data, before, after, judge, len(rows), found, budget)


def compact(answers: Answers) -> dict[str, Any]:
    """For the page: every text once, and rows of positions in the list of texts (-1 for none).

    A row: where, asked, reference, before, after, outcome, scores of before and after, [label, percent, ...], tags.
    """
    texts: dict[str, int] = {}

    def place(text: str | None) -> int:
        return -1 if text is None else texts.setdefault(text, len(texts))

    rows = [
        [
            place(a.where),
            place(_cut(a.asked)),
            place(_cut(a.reference)),
            place(_cut(a.before)),
            place(_cut(a.after)),
            OUTCOMES.index(a.outcome),
            [score if score is None else float(f"{score:.4g}") for score in a.scores],
            [part for label, share in a.top for part in (place(label), round(100 * share, 1))],
            [place(f"{name}={value}") for name, value in a.tags.items()],
        ]
        for a in answers.shown
    ]
    return {
        "data": answers.data,
        "before": answers.before,
        "after": answers.after,
        "judge": answers.judge,
        "counts": [answers.counts.get(outcome, 0) for outcome in OUTCOMES],
        "texts": list(texts),
        "rows": rows,
    }


def _judged(
    judge: RowMetric | None,
    where: str,
    asked: str,
    before: Prediction | None,
    after: Prediction,
    tags: Mapping[str, str],
) -> Answer:
    scores = (None if before is None else _score(judge, before), _score(judge, after))
    return Answer(
        where=file_name(where),
        asked=asked,
        reference=after.reference,
        before=before and before.output,
        after=after.output,
        outcome=_outcome(judge, *scores, before is not None),
        scores=scores,
        top=_top(after.probabilities or {}),
        tags=tags,
    )


def _sample(
    data: str,
    before: str | None,
    after: str,
    judge: RowMetric | None,
    measured: int,
    found: Sequence[Answer],
    budget: int,
) -> Answers:
    counts = Counter(answer.outcome for answer in found)
    shown = tuple(_fitting(found, counts, budget))
    return Answers(data, before, after, None if judge is None else judge.name, measured, len(found), counts, shown)


def _judge(names: Sequence[str]) -> RowMetric | None:
    """The first metric that has a number for one row; a plugin's that is not loaded has none."""
    built = (METRICS.get(name)([]) for name in names if name in METRICS)
    return next((metric for metric in built if metric.kind in JUDGES and not isinstance(metric, Joint)), None)


def _score(judge: RowMetric | None, prediction: Prediction) -> float | None:
    if judge is None:
        return None
    try:
        value, weight = judge.statistics(prediction)[:2]
    except InputError:  # a row without a reference
        return None
    return value / weight if weight else None


def _outcome(judge: RowMetric | None, before: float | None, after: float | None, compared: bool) -> str:
    if judge is None or after is None or (compared and before is None):
        return "same"
    if compared and before is not None and abs(after - before) > 1e-9:
        return "better" if (after > before) == judge.higher_is_better else "worse"
    if judge.bounds != (0.0, 1.0):
        return "same"
    return "right" if after == (1.0 if judge.higher_is_better else 0.0) else "wrong"


def _top(shares: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP])


def _fitting(found: Sequence[Answer], counts: Mapping[str, int], budget: int) -> Iterable[Answer]:
    """All, or of each outcome evenly spread ones: the same share of each, but no outcome fewer than AT_LEAST."""
    sizes = [_size(answer) for answer in found]
    share = min(1.0, budget / max(1, sum(sizes)))
    while True:
        kept = [
            i for outcome in counts for i in _spread([n for n, a in enumerate(found) if a.outcome == outcome], share)
        ]
        if share == 1.0 or sum(sizes[i] for i in kept) <= budget or len(kept) <= AT_LEAST:
            return [found[i] for i in sorted(kept)]
        share *= 0.9


def _spread(places: Sequence[int], share: float) -> list[int]:
    wanted = min(len(places), max(round(share * len(places)), round(min(1.0, 10 * share) * AT_LEAST)))
    return [places[n * len(places) // wanted] for n in range(wanted)]


def _size(answer: Answer) -> int:
    """About its bytes in the page; texts that repeat, as labels do, count too little to matter."""
    texts = (answer.where, answer.asked, answer.reference, answer.before, answer.after)
    return 60 + sum(len((_cut(text) or "").encode()) for text in texts if text and len(text) > 24)


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … {len(text) - LONGEST:,} more characters"
