"""prepare(): what is dropped, split, counted and refused, and that stores do not depend on how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.data import tokenise
from tunesmith.data.audit import Contradictions
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.declared import ObjectiveNeeds
from tunesmith.errors import InputError, RefusedError, ResourceError
from tunesmith.recipe import Data
from tunesmith.types import Example, Piece, Row


@dataclass
class Words:
    """A renderer of one token a word: its length. Two words of the answer are cut beyond `sequence_length`."""

    sequence_length: int = 16
    fingerprint: str = "words"


class Chat:
    """Trains the words of the last assistant turn; the others weigh 0."""

    needs = ObjectiveNeeds("", "lm", frozenset({"messages", "text"}), frozenset({"decoder"}), trains_tokens=True)

    def __init__(self) -> None:
        self.fitted: list[str] = []
        self.calls = 0
        self.fits = 0

    def fit(self, rows: Iterable[Row]) -> None:
        assert self.calls == 0
        self.fits += 1
        self.fitted = [row.where for row in rows]

    def describe(self) -> dict[str, Any]:
        return {}

    def example(self, row: Row, renderer: Any) -> Example:
        if row.value.get("text") == "bad":
            raise InputError("this row cannot be rendered", "mend it")
        if row.value.get("text") == "dead":
            os._exit(9)
        messages = row.value.get("messages", [{"role": "assistant", "content": row.value.get("text")}])
        ids: list[int] = []
        weights: list[float] = []
        for message in messages:
            words = [] if message["content"] in ("<empty>", "< empty >") else message["content"].split()
            ids += [len(word) for word in words]
            trained = message["role"] == "assistant" and message.get("train", True)
            weights += [float(trained)] * len(words)
        n = renderer.sequence_length
        piece = Piece(np.array(ids[:n], dtype=np.int32), np.array(weights[:n], dtype=np.float32))
        return Example((piece,), cut=len(ids[n:]), cut_trained=int(sum(weights[n:])))


class Labels(Chat):
    """Classes as a column; no token is trained."""

    needs = ObjectiveNeeds("", "pooled", frozenset({"label"}), frozenset({"encoder"}))

    def fit(self, rows: Iterable[Row]) -> None:
        super().fit(rows := list(rows))
        self.labels = sorted({row.value["label"] for row in rows})

    def describe(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def example(self, row: Row, renderer: Any) -> Example:
        known = row.value["label"] in self.labels
        column = self.labels.index(row.value["label"]) if known else -1
        ids = np.array([len(word) for word in row.value["text"].split()], dtype=np.int32)
        return Example((Piece(ids),), {"label": column})


def ask(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def classed(n: int, of: Sequence[str] = ("a", "b"), start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": of[i % len(of)]} for i in range(start, start + n)]


def asked(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [ask(f"question number {i}", f"answer {i}") for i in range(start, start + n)]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def call(
        objective: Any = None,
        seed: int = 17,
        workers: int = 1,
        renderer: Any = None,
        memory: Mapping[str, Any] | None = None,
        progress: Any = None,
        **data: Any,
    ) -> Prepared:
        for key, value in data.items():
            if isinstance(value, list) and key in ("train", "validation", "test") and "path" not in value[0]:
                (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in value))
                data[key] = f"{key}.jsonl"
        recipe = Data(**{"train": "unused.jsonl", **data})
        return prepare(
            recipe,
            tmp_path,
            objective or Chat(),
            renderer or Words(),
            seed,
            tmp_path / "cache",
            workers,
            memory,
            progress,
        )

    return call


def wheres(store: Any) -> list[str]:
    return [store.row(i).where for i in range(len(store))]


# ---------------------------------------------------------------- what is made


def test_splits_stores_and_audit(run: Any) -> None:
    objective = Labels()
    got = run(objective, train=classed(40), validation=classed(4, start=100), test=classed(6, start=200))
    assert (len(got.train), len(got.validation), len(got.tests["test"])) == (40, 4, 6)
    assert objective.fits == 1
    assert objective.fitted == [f"train.jsonl:{i}" for i in range(1, 41)]
    assert got.train.row(3).value == {"text": "text number 3", "label": "b"}
    assert got.train.column("label").tolist() == [0, 1] * 20
    assert got.repeats.tolist() == [1.0] * 40
    train = got.audit.train
    assert (train.rows, train.examples, train.tokens, train.trained) == (40, 40, 120, 0)
    assert train.files[0]["name"] == "train.jsonl"
    assert train.files[0]["rows"] == 40
    assert len(train.files[0]["sha256"]) == 64
    assert train.formats == ["text+label"]
    assert train.labels == {"a": 20, "b": 20}
    assert (train.masked, train.empty, train.truncated) == (0, 0, 0)
    assert got.audit.tests["test"].labels == {"a": 3, "b": 3}
    assert got.audit.lengths.edges == [0, 16]
    assert got.audit.lengths.counts == [40]
    assert got.audit.shown == 19
    assert json.loads(json.dumps(got.audit.to_json()))["train"]["rows"] == 40


def test_shared_rows_are_dropped_from_train_and_told(run: Any) -> None:
    train = [*asked(100), ask("Question  NUMBER 500", "else"), ask("question number 200", "x")]
    got = run(
        train=train, validation=asked(3, start=500), test={"one": "one.jsonl"}, memory={"one": asked(200, start=200)}
    )
    assert len(got.train) == 100
    assert got.audit.dropped == {"shared": 2, "empty": 0, "masked": 0}
    assert got.audit.shared_with_validation.rows == 1
    assert got.audit.shared_with_validation.places == [("validation.jsonl:1", "train.jsonl:101")]
    overlap = got.audit.shared_with_tests["one"]
    assert (overlap.rows, overlap.of, overlap.train_rows) == (1, 200, 1)
    assert overlap.places == [("one[0]", "train.jsonl:102")]


def test_leaks_over_one_percent_are_refused(run: Any) -> None:
    data = {"train": asked(100), "test": asked(50, start=99)}
    with pytest.raises(RefusedError) as caught:
        run(**data)
    assert caught.value.cause == "1 of 50 rows of test stand in train too, such as test.jsonl:1 = train.jsonl:100"
    assert "data.allow: [leaks]" in caught.value.remedy
    got = run(**data, allow=["leaks"])
    assert len(got.train) == 99
    assert got.audit.shared_with_tests["test"].rows == 1


def test_duplicates_are_counted_and_kept(run: Any) -> None:
    got = run(train=[*asked(10), ask("question  number 3", "ANSWER 3"), ask("question number 3", "other")])
    assert got.audit.duplicates == 1
    assert len(got.train) == 12


def test_the_same_text_with_different_answers_is_told(run: Any) -> None:
    rows = [*classed(4, ["a", "b"]), {"text": "x", "label": "a"}, {"text": "x", "label": "a"}]
    assert run(Labels(), train=rows).audit.contradictions == Contradictions(0, [])
    rows += [{"text": " X", "label": "b"}, {"text": "y", "label": "b"}, {"text": "Y", "label": "a"}]
    places = [("train.jsonl:5", "train.jsonl:7"), ("train.jsonl:8", "train.jsonl:9")]
    found = run(Labels(), train=rows).audit.contradictions
    assert (found.rows, found.places) == (5, places)
    conversations = [ask("q?", "one answer"), ask("q?", "another")]
    assert run(train=conversations).audit.contradictions is None  # both may be right


def test_one_label_is_one_however_its_accents_are_written(run: Any) -> None:
    labels = ["caf\u00e9", "cafe\u0301", "bar"]
    got = run(Labels(), train=classed(6, labels), test=classed(3, labels, start=6))
    assert got.audit.train.labels == {"bar": 2, "caf\u00e9": 4}
    assert got.audit.tests["test"].labels == {"bar": 1, "caf\u00e9": 2}


def test_a_validation_fraction_is_stratified_and_leak_free(run: Any) -> None:
    rows = classed(200, ["a"] * 9 + ["b"])
    got = run(Labels(), train=[*rows, *rows[:50]], test=classed(5, start=200), validation=0.1)
    seen = {row.value["text"] for row in map(got.train.row, range(len(got.train)))}
    held = {row.value["text"] for row in map(got.validation.row, range(len(got.validation)))}
    assert not seen & held
    assert len(held) == 20
    assert len(seen) == 180
    assert got.audit.validation.labels.keys() == {"a", "b"}
    again = run(Labels(), train=[*rows, *rows[:50]], test=classed(5, start=200), validation=0.1)
    assert wheres(again.validation) == wheres(got.validation)
    other = run(Labels(), seed=18, train=[*rows, *rows[:50]], test=classed(5, start=200), validation=0.1)
    assert wheres(other.validation) != wheres(got.validation)


def test_sets_are_mixed_with_weights_and_limits(run: Any, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked(30)))
    other = "".join(json.dumps({"q": row["prompt"], "a": row["completion"]}) + "\n" for row in asked(50, start=100))
    (tmp_path / "other.jsonl").write_text(other)
    got = run(
        train=[
            {"path": "one.jsonl", "weight": 0.5},
            {"path": "other.jsonl", "limit": 20, "columns": {"prompt": "q", "completion": "a"}},
        ]
    )
    assert got.repeats.tolist() == [0.5] * 30 + [1.0] * 20
    assert got.sources.tolist() == [0] * 30 + [1] * 20
    assert wheres(got.train)[:2] == ["one.jsonl:1", "one.jsonl:2"]
    assert all(where.startswith("other.jsonl:") for where in wheres(got.train)[30:])
    assert [entry["rows"] for entry in got.audit.train.files] == [30, 50]
    assert got.audit.train.rows == 50


def test_rows_in_memory(run: Any) -> None:
    got = run(memory={"train": asked(5), "validation": asked(2, start=10), "hard": asked(3, start=20)})
    assert wheres(got.train) == [f"train[{i}]" for i in range(5)]
    assert (len(got.validation), len(got.tests["hard"])) == (2, 3)
    changed = run(memory={"train": [*asked(4), ask("new", "row")]})
    assert changed.train.row(4).value["messages"][0]["content"] == "new"


def test_empty_examples_are_dropped_and_counted(run: Any) -> None:
    rows = [{"text": "a b"}, {"text": "<empty>"}, {"text": "c"}]
    got = run(memory={"train": rows, "test": [{"text": "< empty >"}, {"text": "x"}]})
    assert wheres(got.train) == ["train[0]", "train[2]"]
    assert got.audit.dropped["empty"] == 1
    assert got.audit.train.empty == 1
    assert got.repeats.tolist() == [1.0, 1.0]
    assert wheres(got.tests["test"]) == ["test[1]"]
    with pytest.raises(InputError, match="no row of train has anything in it to use"):
        run(memory={"train": [{"text": "<empty>"}, {"text": "< empty >"}]})


# ---------------------------------------------------------------- what is refused


def test_rows_with_nothing_to_learn(run: Any) -> None:
    rows = [*asked(3), {"prompt": "a", "completion": [{"role": "assistant", "content": "b", "train": False}]}]
    with pytest.raises(RefusedError) as caught:
        run(train=rows)
    assert caught.value.cause == "1 of 4 rows of train have nothing to learn: train.jsonl:4"
    got = run(train=rows, allow=["masked"])
    assert len(got.train) == 3
    assert got.audit.dropped["masked"] == got.audit.train.masked == 1


def test_cut_answers(run: Any) -> None:
    rows = [*asked(3), ask("a b c", "d e f g")]
    with pytest.raises(RefusedError) as caught:
        run(train=rows, renderer=Words(6))
    assert caught.value.cause == "the answers of 1 of 4 rows of train are cut: train.jsonl:4"
    assert "train.sequence_length to 7 or more" in caught.value.remedy
    got = run(train=rows, renderer=Words(6), allow=["truncated"])
    assert (got.audit.train.truncated, got.audit.train.truncated_answers) == (1, 1)
    assert got.train.cut.tolist() == [0, 0, 0, 1]
    assert run(train=rows, renderer=Words(7)).audit.train.truncated == 0


def test_labels_that_train_lacks(run: Any) -> None:
    data = {"train": classed(10), "test": classed(6, ["a", "c", "d"], start=50)}
    with pytest.raises(RefusedError) as caught:
        run(Labels(), **data)
    assert caught.value.cause == "4 rows of test have labels that train lacks: 'c', 'd'"
    assert caught.value.remedy.startswith("add rows of these labels")
    with pytest.raises(RefusedError) as caught:
        run(Labels(), train=data["train"], test=classed(6, ["a", "A"], start=50))
    assert caught.value.remedy.startswith("write 'A' as train does, 'a'; or add rows of these labels")
    got = run(Labels(), **data, allow=["unknown_labels"])
    assert got.audit.unknown_labels == {"test": {"c": 2, "d": 2}}
    assert got.tests["test"].column("label").tolist() == [-1, 0, -1, -1, 0, -1]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"train": classed(1)}, "train has one row in train.jsonl"),
        ({"train": classed(5, ["a"])}, "all 5 rows of train have the label 'a' in train.jsonl"),
        (
            {"train": classed(3), "test": classed(2), "allow": ["leaks"]},
            "train has one row that no held-out set has too",
        ),
        (
            {"train": [{"text": "x", "label": "a"}, {"text": "x", "label": "b"}], "validation": 0.5},
            "no row of train can be held out",
        ),
        ({"train": classed(2), "validation": 0.5}, "no row of train can be held out"),
        ({"train": asked(4)}, "the objective cannot learn from rows of 'prompt+completion' (train.jsonl)"),
        (
            {"train": classed(4), "test": [{"text": "a"}]},
            "test.jsonl (test) has rows of 'text', train.jsonl (train) of",
        ),
        (
            {"train": classed(4), "validation": [{"text": "a", "labels": ["a"]}]},
            "validation.jsonl (validation) has rows of 'text+labels'",
        ),
        ({"train": [*classed(4), {"text": "a"}]}, "two schemas in one file: train.jsonl:1 is 'text+label'"),
        ({"train": [*classed(4), {"text": "a", "label": None}]}, "train.jsonl:5: label: the value is null"),
        ({"train": classed(4), "test": {"train": "test.jsonl"}}, "data.test: a test set cannot be called 'train'"),
        ({"train": classed(4), "columns": {"text": "body"}}, "train.jsonl:1: there is no column 'body'"),
        ({"train": classed(4), "format": "csv"}, "unknown data format 'csv'"),
        ({"train": "absent.jsonl"}, "absent.jsonl: no such file or folder"),
    ],
)
def test_bad_data(run: Any, data: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError) as caught:
        run(Labels(), **data)
    assert caught.value.cause.startswith(cause)
    assert caught.value.remedy


def test_an_error_of_the_objective_is_told_with_its_place(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"a {i}"} for i in range(3)] + [{"text": "bad"}]
    with pytest.raises(InputError, match=r"train\.jsonl:4: this row cannot be rendered \(mend it\)"):
        run(train=rows)
    monkeypatch.setattr(tokenise, "PARALLEL_ROWS", 1)
    with pytest.raises(InputError, match=r"train\.jsonl:4: this row cannot be rendered \(mend it\)"):
        run(train=rows, workers=2)


# ---------------------------------------------------------------- the cache and the workers


def test_stores_are_made_once_for_each_meaning(run: Any, tmp_path: Path) -> None:
    def made() -> int:
        return len(list((tmp_path / "cache" / "tokens").glob("*/meta.json")))

    told: list[str] = []
    rows, more = asked(10), asked(11)
    first = run(train=rows, progress=lambda what, done, total: told.append(f"{what} {done}/{total}"))
    assert made() == 1
    assert told == ["reading train.jsonl 10/10", "tokenising train 10/10"]
    told.clear()
    second = run(train=rows, progress=lambda what, done, total: told.append(what))
    assert told == []
    assert second.train.fingerprint == first.train.fingerprint
    assert second.audit == first.audit
    run(train=rows, renderer=Words(12))
    run(train=rows, renderer=Words(fingerprint="other"))
    run(train=rows, seed=18)
    assert made() == 4
    assert run(train=more).train.fingerprint != first.train.fingerprint
    assert made() == 5
    relearned = Chat()
    relearned.option = 3  # type: ignore[attr-defined]
    run(relearned, train=rows)
    assert made() == 6


def test_a_damaged_cache_is_mended(run: Any, tmp_path: Path) -> None:
    first = run(train=asked(10))
    for file in (tmp_path / "cache").glob("*/*/*"):
        file.write_bytes(b"damage")
    assert run(train=asked(10)).train.fingerprint == first.train.fingerprint


def test_one_and_two_workers_make_the_identical_store(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [ask(f"question {'word ' * (i % 7)}{i}", f"answer {i}") for i in range(1000)]
    alone = run(train=rows, validation=0.1)
    parts = [(tmp_path / "cache" / "tokens" / s.path.name) for s in (alone.train, alone.validation)]
    expected = [{f.name: f.read_bytes() for f in part.iterdir()} for part in parts]
    (tmp_path / "cache").rename(tmp_path / "old")
    monkeypatch.setattr(tokenise, "PARALLEL_ROWS", 50)
    monkeypatch.setattr(tokenise, "CHUNK", 64)
    together = run(train=rows, validation=0.1, workers=2)
    assert [{f.name: f.read_bytes() for f in part.iterdir()} for part in parts] == expected
    assert together.train.fingerprint == alone.train.fingerprint


def test_a_worker_that_dies_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PARALLEL_ROWS", 1)
    with pytest.raises(ResourceError) as caught:
        run(train=[{"text": "a"}, {"text": "dead"}], workers=2)
    assert caught.value.remedy == "set place.workers lower"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "validation", "test"),
    [("banking77", 9000, 0, 7), ("clinc150_oos", 15100, 3, 2)],
)
def test_public_sets_have_the_leaks_that_are_known(
    data_sets: Path, tmp_path: Path, name: str, rows: int, validation: int, test: int
) -> None:
    """As counted apart from this code: held-out rows that stand in train once case and spaces are levelled."""
    data = Data(train=name, validation=name, test=name)
    got = prepare(data, data_sets, Labels(), Words(), 17, tmp_path / "cache")  # type: ignore[arg-type]
    found = got.audit
    assert found.train.files[0]["rows"] == rows
    assert found.shared_with_validation.rows == validation  # type: ignore[union-attr]
    assert found.shared_with_tests["test"].rows == test
    assert found.dropped["shared"] == validation + test
    assert len(got.train) == rows - validation - test
