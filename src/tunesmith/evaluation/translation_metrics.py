"""Metrics that translation brought: edits to the reference (TER), and words matched by stem and meaning (METEOR)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.evaluation.text_metrics import Share, Words, signature_of
from tunesmith.types import AnswerKind, Prediction

if TYPE_CHECKING:
    from sacrebleu.metrics.ter import TER


@METRICS.register("ter")
class TranslationEditRate:
    """Words to insert, delete, replace, or move as a phrase, until the output is its nearest reference, by the words of
    the references: over all rows together, case aside; sacrebleu's corpus score.

    A fraction, where sacrebleu writes percent; of several references a row has their mean length.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "ter"
    about: ClassVar[About] = About(
        "Snover et al. 2006, A Study of Translation Edit Rate with Targeted Human Annotation",
        "sacrebleu's edits per row; corpus_ter",
        "translation that people correct afterwards: how much there is to do",
    )
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "ratio"
    bounds: ClassVar[Bounds] = (0.0, float("inf"))

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference_of(prediction, self.name)
        found = _ter().corpus_score([prediction.output], [[reference] for reference in prediction.references])
        return (float(found.num_edits), float(found.ref_length))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)

    def signature(self) -> str:
        return signature_of(_ter())


@METRICS.register("meteor")
class Meteor(Share):
    """Mean over rows of METEOR: words matched as they are, then by stem, then by meaning; recall counts nine times as
    much as precision, and matches that stand in other order count less, by half at most.

    nltk's, with the weights of 2007 (alpha 0.9, beta 3, gamma 0.5), its alignment and Porter's stems, which are
    English. Meanings are WordNet's, of stems, where nltk finds it; the record's signature says whether they were used.
    Words are those of `rouge_1`.
    """

    name: ClassVar[str] = "meteor"
    about: ClassVar[About] = About(
        "Lavie and Agarwal 2007, METEOR: An Automatic Metric for MT Evaluation",
        "nltk's meteor_score",
        "English translation and summaries, where other forms of a word are as good",
    )

    def share(self, output: str, reference: str) -> float:
        from nltk.translate.meteor_score import single_meteor_score

        said, expected = (Words().tokenize(text) for text in (output, reference))
        known: Any = meanings() or _NoMeanings()
        return float(single_meteor_score(expected, said, stemmer=_stemmer(), wordnet=known))

    def signature(self) -> str:
        stages = "exact,stem" + ",synonym" * (meanings() is not None)
        return f"stages:{stages}|alpha:0.9|beta:3|gamma:0.5|nltk:{version('nltk')}"


class _NoMeanings:
    """In place of WordNet where there is none."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


@cache
def meanings() -> Any:
    """nltk's WordNet, loaded; None where its files are not installed (`python -m nltk.downloader wordnet`)."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@cache
def _ter() -> TER:
    from sacrebleu.metrics.ter import TER

    return TER()
