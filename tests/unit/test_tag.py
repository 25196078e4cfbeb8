"""Tagging: its loss against a slow version, words against tokens, and runs that beat the frequent tags."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from kinds import policy_of
from tunesmith import api
from tunesmith.data.align import Aligner
from tunesmith.data.chat import Renderer
from tunesmith.data.formats import convert
from tunesmith.data.pack import collate, split
from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.objectives.tag import Tag
from tunesmith.types import Batch, Example, Piece, Row, Step, Want

NAMES = ("Ada", "Bob", "Cleo", "Dan")
PLACES = ("Rome", "Oslo", "Paris", "Cairo")


def _row(draw: random.Random, number: int) -> dict[str, Any]:
    """A name is a person's behind "met" and a company's behind "joined", so that a word alone does not tell."""
    verb, kind = draw.choice([("met", "PER"), ("joined", "ORG")])
    name = draw.choice(NAMES)
    return {
        "tokens": ["we", verb, name, f"no{number}", "in", draw.choice(PLACES)],
        "tags": ["O", "O", f"B-{kind}", f"I-{kind}", "O", "B-LOC"],
    }


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(start)
    return [_row(draw, 1000 * start + i) for i in range(count)]


def _fitted() -> Tag:
    objective = Tag(Tag.Options())
    objective.fit([Row(row, "here") for row in _rows(40)])
    return objective


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from(["bert", "llama"]),
    st.booleans(),
)
def test_the_loss_is_the_cross_entropy_of_the_labelled_positions(
    labels: list[list[int]], family: str, padded: bool
) -> None:
    objective = Tag(Tag.Options())
    objective.tags = list("abcd")
    policy = policy_of(family)
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.nn.init.normal_(policy.heads["tag"].linear.weight)
    policy.eval()
    examples = [
        Example((Piece(np.arange(3, 3 + len(own)).astype(np.int32), labels_T=np.array(own, np.int32)),))
        for own in labels
    ]
    batch = collate(examples, range(len(examples)), packed=True, pad_id=0)
    terms = objective.terms(policy, batch)
    part = terms.parts["cross_entropy"]
    hidden_BTD = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    head, wanted, owners, right = policy.heads["tag"].linear, [], [], 0
    for segment in batch.segments:
        for at, label in enumerate(labels[segment.example]):
            if label >= 0:
                logits = head.weight @ hidden_BTD[segment.row, segment.start + at].float() + head.bias
                wanted.append(float((torch.logsumexp(logits, 0) - logits[label]).detach()))
                owners.append(segment.example)
                right += int(logits.argmax()) == label
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert part.example_U.tolist() == owners
    assert terms.metrics["tag_accuracy"] == (right, len(wanted))
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"cross_entropy": max(1, 2 * len(wanted))}
    for index, alone in enumerate(split(batch, [[i] for i in range(len(examples))], packed=not padded, pad_id=0)):
        assert _labels(alone) == [label for label in labels[index] if label >= 0]


def _labels(batch: Batch) -> list[int]:
    return batch.target_BT.flatten()[batch.unit_U].tolist()


def test_labels_are_kept_in_a_store(tmp_path: Path) -> None:
    ids, labels = np.array([5, 6, 7], np.int32), np.array([-1, 2, 0], np.int32)
    pieces = (Piece(ids, labels_T=labels), Piece(ids, np.array([0, 0, 0.5], np.float32)), Piece(ids))
    store = TokenStore.build(tmp_path / "s", [(Example(pieces), Row({"text": "a"}, "f:1"))])
    one, other, none = store.example(0).pieces
    assert (one.labels_T is not None, one.weights_T) == (True, None)
    assert one.labels_T is not None
    assert one.labels_T.tolist() == [-1, 2, 0]
    assert other.weights_T is not None
    assert (other.weights_T.tolist(), other.labels_T) == ([0, 0, 0.5], None)
    assert (none.weights_T, none.labels_T) == (None, None)
    assert store.trained.tolist() == [3]
    with pytest.raises(ValueError, match="3 tokens and 2 labels"):
        TokenStore.build(tmp_path / "t", [(Example((Piece(ids, labels_T=labels[:2]),)), Row({"text": "a"}, "f:1"))])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["tiny_llama", "tiny_bert"]),
    st.lists(st.text("abcdemn. \u00e9\u4e2d\U0001f600\u200d", min_size=1, max_size=12).filter(str.strip), min_size=1),
    st.one_of(st.none(), st.integers(4, 30)),
)
def test_each_word_is_told_by_its_first_token(
    tiny_llama: Path, tiny_bert: Path, model: str, words: list[str], length: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained({"tiny_llama": tiny_llama, "tiny_bert": tiny_bert}[model])
    windows = Renderer(tokenizer, sequence_length=length).words(words)
    found = [word for window in windows for word in window.first]
    assert found == sorted(set(found))
    text = tokenizer(" ".join(words), add_special_tokens=False)
    ids = [i for window in windows for i in window.input_ids.tolist()]
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id} - {None}
    assert [i for i in ids if i not in special] == [i for i in text["input_ids"] if i not in special]
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    tokens = list(text["input_ids"])
    behind = 0
    for window in windows:
        own = [(at, i) for at, i in enumerate(window.input_ids.tolist()) if i not in special]
        assert length is None or len(window.input_ids) <= length
        places = {at: behind + number for number, (at, _) in enumerate(own)}
        for word, at in window.first.items():
            token = places[at]
            assert tokens[token] == window.input_ids[at]
            span = text.token_to_chars(token)
            assert span.end > starts[word]  # it holds something of the word, and no token before it did
            if token:
                before = text.token_to_chars(token - 1)
                assert before.end <= starts[word] or before.start < starts[word]
        behind += len(own)


def test_a_word_may_have_no_token_and_a_text_no_room(tiny_bert: Path) -> None:
    backend = Tokenizer(WordLevel({"?": 0, "red": 1}, unk_token="?"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = WhitespaceSplit()
    assert Aligner(backend).words(["red", "\u200d", "x", "red"]) == ([1, 0, 1], [0, None, 1, 2])
    backend.pre_tokenizer = None  # one token for all of the text: it is the first word's
    assert Aligner(backend).words(["red", "red"]) == ([0], [0, None])
    with pytest.raises(InputError, match="so no text has room"):
        Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=2).words(["red"])


def test_what_is_learned_of_words(tiny_bert: Path) -> None:
    objective = _fitted()
    assert objective.tags == ["B-LOC", "B-ORG", "B-PER", "I-ORG", "I-PER", "O"]
    assert objective.usual == "O"
    assert objective.words.keys() >= set(PLACES) | set(NAMES)
    assert objective.words.keys().isdisjoint({"we", "met", "joined", "in"})
    (answer,) = (
        objective.unread([Row({"tokens": ["Rome", "is", "New"], "tags": ["B-LOC", "O", "B-X"]}, "t:1")], None) or []
    )
    assert (answer.output, answer.reference) == ("B-LOC O O", "B-LOC O B-X")
    unknown = objective.example(
        Row({"tokens": ["Rome", "New"], "tags": ["B-LOC", "B-X"]}, "t"),
        Renderer(AutoTokenizer.from_pretrained(tiny_bert)),
    )
    assert unknown.pieces[0].labels_T is not None
    assert [i for i in unknown.pieces[0].labels_T.tolist() if i >= 0] == [0]
    with pytest.raises(InputError, match=r"hold one tag \(O\)"):
        Tag(Tag.Options()).fit([Row({"tokens": ["a"], "tags": ["O"]}, "t")])
    objective.adopt(objective.describe())
    with pytest.raises(InputError, match="have the tag 'B-X', which the earlier run's head does not know"):
        objective.fit([Row({"tokens": ["a"], "tags": ["B-X"]}, "t")])


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "tags: there are 1 tags for 2 words"),
        ({"tokens": [], "tags": []}, "tokens: there are no words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, r"tokens\[1\]: must be a word, this is str ' '"),
        ({"tokens": ["a"], "tags": [3]}, r"tags\[0\]: must be a tag without spaces, this is int 3"),
    ],
)
def test_rows_that_cannot_be_read(raw: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        convert(raw, "tokens+tags", {}, "f.jsonl:1")


def _recipe(model: Path, method: str, **train: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "tag",
        "method": method,
        "train": {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3, **train},
    }


@pytest.mark.parametrize(("model", "method"), [("tiny_bert", "full"), ("tiny_llama", "full")])
def test_a_run_beats_the_frequent_tags(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(request.getfixturevalue(model), method)
    result = api.train(recipe, data={"train": _rows(160), "test": _rows(60, start=1)}, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert values["tuned", "entity_f1"] > 0.9
    assert values["frequent", "entity_f1"] < 0.6
    assert next(e for e in result.effects if e["metric"] == "entity_f1")["p"] < 0.01
    plan = json.loads((result.path / "plan.json").read_text())
    assert any("the tag that each word has most often" in text for text in plan["substitutions"])
    asked: list[dict[str, Any]] = [
        {"tokens": ["we", "met", "Ada", "no7", "in", "Rome"]},
        {"text": "we joined Ada no8 in Oslo"},
    ]
    person, company = (api.predict(result.path, [row])[0].output for row in asked)
    assert person == "O O B-PER I-PER O B-LOC"
    assert company == "O O B-ORG I-ORG O B-LOC"
    again = api.evaluate(result.path, _rows(30, start=2), name="more")
    assert {r["model"] for r in again.records if r["data"] == "more"} == {"frequent", "tuned"}
    long = {"text": "we met Ada no3 in Rome " * 150}  # more tokens than the model's context has
    tags = api.predict(result.path, [long])[0].output.split()
    assert (len(tags), " ".join(tags[:6])) == (900, "O O B-PER I-PER O B-LOC")
    with pytest.raises(InputError, match="a conversation is no text"):
        api.predict(result.path, [{"prompt": "Who?"}])
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "pipeline_tag: token-classification" in card
    assert "A tagger of words, with 6 tags" in card
    if model == "tiny_bert":
        code = card.split("```python\n")[2].split("```")[0]
        code = code.replace('"path/to/this/folder"', repr(str(result.path / "model")))
        exec(code.replace('words = ["..."]', f"words = {asked[0]['tokens']}"), {})
        assert capsys.readouterr().out.splitlines()[-1] == str(person.split())
    from tunesmith import cli

    capsys.readouterr()
    assert cli.main(["chat", str(result.path), "--prompt", asked[1]["text"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == company.split()


def test_a_second_run_goes_on_with_the_tags_of_the_first(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_bert, "lora")
    recipe["train"] = {"max_steps": 2, "batch_size": 4}
    first = api.train(recipe, data={"train": _rows(20), "test": _rows(5, 1)}, out=tmp_path / "first")
    more = {"train": _rows(20, 3), "test": _rows(5, 1)}
    second = api.train({**recipe, "model": str(first.path)}, data=more, out=tmp_path / "second")
    learned = [json.loads((run.path / "plan.json").read_text())["meaning"]["objective"][2] for run in (first, second)]
    assert learned[0] == learned[1]


def test_a_merged_model_tags_as_the_run_does(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_bert, "lora", epochs=2)
    run = api.train(recipe, data={"train": _rows(40), "test": _rows(5, 1)}, out=tmp_path / "run").path
    merged = tmp_path / "merged"
    api.export(run, merged, merge=True, data=_rows(5, 2))
    rows = [{"tokens": row["tokens"]} for row in _rows(12, 3)]
    answers = [[answer.output for answer in api.predict(path, rows)] for path in (run, merged)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_tags_of_a_text_are_no_class(tiny_bert: Path) -> None:
    recipe = {**_recipe(tiny_bert, "lora"), "evaluate": {"metrics": ["macro_f1"]}}
    with pytest.raises(InputError, match=r"macro_f1 is of .*, and the answer to .* is of tags of words"):
        api.plan(recipe, data={"train": _rows(20), "test": _rows(5, 1)})
