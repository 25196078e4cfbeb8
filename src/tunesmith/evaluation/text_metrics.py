"""Metrics of answers in free text: how much of the reference's words, phrases or characters they hold."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.json_metrics import asks_for_objects
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, has_references, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

LONGEST_GRAM = 4  # words, of BLEU
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Chinese and Japanese write no spaces: there each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class Share(ABC):
    """A number between 0 and 1 for each row, and their mean over rows; of several references the nearest counts."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)
    name: ClassVar[str]

    applies = staticmethod(has_references)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        return (max(self.share(prediction.output, reference) for reference in prediction.references), 1.0)

    @abstractmethod
    def share(self, output: str, reference: str) -> float: ...

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("token_f1")
class TokenF1(Share):
    """Mean F1 of the words that output and reference share, as SQuAD counts them (Rajpurkar et al. 2016, 1606.05250).

    Lower case, without ASCII punctuation and the articles a, an, the; words are split at white space. Two texts
    without a word are equal.
    """

    name: ClassVar[str] = "token_f1"
    about: ClassVar[About] = About(
        "Rajpurkar et al. 2016, arXiv 1606.05250",
        "own",
        "short answers in free words, where some of the words being right is worth something",
    )

    def share(self, output: str, reference: str) -> float:
        said, expected = _squad_words(output), _squad_words(reference)
        if not said or not expected:
            return float(said == expected)
        common = sum((Counter(said) & Counter(expected)).values())
        return 2 * common / (len(said) + len(expected))


@METRICS.register("span_f1")
class SpanF1(TokenF1):
    """Mean F1 of the words that an extracted answer shares with the nearest right one (`token_f1`).

    Where the text has no answer, 1 for giving none and 0 for any (Rajpurkar et al. 2018, arXiv 1806.03822).
    """

    name: ClassVar[str] = "span_f1"
    about: ClassVar[About] = About(
        "Rajpurkar et al. 2018, arXiv 1806.03822",
        "own",
        "answers cut out of a text, in part right",
    )


@METRICS.register("span_exact_match")
class SpanExactMatch(Share):
    """An extracted answer equals a right one in lower case, without ASCII punctuation and the articles a, an, the."""

    name: ClassVar[str] = "span_exact_match"
    about: ClassVar[About] = About(
        "Rajpurkar et al. 2016, arXiv 1606.05250",
        "own",
        "answers cut out of a text, right or wrong",
    )
    kind: ClassVar[MetricKind] = "rate"

    def share(self, output: str, reference: str) -> float:
        return float(_squad_words(output) == _squad_words(reference))


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class _Rouge(Share):
    """Mean F1 over rows by the rouge-score package, without stemming."""

    kind_of_rouge: ClassVar[str]

    def share(self, output: str, reference: str) -> float:
        return float(_scorer(self.kind_of_rouge).score(reference, output)[self.kind_of_rouge].fmeasure)

    def signature(self) -> str:
        return f"stem:no|rouge-score:{version('rouge-score')}"


@METRICS.register("rouge_1")
class Rouge1(_Rouge):
    """ROUGE-1 (Lin 2004): F1 of the words that output and reference share. Words of any script, in lower case."""

    name: ClassVar[str] = "rouge_1"
    about: ClassVar[About] = About(
        "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
        "rouge-score",
        "summaries: which words of the reference are there",
    )
    kind_of_rouge: ClassVar[str] = "rouge1"


@METRICS.register("rouge_2")
class Rouge2(_Rouge):
    """ROUGE-2 (Lin 2004): F1 of the pairs of neighbouring words that output and reference share."""

    name: ClassVar[str] = "rouge_2"
    about: ClassVar[About] = About(
        "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
        "rouge-score",
        "summaries: whether the reference's phrases are there",
    )
    kind_of_rouge: ClassVar[str] = "rouge2"


@METRICS.register("rouge_l")
class RougeL(_Rouge):
    """ROUGE-L (Lin 2004): F1 of the longest sequence of words that both have in the same order, gaps allowed."""

    name: ClassVar[str] = "rouge_l"
    about: ClassVar[About] = About(
        "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
        "rouge-score",
        "summaries and answers of a sentence or two, word order included",
    )
    kind_of_rouge: ClassVar[str] = "rougeL"


@METRICS.register("chrf")
class Chrf(Share):
    """chrF2 (Popovic 2015): F of character n-grams to 6, recall counting twice; sacrebleu's sentence score, as a mean.

    A fraction, where sacrebleu writes percent.
    """

    name: ClassVar[str] = "chrf"
    about: ClassVar[About] = About(
        "Popović 2015, chrF: character n-gram F-score",
        "sacrebleu",
        "translation and free text of any script; kinder than BLEU to inflected words and short answers",
    )

    def share(self, output: str, reference: str) -> float:
        return float(_chrf().sentence_score(output, [reference]).score) / 100

    def signature(self) -> str:
        return signature_of(_chrf())


@METRICS.register("bleu")
class Bleu:
    """BLEU-4 of all rows together (Papineni et al. 2002), by sacrebleu, its tokenizer 13a and its smoothing.

    A fraction, where sacrebleu writes percent. Statistics: lengths of output and of the reference nearest to it in
    length, then matches with any reference and counts of the n-grams to 4.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "bleu"
    about: ClassVar[About] = About(
        "Papineni et al. 2002, BLEU: a Method for Automatic Evaluation",
        "sacrebleu's counts per row; corpus_bleu",
        "translation, over many rows, to compare with published numbers",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "general"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        """Sentences, most of them long enough to have n-grams of 4 words."""
        words = [len((p.reference or "").split()) for p in predictions]
        return 2 * sum(count >= LONGEST_GRAM for count in words) > len(words) and not asks_for_objects(predictions)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        found = _bleu().corpus_score([prediction.output], [[reference] for reference in prediction.references])
        return (float(found.sys_len), float(found.ref_len), *map(float, found.counts), *map(float, found.totals))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        said, expected = sums[..., 0], sums[..., 1]
        matched, counted = sums[..., 2 : 2 + LONGEST_GRAM], sums[..., 2 + LONGEST_GRAM :]
        # An order without a match counts as half a match, the next such order as a quarter, and so on.
        halves = np.cumsum((matched == 0) & (counted > 0), axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(matched > 0, matched, 0.5**halves) / counted
            mean = np.exp(np.where(counted > 0, np.log(precision), -np.inf).mean(-1))
            brevity = np.where(said < expected, np.exp(1 - expected / said), 1.0)
        return np.where(matched.any(-1), brevity * mean, 0.0)

    def signature(self) -> str:
        return signature_of(_bleu())


def signature_of(metric: BLEU | CHRF | TER) -> str:
    """sacrebleu's, without the number of references, which is each row's own."""
    metric.num_refs = -1
    return str(metric.get_signature()).partition("|")[2]


class Words:
    """rouge-score's own tokenizer knows ASCII only; this gives the same words for ASCII and all others too."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@cache
def _scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    return RougeScorer([kind], tokenizer=Words())


@cache
def _bleu() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
