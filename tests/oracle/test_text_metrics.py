"""Text metrics against their published definitions, worked by hand, and against the libraries' own numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu import corpus_bleu, sentence_chrf

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import applicable
from tunesmith.evaluation.text_metrics import Words
from tunesmith.types import Prediction

TEXTS = (
    ("the cat was found under the bed", "the cat was under the bed"),
    ("police kill the gunman", "police killed the gunman"),
    ("It's 12,50 EUR - a fair_price!", "its 12.50 eur: fair price"),
    ("", "something"),
    ("completely different", "nothing shared here"),
)


def share(name: str, output: str, reference: str) -> float:
    value, one = METRICS.get(name)([]).statistics(Prediction(output, reference, "row"))
    assert one == 1.0
    return value


@pytest.mark.parametrize(
    ("output", "reference", "f1"),
    [
        ("the Cat sat", "a cat sat!", 1.0),  # articles, case and punctuation do not count
        ("cat cat", "cat", 2 / 3),  # one of two words shared, counted once
        ("dog", "cat", 0.0),
        ("the", "a", 1.0),  # both are empty then
        ("", "cat", 0.0),
        ("in New York City", "New York", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
    ],
)
def test_token_f1_counts_as_squad_does(output: str, reference: str, f1: float) -> None:
    assert share("token_f1", output, reference) == pytest.approx(f1)


@pytest.mark.parametrize(("output", "reference"), TEXTS)
@pytest.mark.parametrize(("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_that_of_rouge_score_on_ascii(name: str, kind: str, output: str, reference: str) -> None:
    expected = RougeScorer([kind]).score(reference, output)[kind].fmeasure
    assert share(name, output, reference) == pytest.approx(expected)
    assert Words().tokenize(output) == DefaultTokenizer(use_stemmer=False).tokenize(output)


def test_rouge_l_of_lins_example() -> None:
    """Lin 2004, section 3.1: S2 = "police kill the gunman" against S1 = "police killed the gunman" has 3/4."""
    assert share("rouge_l", "police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert share("rouge_l", "the gunman kill police", "police killed the gunman") == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["Größe überprüft", "гость пришёл", "東京に行く"])
def test_words_of_other_scripts_count(text: str) -> None:
    assert share("rouge_1", text, text) == 1.0
    assert len(Words().tokenize(text)) == {"東京に行く": 5}.get(text, 2)


@pytest.mark.parametrize(("output", "reference"), TEXTS)
def test_chrf_is_sacrebleus_as_a_fraction(output: str, reference: str) -> None:
    assert share("chrf", output, reference) == pytest.approx(sentence_chrf(output, [reference]).score / 100)


@pytest.mark.parametrize("name", ["token_f1", "rouge_l", "chrf"])
def test_a_row_without_reference_is_named(name: str) -> None:
    with pytest.raises(InputError, match=r"needs a reference, and rows.jsonl:3 has none"):
        METRICS.get(name)([]).statistics(Prediction("x", None, "rows.jsonl:3"))


WORDS = st.lists(st.sampled_from(("the", "cat", "sat", "on", "a", "mat", ".", "it's")), max_size=9).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_bleu_is_that_of_sacrebleu_over_all_rows(pairs: list[tuple[str, str]]) -> None:
    metric = METRICS.get("bleu")([])
    rows = np.array([metric.statistics(Prediction(said, expected, "row")) for said, expected in pairs])
    once, twice = (
        corpus_bleu([said for said, _ in rows_of], [[expected for _, expected in rows_of]]).score / 100
        for rows_of in (pairs, 2 * pairs)
    )
    assert float(metric.aggregate(rows.sum(0))) == pytest.approx(once)
    resamples = metric.aggregate(np.stack([rows.sum(0), 2 * rows.sum(0)]))
    assert resamples.tolist() == pytest.approx([once, twice])


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6))
def test_bleu_of_two_references_is_sacrebleus(rows: list[tuple[str, str, str]]) -> None:
    metric = METRICS.get("bleu")([])
    found = [metric.statistics(Prediction(said, one, "row", other_references=(two,))) for said, one, two in rows]
    said, *references = map(list, zip(*rows, strict=True))
    assert float(metric.aggregate(np.sum(found, axis=0))) == pytest.approx(corpus_bleu(said, references).score / 100)


@pytest.mark.parametrize(
    ("references", "measured"),
    [
        (["a sentence of five words", "and one of six words too", "short"], True),
        (["short", "answers here", "a sentence of five words"], False),
        (['{"a": "an object of seven words or so"}'] * 2, False),
    ],
)
def test_bleu_is_measured_on_sentences(references: list[str], measured: bool) -> None:
    predictions = [Prediction("said", reference, "row") for reference in references]
    assert ("bleu" in applicable(["bleu"], predictions)) == measured
