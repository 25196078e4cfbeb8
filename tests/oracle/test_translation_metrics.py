"""TER against sacrebleu over all rows; METEOR against published scores, nltk's own with synonyms, and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics.ter import TER

from tunesmith.evaluation import METRICS, translation_metrics
from tunesmith.evaluation.metrics import build
from tunesmith.evaluation.run import measure
from tunesmith.types import Prediction

WORDS = st.lists(st.sampled_from(("the", "cat", "Cat", "cats", "sat", "on", "a", "mat", ".")), max_size=9).map(" ".join)
SENTENCE = "the cat sat on the mat"


@settings(max_examples=50)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5))
def test_ter_is_that_of_sacrebleu_over_all_rows(rows: list[tuple[str, str, str]]) -> None:
    metric = METRICS.get("ter")([])
    sums = sum(np.array(metric.statistics(Prediction(a, b, "row", other_references=(c,)))) for a, b, c in rows)
    said, *references = map(list, zip(*rows, strict=True))
    expected = TER().corpus_score(said, references)
    assert (sums[0], sums[1]) == pytest.approx((expected.num_edits, expected.ref_length))
    if sums[1]:
        assert float(metric.aggregate(sums)) == pytest.approx(expected.score / 100)


def test_ter_of_a_phrase_that_moved_is_one_edit() -> None:
    """Snover et al. 2006: a shift of any number of words counts as one edit."""
    assert METRICS.get("ter")([]).statistics(Prediction("on the mat the cat sat", SENTENCE, "row")) == (1.0, 6.0)


def meteor(output: str, reference: str, *others: str) -> float:
    return METRICS.get("meteor")([]).statistics(Prediction(output, reference, "row", other_references=others))[0]


@pytest.fixture(autouse=True)
def _without_meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation_metrics, "meanings", lambda: None)


@pytest.mark.parametrize(
    ("output", "score"), [(SENTENCE, 0.9977), ("on the mat sat the cat", 0.5), ("the cat was sat on the mat", 0.9654)]
)
def test_meteor_of_the_published_examples(output: str, score: float) -> None:
    """The three that Wikipedia's page on METEOR works out."""
    assert meteor(output, SENTENCE) == pytest.approx(score, abs=5e-5)


def test_meteor_by_hand() -> None:
    """2 of 4 words said, 2 of 3 expected, in one chunk; recall weighs nine times as much as precision."""
    mean = 10 / (1 / (2 / 4) + 9 / (2 / 3))
    assert meteor("dogs run the cat", "the cat sat") == pytest.approx(mean * (1 - 0.5 / 2**3))
    assert meteor("", "the cat") == meteor("dogs run", "the cat") == 0


def test_meteor_matches_stems_and_takes_the_nearest_reference() -> None:
    assert meteor("the cats sat", "the cat sat") == meteor("the cat sat", "the cat sat")
    assert meteor("a dog", "the cat sat", "a dog") == meteor("a dog", "a dog")


def test_meteor_uses_meanings_where_they_are_installed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Prediction("a big car", "a big auto", f"row {i}") for i in range(3)]
    without = measure("tuned", "test", rows, build(["meteor"], rows), 0)[0]
    lemma = SimpleNamespace(name=lambda: "auto")
    words = SimpleNamespace(synsets=lambda word: [SimpleNamespace(lemmas=lambda: [lemma])] if word == "car" else [])
    monkeypatch.setattr(translation_metrics, "meanings", lambda: words)
    found = measure("tuned", "test", rows, build(["meteor"], rows), 0)[0]
    assert found.value == meteor_score([["a", "big", "auto"]], ["a", "big", "car"], wordnet=words)
    assert found.value > without.value
    assert (without.signature or "").startswith("stages:exact,stem|")
    assert (found.signature or "").startswith("stages:exact,stem,synonym|")


def test_without_word_nets_files_there_are_no_meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.undo()
    translation_metrics.meanings.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])
    assert translation_metrics.meanings() is None
    translation_metrics.meanings.cache_clear()


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_sacrebleus_signature_is_kept(name: str) -> None:
    rows = [Prediction("a cat sat here", SENTENCE, f"row {i}") for i in range(2)]
    found = measure("tuned", "test", rows, build([name], rows), 0)[0]
    assert "|version:" in (found.signature or "")
    assert measure("tuned", "test", rows, build(["exact_match"], rows), 0)[0].signature is None
