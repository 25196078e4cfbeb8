"""Extractive question answering: its loss and its answers against slow versions, windows, and runs."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tunesmith import api, cli
from tunesmith.data.chat import Renderer
from tunesmith.data.formats import convert
from tunesmith.data.pack import collate, split
from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation.text_metrics import SpanExactMatch, SpanF1
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.span import Span
from tunesmith.types import Prediction, Row, SampleSpec, Step, Want

NAMES, PLACES = ("Ada", "Bob", "Cleo", "Dan"), ("Rome", "Oslo", "Paris", "Cairo")
FORMAT = "context+question+answers"


def _row(draw: random.Random, number: int, unanswerable: bool = False) -> dict[str, Any]:
    name, city = draw.choice(NAMES), draw.choice(PLACES)
    kind = draw.choice("wpx" if unanswerable else "wp")
    context = f"{number}: {name} in {city}."
    return {"context": context, "question": 8 * kind, "answers": {"w": [name], "p": [city], "x": []}[kind]}


def _rows(count: int, start: int = 0, unanswerable: bool = False) -> list[dict[str, Any]]:
    draw = random.Random(start)
    return [_row(draw, 1000 * start + i, unanswerable) for i in range(count)]


def _value(raw: dict[str, Any]) -> Row:
    return Row(convert(raw, FORMAT, {}, "f.jsonl:1"), "f.jsonl:1")


@cache
def _model(folder: Path, packed: bool) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def _policy(folder: Path, objective: Span, packed: bool = True) -> Policy:
    policy = Policy(_model(folder, packed), "encoder", Tokens((1,), 0), packed=packed).eval()
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.heads["span"].linear.weight)
    return policy


TEXTS = st.text("abc, \n\u00e9\u4e2d\U0001f600", min_size=1, max_size=60).filter(str.strip)
SHAPES = (
    st.lists(st.tuples(TEXTS, st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(14, 40)),
    st.one_of(st.none(), st.integers(1, 11)),  # 14 less CLS and two SEP
)


def _drawn(drawn: list[tuple[str, int, int]]) -> list[Row]:
    rows: list[Row] = []
    for context, start, size in drawn:
        text = context[start : start + size]
        answers = [{"text": text, "answer_start": start}] if text.strip() else []
        rows.append(_value({"context": context, "question": "a?", "answers": answers}))
    return rows


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*SHAPES, st.booleans())
def test_the_loss_is_that_of_each_window_alone(
    tiny_bert: Path, drawn: list[tuple[str, int, int]], length: int | None, stride: int | None, packed: bool
) -> None:
    objective = Span(Span.Options(stride=stride))
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=length)
    examples = [objective.example(row, renderer) for row in _drawn(drawn)]
    policy = _policy(tiny_bert, objective, packed)
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    part = objective.terms(policy, batch).parts["cross_entropy"]
    hidden_BTD = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    wanted: list[float] = []
    for segment, piece in zip(batch.segments, [p for e in examples for p in e.pieces], strict=True):
        tokens = policy.heads["span"](hidden_BTD[segment.row, segment.start : segment.stop])
        assert piece.labels_T is not None
        labels = piece.labels_T.tolist()
        loss = 0.0
        for column, bit in ((0, 1), (1, 2)):
            (spot,) = [at for at, label in enumerate(labels) if label >= 0 and label & bit]
            among = [tokens[at, column] for at, label in enumerate(labels) if label >= 0]
            loss += float((torch.logsumexp(torch.stack(among), 0) - tokens[spot, column]).detach()) / 2
        wanted.append(loss)
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert part.example_U.tolist() == [segment.example for segment in batch.segments]
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"cross_entropy": 2 * len(wanted)}
    for alone in split(batch, [[i] for i in range(len(examples))], packed=packed, pad_id=0):
        of_row = [loss for loss, s in zip(wanted, batch.segments, strict=True) if s.example == alone.examples[0]]
        again = objective.terms(policy, alone).parts["cross_entropy"].loss_U.tolist()
        assert again == pytest.approx(of_row, rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*SHAPES, st.sampled_from(["tiny_bert", "tiny_llama"]))
def test_windows_are_labelled_with_the_answers_that_they_hold(
    tiny_bert: Path,
    tiny_llama: Path,
    drawn: list[tuple[str, int, int]],
    length: int | None,
    stride: int | None,
    model: str,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained({"tiny_bert": tiny_bert, "tiny_llama": tiny_llama}[model])
    renderer = Renderer(tokenizer, sequence_length=length)
    for row in _drawn(drawn):
        example = Span(Span.Options(stride=stride)).example(row, renderer)
        windows, _ = renderer.passages("a?", row.value["context"], stride)
        seen: set[int] = set()
        told = 0
        for piece, window in zip(example.pieces, windows, strict=True):
            assert length is None or len(piece.input_ids_T) <= length
            assert piece.labels_T is not None
            seen |= {at for span in window.characters for at in range(*span)}
            start, end = (next(i for i, label in enumerate(piece.labels_T) if label > 0 and label & b) for b in (1, 2))
            nowhere = 0 if model == "tiny_bert" else len(piece.input_ids_T) - 1
            assert piece.labels_T[nowhere] >= 0
            assert (start == nowhere) == (end == nowhere)
            candidates = [i for i, label in enumerate(piece.labels_T) if label >= 0 and i != nowhere]
            texts = [row.value["context"][slice(*window.characters[i - window.begin])] for i in candidates]
            assert all(text.strip() for text in texts)
            if start != nowhere:
                told += 1
                a, b = window.characters[start - window.begin][0], window.characters[end - window.begin][1]
                assert row.value["context"][a:b] == row.value["answers"][0]["text"].strip()
            elif row.value["answers"]:
                answer = row.value["answers"][0]
                held = range(window.characters[0][0], window.characters[-1][1])
                stripped = answer["text"].strip()
                first = answer["start"] + answer["text"].index(stripped)
                assert not {first, first + len(stripped) - 1} <= set(held)
        assert seen == set(range(len(row.value["context"])))
        assert bool(example.cut_trained) == (bool(row.value["answers"]) and not told)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*SHAPES, st.integers(1, 12), st.booleans())
def test_the_answer_is_the_best_span_of_all_windows(
    tiny_bert: Path,
    drawn: list[tuple[str, int, int]],
    length: int | None,
    stride: int | None,
    longest: int,
    unanswerable: bool,
) -> None:
    objective = Span(Span.Options(stride=stride, max_answer_tokens=longest))
    objective.unanswerable = unanswerable
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=length)
    rows, policy = _drawn(drawn), _policy(tiny_bert, objective, packed=True)
    plain = _model(tiny_bert, packed=False)
    found = objective.predict(policy, rows, renderer, SampleSpec(1, batch_tokens=50))
    for row, prediction in zip(rows, found, strict=True):
        context, best = row.value["context"], (-float("inf"), "")
        for window in renderer.passages("a?", context, stride)[0]:
            types = (torch.arange(len(window.input_ids)) >= window.typed_from).long()[None]
            hidden = plain(torch.from_numpy(window.input_ids)[None].long(), token_type_ids=types)
            logits = policy.heads["span"](hidden.last_hidden_state[0]).detach()
            spans = [(at, a, b) for at, (a, b) in enumerate(window.characters, window.begin) if context[a:b].strip()]
            scores = logits[[0, *(at for at, _, _ in spans)]].log_softmax(0)
            pairs = [
                (float(scores[1 + i, 0] + scores[1 + j, 1]), context[spans[i][1] : spans[j][2]].strip())
                for i in range(len(spans))
                for j in range(i, min(i + longest, len(spans)))
            ]
            if pairs and not (unanswerable and max(pairs)[0] <= float(scores[0].sum())):
                best = max(best, max(pairs), key=lambda pair: pair[0])
        assert prediction.output == best[1]
        answers = row.value["answers"]
        assert prediction.references == (answers[0]["text"] if answers else "",)


def test_a_long_question_is_cut_and_counted(tiny_bert: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=23)
    row = _value({"context": "abcdefghijklmnop", "question": "q" * 30, "answers": ["op"]})
    example = Span(Span.Options()).example(row, renderer)
    assert (example.cut, example.cut_trained) == (20, 0)
    assert [renderer.decode(p.input_ids_T) for p in example.pieces] == [
        f"[CLS]{'q' * 10}[SEP]{part}[SEP]" for part in ("abcdefghij", "hijklmnop")
    ]
    assert [p.typed_from for p in example.pieces] == [12, 12]


def test_several_answers_are_as_right_as_each_other() -> None:
    raw = {
        "context": "Ada, Bob",
        "question": "who?",
        "answers": {"text": ["Bob", "Ada", "Bob"], "answer_start": [5, 0, 5]},
    }
    row = _value(raw)
    assert row.value["answers"] == [{"text": "Bob", "start": 5}, {"text": "Ada", "start": 0}]
    (answer,) = Span(Span.Options()).unread([row], None) or []
    assert (answer.output, answer.references) == ("Ada, Bob", ("Bob", "Ada"))
    for text, f1, exact in (("the Ada!", 1.0, 1.0), ("Ada Bob", 2 / 3, 0.0), ("Bob", 1.0, 1.0), ("", 0.0, 0.0)):
        given = Prediction(text, answer.reference, "f:1", other_references=answer.other_references)
        assert SpanF1().statistics(given) == pytest.approx((f1, 1.0))
        assert SpanExactMatch().statistics(given) == (exact, 1.0)
    none = Prediction("", "", "f:1")
    assert (SpanF1().statistics(none), SpanExactMatch().statistics(none)) == ((1.0, 1.0), (1.0, 1.0))
    assert SpanF1().statistics(Prediction("Bob", "", "f:1")) == (0.0, 1.0)


def test_the_nearest_sentence() -> None:
    rows = [
        _value({"context": "Rome is old. Oslo lies far north! Is it?", "question": q, "answers": []})
        for q in ("How far is OSLO?", "?", "is it old")
    ]
    answers = Span(Span.Options()).unread(rows, None) or []
    assert [answer.output for answer in answers] == ["Oslo lies far north!", "Rome is old.", "Rome is old."]


def test_an_earlier_head_that_knows_no_unanswerable_questions() -> None:
    objective = Span(Span.Options())
    objective.fit([_value(row) for row in _rows(3)])
    assert objective.describe() == {"unanswerable": False}
    other = Span(Span.Options())
    other.adopt(objective.describe())
    other.fit([_value(row) for row in _rows(3)])
    none = _value({"context": "a", "question": "b", "answers": []})
    with pytest.raises(
        InputError, match="hold questions without an answer, which the earlier run's head does not know"
    ):
        other.fit([none])
    objective.fit([none])
    other.adopt(objective.describe())
    other.fit([_value(row) for row in _rows(3)])
    assert other.unanswerable


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ({"text": ["Ada"]}, "answers: must have as many texts as starts, this is dict"),
        ({"text": ["Ada"], "answer_start": []}, "answers: must have as many texts as starts"),
        ("Ada", "answers: must be a list, this is str 'Ada'"),
        ([{"text": " ", "answer_start": 0}], r"answers\[0\]: an answer must be text, this is str ' '"),
        ([{"answer_start": 0}], r"answers\[0\]: an answer must be text, this is NoneType None"),
        (["Dan"], r"answers\[0\]: the context does not hold 'Dan'"),
        (["Ada"], r"answers\[0\]: 'Ada' stands in the context more than once"),
        ([{"text": "Bob", "answer_start": 4}], r"'Bob' does not stand at int 4, but at 5 for the first time"),
        ([{"text": "Bob", "answer_start": "5"}], r"'Bob' does not stand at str '5', but at 5"),
    ],
)
def test_answers_that_are_refused(answers: Any, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        _value({"context": "Ada, Bob, Ada", "question": "who?", "answers": answers})


def _recipe(model: Path, method: str = "full", **train: Any) -> dict[str, Any]:
    train = {"epochs": 25, "batch_size": 8, "learning_rate": 3e-3, **train}
    return {"model": str(model), "objective": "span", "method": method, "train": train}


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_run_beats_the_nearest_sentence(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(request.getfixturevalue(model))
    data = {"train": _rows(200, unanswerable=True), "test": _rows(60, 1, unanswerable=True)}
    result = api.train(recipe, data=data, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert values["tuned", "span_f1"] > 0.7
    assert values["overlap", "span_f1"] < 0.5
    assert next(e for e in result.effects if e["metric"] == "span_f1")["p"] < 0.01
    row, none = ({"context": "7: Cleo in Oslo.", "question": 8 * kind} for kind in "px")
    assert [answer.output for answer in api.predict(result.path, [row, none])] == ["Oslo", ""]
    again = api.evaluate(result.path, _rows(30, 2), name="more")
    assert {r["model"] for r in again.records if r["data"] == "more"} == {"overlap", "tuned"}
    with pytest.raises(InputError, match="a single text is no question and context to be read"):
        api.predict(result.path, [{"text": "Who?"}])
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "pipeline_tag: question-answering" in card
    assert "A model that answers questions from a text, made from" in card
    code = card.split("```python\n")[2].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(result.path / "model")))
    capsys.readouterr()
    for asked in (row, none):
        exec(code.replace('"...", "..."', f"{asked['question']!r}, {asked['context']!r}"), {})
    assert capsys.readouterr().out.splitlines()[-2:] == ["Oslo", ""]
    assert cli.main(["chat", str(result.path), "--prompt", "Who?"]) == 2
    assert "span reads question and context and converses with nobody" in capsys.readouterr().err


def test_long_contexts_are_read_in_windows(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{**row, "context": "- " * 30 + row["context"]} for row in _rows(30)]
    recipe = _recipe(tiny_bert, sequence_length=48, epochs=1)
    run = api.train(recipe, data={"train": rows[:20], "test": rows[20:]}, out=tmp_path / "run")
    audit = json.loads((run.path / "plan.json").read_text())["audit"]["train"]
    assert audit["tokens"] > 20 * 60
    assert audit["truncated"] == audit["truncated_answers"] == 0
    far = {"context": "- " * 400 + "7: Cleo in Oslo. " + "- " * 200, "question": "where?"}
    output = api.predict(run.path, [far])[0].output
    assert output
    assert output in far["context"]
    with pytest.raises(RefusedError, match="the answers of 20 of 20 rows of train are cut"):
        api.plan(_recipe(tiny_bert, sequence_length=6), data={"train": rows[:20]})


@pytest.mark.filterwarnings("ignore:Token type ids are not supported")  # PEFT says it of tokenizer(a, b)
@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_the_card_tells_how_peft_answers(
    tiny_bert: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tiny_bert, method, epochs=2, learning_rate=3e-2, head_learning_rate=3e-2)
    run = api.train(recipe, data={"train": _rows(40), "test": _rows(5, 1)}, out=tmp_path / "run").path
    code = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8").split("```python\n")[2].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(run / "model")))
    code = code.replace(f"path/to/{tiny_bert.name}", str(tiny_bert))
    asked = [{key: row[key] for key in ("question", "context")} for row in _rows(4, 2)]
    answers = [answer.output for answer in api.predict(run, asked)]
    assert len(set(answers)) > 1
    capsys.readouterr()
    found: list[str] = []
    for row in asked:
        exec(code.replace('"...", "..."', f"{row['question']!r}, {row['context']!r}"), {})
        found.append(capsys.readouterr().out.splitlines()[-1])
    assert found == answers


def test_a_merged_model_answers_as_the_run_does(tiny_bert: Path, tmp_path: Path) -> None:
    run = api.train(
        _recipe(tiny_bert, "lora", epochs=4), data={"train": _rows(60), "test": _rows(5, 1)}, out=tmp_path / "run"
    )
    assert json.loads((run.path / "plan.json").read_text())["meaning"]["objective"][2] == {"unanswerable": False}
    api.export(run.path, tmp_path / "merged", merge=True, data=_rows(5, 2))
    rows = [{key: row[key] for key in ("context", "question")} for row in _rows(12, 3)]
    answers = [[answer.output for answer in api.predict(path, rows)] for path in (run.path, tmp_path / "merged")]
    assert answers[0] == answers[1]
    assert all(answer.reference is None for answer in api.predict(run.path, rows))


def test_a_stride_that_would_pass_over_tokens_is_refused(tiny_bert: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_bert), sequence_length=14)
    with pytest.raises(InputError, match=r"objective\.stride is 12, and a window has room for 11 tokens"):
        renderer.passages("a?", "b" * 30, 12)
    assert len(renderer.passages("a?", "b" * 9, 12)[0]) == 1  # there is one window alone
