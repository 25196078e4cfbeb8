"""The similarity of texts by an encoder: its vectors against transformers' own, and the example that was published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS, meaning_metrics
from tunesmith.evaluation.answers import read
from tunesmith.evaluation.metrics import applicable, build, scored, statistics
from tunesmith.evaluation.preflight import check_metrics
from tunesmith.evaluation.run import measure
from tunesmith.models import fetch
from tunesmith.types import Prediction, Row

TEXTS = ["the parcel is late", "the parcel is late and the customer is angry", "a", "where is the parcel?"]


def forget() -> None:
    for known in (meaning_metrics._local, meaning_metrics._encoder):
        known.cache_clear()


@pytest.fixture
def encoder(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny model in the place of the catalog's encoder."""
    own = fetch.resolve
    monkeypatch.setattr(fetch, "resolve", lambda name: own(str(tiny_bert) if name == meaning_metrics.ENCODER else name))
    forget()
    yield tiny_bert
    forget()


def test_vectors_are_the_means_of_the_last_hidden_states(encoder: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(TEXTS, meaning_metrics.vectors(TEXTS), strict=True):
        with torch.no_grad():
            mean_D = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean_D / mean_D.norm()).numpy(), abs=1e-5)


@pytest.mark.usefixtures("encoder")
def test_the_nearest_reference_counts_and_rows_keep_their_similarity() -> None:
    rows = [Prediction(TEXTS[0], TEXTS[2], "f:1", other_references=(TEXTS[1],)), Prediction(TEXTS[3], TEXTS[3], "f:2")]
    found = scored(["similarity"], rows)
    a, b, c, _ = meaning_metrics.vectors(TEXTS)
    assert [p.scores["similarity"] for p in found] == pytest.approx([max(a @ b, a @ c), 1.0])
    record = measure("tuned", "test", found, build(["similarity"], found), 0)[0]
    assert record.value == pytest.approx(np.mean([max(a @ b, a @ c), 1.0]))
    assert (record.signature or "").startswith("encoder:all-minilm-l6-v2|pooling:mean|weights:")
    assert scored(["exact_match"], rows) == rows
    assert (applicable(["similarity"], found), applicable(["similarity"], rows)) == (["similarity"], [])


def test_without_vectors_there_is_none(encoder: Path) -> None:
    with pytest.raises(InputError, match="similarity needs vectors of answers, and that to f:1 was kept without"):
        statistics(METRICS.get("similarity")([]), [Prediction("a", "b", "f:1")])
    asked = Row({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}, "f:1")
    assert check_metrics(["similarity"], [], "test", [asked], None) == ["similarity"]
    with pytest.raises(InputError, match="similarity needs a reference, and f:2 has none"):
        check_metrics(["similarity"], [], "test", [replace(asked, value={"text": "a"}, where="f:2")], None)


def test_a_run_is_measured_by_it(encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": text} for i, text in enumerate([*TEXTS, "thanks"])]
    recipe = {
        "model": str(tiny_llama),
        "data": {"train": "train", "validation": "validation", "test": "test"},
        "objective": "sft",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1, "batch_size": 2, "early_stopping": {"metric": "similarity"}},
        "precision": "fp32",
        "place": {"device": "cpu", "threads": 1},
        "evaluate": {"metrics": ["similarity"], "max_new_tokens": 4, "base": False},
    }
    found = api.train(recipe, data={"train": rows[3:], "validation": rows[2:3], "test": rows[:2]}, out=tmp_path / "run")
    kept = [row.answers["tuned"] for row in read(tmp_path / "run", "test")]
    said = meaning_metrics.vectors([answer.output for answer in kept])
    expected = (said * meaning_metrics.vectors(TEXTS[:2])).sum(1)
    assert [answer.scores["similarity"] for answer in kept] == pytest.approx(expected.tolist())
    assert found.records[0]["value"] == pytest.approx(expected.mean())
    assert '"similarity"' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_published_similarities_of_the_real_encoder(model_cache: Path) -> None:
    """Those of sentence-transformers' first example, for all-MiniLM-L6-v2."""
    forget()
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    found = meaning_metrics.vectors(texts)
    forget()
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert found @ found.T == pytest.approx(np.array(published), abs=1e-4)


@pytest.mark.usefixtures("encoder")
def test_what_a_model_is_compared_with_is_measured_by_it_too(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"who is {i}?", "context": f"{i} is Ada, {i + 1} is Bo.", "answers": ["Ada"]} for i in range(12)
    ]
    recipe = {
        "model": str(tiny_bert),
        "objective": "span",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1, "batch_size": 2},
        "place": {"threads": 1},
        "evaluate": {"metrics": ["similarity"]},
    }
    found = api.train(recipe, data={"train": rows[:6], "test": rows[6:]}, out=tmp_path / "run")
    said = [row.answers["overlap"].output for row in read(tmp_path / "run", "test")]
    expected = (meaning_metrics.vectors(said) * meaning_metrics.vectors(["Ada"] * len(said))).sum(1)
    assert found.record("similarity", model="overlap")["value"] == pytest.approx(expected.mean())
