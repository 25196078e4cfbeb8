"""Populations whose true values are known, to judge intervals and tests by: two models answer rows drawn from them.

A draw gives the statistics of both models' rows, as metrics make them. With `gain` 0 the models are equally good
(and answer differently); any other makes the second better. Rows that are hard for one model are hard for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from tunesmith.evaluation.calibration import BINS, AdaptiveEce, Brier, Ece
from tunesmith.evaluation.class_metrics import AveragePrecision, RocAuc
from tunesmith.evaluation.count_metrics import BalancedAccuracy, MacroPrecision, MatthewsCorrelation
from tunesmith.evaluation.json_metrics import FieldAccuracy
from tunesmith.evaluation.likelihood_metrics import Loss, Perplexity
from tunesmith.evaluation.metrics import Accuracy, ClassCounts, FloatArray, MacroF1, RowMetric
from tunesmith.evaluation.text_metrics import TokenF1

Rng = np.random.Generator
Tables = tuple[FloatArray, FloatArray]
SHARED = 0.6  # of what makes a row hard
MANY, PART = 1_000_000, 200_000


@dataclass(frozen=True)
class Population:
    """`draw(count, gain, rng)` gives both models' statistics; `truth` is the first model's value over all rows.

    `gain` is that of the second model where it is to be the better one; 0 where it is never.
    """

    name: str
    metric: RowMetric
    draw: Callable[[int, float, Rng], Tables]
    gain: float
    truth: float | None = None
    cluster: int = 1

    @cached_property
    def values(self) -> tuple[float, float]:
        """The true value of the first model, and how far the better second one is from it: by many rows."""
        rng, sums_2K = np.random.default_rng(1), np.zeros(1)
        for _ in range(MANY // PART):
            sums_2K = sums_2K + np.stack([table.sum(axis=0) for table in self.draw(PART, self.gain, rng)])
        first, second = (float(self.metric.aggregate(sums_K)) for sums_K in sums_2K)
        return first if self.truth is None else self.truth, second - first if self.gain else 0.0

    def clusters(self, count: int) -> NDArray[np.int64] | None:
        return np.arange(count) // self.cluster if self.cluster > 1 else None


def one(values_N: FloatArray) -> FloatArray:
    """Statistics of a mean."""
    return np.column_stack([values_N, np.ones(len(values_N))]).astype(np.float64)


def difficulty(count: int, rng: Rng, cluster: int = 1, shared: float = SHARED) -> tuple[FloatArray, FloatArray]:
    """Of each row for either model: standard normals of correlation `shared`; rows of a cluster are alike by half."""
    alike_N = rng.normal(size=-(-count // cluster)).repeat(cluster)[:count]
    common_N = rng.normal(size=count)
    if cluster > 1:
        common_N = np.sqrt(0.5) * common_N + np.sqrt(0.5) * alike_N
    first, second = (np.sqrt(shared) * common_N + np.sqrt(1 - shared) * rng.normal(size=count) for _ in range(2))
    return first, second


def hits(share: float, cluster: int = 1) -> Callable[[int, float, Rng], Tables]:
    """Rows right with probability `share`, the second model's with `share + gain`."""

    def draw(count: int, gain: float, rng: Rng) -> Tables:
        first, second = difficulty(count, rng, cluster)
        return one(first < special.ndtri(share)), one(second < special.ndtri(share + gain))

    return draw


def scores(count: int, gain: float, rng: Rng) -> Tables:
    """Overlap with a reference: 4 of 10 answers hold all of it, a few nothing, the others a part."""

    def of(hard_N: FloatArray, more: float) -> FloatArray:
        rank_N = special.ndtr(hard_N)
        all_, none = 0.4 + more, 0.09
        part_N = special.betaincinv(2, 2, np.clip((rank_N - none) / (1 - all_ - none), 0, 1))
        return one(np.where(rank_N < none, 0.0, np.where(rank_N > 1 - all_, 1.0, part_N)))

    first, second = difficulty(count, rng)
    return of(first, 0.0), of(second, gain)


def fields(count: int, gain: float, rng: Rng) -> Tables:
    """Of five fields 97% are right on average: 9 rows of 10 have all."""

    def of(hard_N: FloatArray, more: float) -> FloatArray:
        shares = np.array([0.004, 0.004, 0.012, 0.02, 0.06 - more, 0.9 + more])
        return one(np.searchsorted(np.cumsum(shares)[:-1], special.ndtr(hard_N)) / 5)

    first, second = difficulty(count, rng)
    return of(first, 0.0), of(second, gain)


def texts(count: int, gain: float, rng: Rng) -> Tables:
    """Answers of about 55 tokens, some of hundreds, whose nats a token are skewed: mean 1.35, median 1.13."""
    tokens_N = np.maximum(1, np.round(rng.lognormal(4, 0.8, count)))
    first, second = difficulty(count, rng, shared=0.9)
    nats = [np.exp(0.12 + 0.6 * hard_N) for hard_N in (first, second)]
    return np.column_stack([tokens_N * nats[0], tokens_N]), np.column_stack([tokens_N * nats[1] * (1 - gain), tokens_N])


# Five classes, 35% to 10% of rows; 20 whose rarest has 1.4%.
FIVE = (0.35, 0.25, 0.18, 0.12, 0.10)
LETTERS = "abcdefghijklmnopqrst"
TWENTY = tuple(np.arange(1, 21) ** -1.0 / np.sum(np.arange(1, 21) ** -1.0))


@dataclass(frozen=True)
class Classifier:
    """Noisy evidence for the true class, and softmax probabilities sharpened by `boldness`: 1 is calibrated."""

    shares: Sequence[float]
    signal: float
    boldness: float = 1.0

    def draw(self, count: int, gain: float, rng: Rng) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
        """Classes [N], and both models' probabilities [N, L]."""
        labels = len(self.shares)
        actual_N = rng.choice(labels, count, p=self.shares)
        while np.ptp(actual_N) == 0:  # rows of one class alone, which ROC-AUC refuses
            actual_N = rng.choice(labels, count, p=self.shares)
        common_NL = rng.normal(size=(count, labels))
        found: list[FloatArray] = []
        for signal in (self.signal, self.signal + gain):
            noise_NL = np.sqrt(SHARED) * common_NL + np.sqrt(1 - SHARED) * rng.normal(size=(count, labels))
            evidence_NL = noise_NL + signal * np.eye(labels)[actual_N]
            # Bayes: normal evidence of unit variance, shifted by `signal` for the true class.
            logit_NL = self.boldness * (signal * evidence_NL + np.log(np.asarray(self.shares)))
            found.append(special.softmax(logit_NL, axis=1))
        return actual_N, found[0], found[1]


def table(metric: RowMetric, actual_N: NDArray[np.int64], shares_NL: FloatArray) -> FloatArray:
    """What the metric's own `statistics` give for a classifier's answers, all rows at once."""
    labels = shares_NL.shape[1]
    said_N, confidence_N = shares_NL.argmax(axis=1), shares_NL.max(axis=1)
    if isinstance(metric, RocAuc):
        apart_N = actual_N != np.bincount(actual_N).argmax()
        return metric.ranked(np.eye(labels)[actual_N].astype(bool), shares_NL, apart_N)
    if isinstance(metric, Ece):
        place_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
        if isinstance(metric, AdaptiveEce):
            place_N[confidence_N.argsort(kind="stable")] = np.arange(len(place_N)) * BINS // len(place_N)
        gaps_NB = np.eye(BINS)[place_N] * (confidence_N - (said_N == actual_N))[:, None]
        return np.column_stack([gaps_NB, np.ones(len(gaps_NB))])
    if isinstance(metric, ClassCounts):
        one_hot = np.eye(labels)
        return np.hstack([one_hot[said_N] * (said_N == actual_N)[:, None], one_hot[said_N], one_hot[actual_N]])
    if isinstance(metric, Brier):
        return one(((shares_NL - np.eye(labels)[actual_N]) ** 2).sum(axis=1))
    if isinstance(metric, Loss):
        return one(-np.log(shares_NL[np.arange(len(actual_N)), actual_N]))
    return one(said_N == actual_N)


def classified(metric: RowMetric, classifier: Classifier) -> Callable[[int, float, Rng], Tables]:
    def draw(count: int, gain: float, rng: Rng) -> Tables:
        actual_N, first_NL, second_NL = classifier.draw(count, gain, rng)
        return table(metric, actual_N, first_NL), table(metric, actual_N, second_NL)

    return draw


def opposed(count: int, gain: float, rng: Rng) -> Tables:
    """Two models whose confidence is wrong by 8 points, one above and one below: of equal ECE, and else unlike."""

    def of(confidence_N: FloatArray, gap: float, draw_N: FloatArray) -> FloatArray:
        right_N = draw_N < confidence_N - gap
        place_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
        return np.column_stack([np.eye(BINS)[place_N] * (confidence_N - right_N)[:, None], np.ones(count)])

    first, second = (0.5 + 0.4 * special.ndtr(hard_N) for hard_N in difficulty(count, rng))
    draws = [special.ndtr(hard_N) for hard_N in difficulty(count, rng)]
    return of(first, 0.08, draws[0]), of(second, -0.08 + gain, draws[1])


def uneven(count: int, gain: float, rng: Rng) -> Tables:
    """Two models of equal macro-F1 on two classes (90% and 10%) that miss different ones."""
    actual_N = (rng.random(count) < 0.1).astype(np.int64)
    first, second = (special.ndtr(hard_N) for hard_N in difficulty(count, rng))
    found: list[FloatArray] = []
    for draw_N, recall in ((first, (0.99, 0.5)), (second, (_even_recall() + gain, 0.95))):
        said_N = np.where(draw_N < np.array(recall)[actual_N], actual_N, 1 - actual_N)
        found.append(table(MacroF1("ab"), actual_N, np.eye(2)[said_N]))
    return found[0], found[1]


@cache
def _even_recall() -> float:
    def f1(first: float, second: float) -> float:
        joint = np.array([[0.9 * first, 0.9 * (1 - first)], [0.1 * (1 - second), 0.1 * second]])
        return float(np.mean(2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))))

    return float(optimize.brentq(lambda recall: f1(recall, 0.95) - f1(0.99, 0.5), 0.5, 0.999))


BINARY = Classifier((0.6, 0.4), 1.5)
RARE = Classifier((0.9, 0.1), 1.9)
FIVE_WAY = Classifier(FIVE, 2.2)
BOLD = Classifier(FIVE, 2.2, boldness=1.6)
MANY_WAY = Classifier(TWENTY, 2.6)

POPULATIONS: tuple[Population, ...] = (
    Population("accuracy 0.80", Accuracy(), hits(0.8), 0.06, truth=0.8),
    Population("accuracy 0.95", Accuracy(), hits(0.95), 0.03, truth=0.95),
    Population("accuracy, 4 rows a source", Accuracy(), hits(0.8, 4), 0.06, truth=0.8, cluster=4),
    Population("token F1 0.66", TokenF1(), scores, 0.08),
    Population("field accuracy 0.97", FieldAccuracy(), fields, 0.03),
    Population("loss of texts", Loss(), texts, 0.04),
    Population("perplexity of texts", Perplexity(), texts, 0.04),
    Population("loss of labels", Loss(), classified(Loss(), FIVE_WAY), 0.4),
    Population("macro-F1, 5 classes", MacroF1("abcde"), classified(MacroF1("abcde"), FIVE_WAY), 0.4),
    Population("macro-F1, 20 classes", MacroF1(LETTERS), classified(MacroF1(LETTERS), MANY_WAY), 0.3),
    Population("macro-F1, other classes missed", MacroF1("ab"), uneven, -0.04),
    Population("ROC-AUC, 2 classes", RocAuc("ab"), classified(RocAuc("ab"), BINARY), 0.4),
    Population("ROC-AUC, 10% positive", RocAuc("ab"), classified(RocAuc("ab"), RARE), 0.5),
    Population("ROC-AUC, 5 classes", RocAuc("abcde"), classified(RocAuc("abcde"), FIVE_WAY), 0.4),
    Population("ECE, calibrated", Ece(), classified(Ece(), FIVE_WAY), 0.0, truth=0.0),
    Population("ECE, both too bold", Ece(), classified(Ece(), BOLD), 0.0),
    Population("ECE, one bold, one timid", Ece(), opposed, 0.06),
    Population("adaptive ECE, calibrated", AdaptiveEce(), classified(AdaptiveEce(), FIVE_WAY), 0.0, truth=0.0),
    Population("adaptive ECE, both too bold", AdaptiveEce(), classified(AdaptiveEce(), BOLD), 0.0),
    Population("Brier score, 5 classes", Brier(), classified(Brier(), FIVE_WAY), 0.4),
    Population("balanced accuracy, 10%", BalancedAccuracy("ab"), classified(BalancedAccuracy("ab"), RARE), 0.5),
    Population("macro precision, 20", MacroPrecision(LETTERS), classified(MacroPrecision(LETTERS), MANY_WAY), 0.3),
    Population("MCC, 5 classes", MatthewsCorrelation("abcde"), classified(MatthewsCorrelation("abcde"), FIVE_WAY), 0.4),
    Population("average precision, 10%", AveragePrecision("ab"), classified(AveragePrecision("ab"), RARE), 0.5),
)
# Metrics of one family: a classifier's, all over the same rows.
FAMILY: tuple[RowMetric, ...] = (Accuracy(), MacroF1("abcde"), RocAuc("abcde"), Ece(), Loss())
