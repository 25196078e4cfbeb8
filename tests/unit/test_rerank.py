"""Re-ranking: the loss and the order against slow versions, what is drawn as wrong, runs against the base's order."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from kinds import policy_of
from tunesmith import api, cli
from tunesmith.data.chat import Renderer
from tunesmith.data.pack import collate, split
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.rerank import Rerank
from tunesmith.types import Example, Piece, Row, SampleSpec, Step, Want

PARTNERS = {"mouse": "cheese", "eagle": "nest", "coin": "mint", "ship": "port", "book": "shelf", "wasp": "hive"}


def _passage(word: str, number: int) -> str:
    return f"{number}: {PARTNERS[word][0] * 6}"


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Which letter answers which must be learned, and others lie nearer; numbers make the queries differ."""
    draw = random.Random(start)
    words = [draw.choice(list(PARTNERS)) for _ in range(count)]
    return [
        {"query": f"{word[0] * 6} {1000 * start + i}?", "positive_ids": [f"p-{word}"]} for i, word in enumerate(words)
    ]


def _corpus() -> list[dict[str, Any]]:
    return [{"id": f"p-{word}", "text": _passage(word, n)} for n, word in enumerate(PARTNERS)]


def _recipe(model: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _corpus()), encoding="utf-8")
    return {
        "model": str(model),
        "data": {"corpus": str(path)},
        "objective": {"name": "rerank", "negatives": 3, **options},
        "method": "full",
        "precision": "fp32",
        "train": {"epochs": 10, "batch_size": 8, "learning_rate": 3e-3},
    }


def _example(right: list[int], wrong: list[int]) -> Example:
    sizes = [("passage", n) for n in right] + [("negative", n) for n in wrong]
    ids = [np.arange(3 + 7 * place, 3 + 7 * place + n).astype(np.int32) for place, (_, n) in enumerate(sizes)]
    return Example(tuple(Piece(own, role=role) for own, (role, _) in zip(ids, sizes, strict=True)))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 6), min_size=1, max_size=3), st.lists(st.integers(1, 6), min_size=0, max_size=4)
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["bert", "llama"]),
    st.booleans(),
)
def test_the_loss_is_each_right_passage_against_the_wrong_ones_of_its_row(
    drawn: list[tuple[list[int], list[int]]], family: str, packed: bool
) -> None:
    objective, policy = Rerank(Rerank.Options()), policy_of(family, packed=packed)
    policy.pooling = "last"
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.manual_seed(3)
    torch.nn.init.normal_(policy.heads["rank"].linear.weight)
    policy.eval()
    examples = [_example(*sizes) for sizes in drawn]
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    terms = objective.terms(policy, batch)
    wanted, hits = [], 0
    for example in examples:
        scores: dict[str, list[float]] = {"passage": [], "negative": []}
        for piece in example.pieces:
            alone = collate([Example((piece,))], [0], packed=packed, pad_id=0)
            hidden_BTD = policy.score(alone, Want(hidden=True)).hidden_BTD
            assert hidden_BTD is not None
            scores[piece.role].append(float(policy.heads["rank"](hidden_BTD[0, -1]).detach()))
        wrong = sum(math.exp(s) for s in scores["negative"])
        wanted.append(-np.mean([math.log(math.exp(s) / (math.exp(s) + wrong)) for s in scores["passage"]]))
        hits += max(scores["passage"]) >= max(scores["negative"], default=-math.inf)
    part = terms.parts["contrastive"]
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert part.example_U.tolist() == list(range(len(examples)))
    assert terms.metrics["accuracy"] == (hits, len(examples))
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"contrastive": 2 * len(examples)}
    for alone in split(batch, [[i] for i in range(len(examples))], packed=packed, pad_id=0):
        again = objective.terms(policy, alone).parts["contrastive"].loss_U.tolist()
        assert again == pytest.approx([wanted[alone.examples[0]]], rel=1e-3, abs=1e-4)


def _bare(tiny_bert: Path, **options: Any) -> tuple[Rerank, Policy, Renderer]:
    objective = Rerank(Rerank.Options(**options))
    policy = Policy(AutoModel.from_pretrained(tiny_bert), "encoder", Tokens((1,), 0), packed=True).eval()
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.heads["rank"].linear.weight)
    return objective, policy, Renderer(AutoTokenizer.from_pretrained(tiny_bert))


def _held() -> list[Row]:
    passages = [_passage(word, n) for n, word in enumerate(PARTNERS)]
    return [
        Row({"query": f"{word}?", "positives": [passages[n]], "negatives": passages[:n][:2]}, f"f:{n}")
        for n, word in enumerate(PARTNERS)
    ]


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_answers_are_the_first_passages_read_again(tiny_bert: Path, depth: int) -> None:
    """Each pair alone through plain transformers; what is not read again stands behind, as the base has it."""
    objective, policy, renderer = _bare(tiny_bert, depth=depth, query_prefix="q: ")
    rows, plain = _held(), AutoModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    passages = [row.value["positives"][0] for row in rows]

    @torch.no_grad()
    def vector(*texts: str) -> torch.Tensor:
        return plain(**tokenizer(*texts, return_tensors="pt")).last_hidden_state[0].mean(0)

    found = objective.predict(policy, rows, renderer, SampleSpec(1))
    before = objective.untuned(policy, rows, renderer, SampleSpec(1))
    for row, answer, base in zip(rows, found, before, strict=True):
        query = vector("q: " + row.value["query"])
        cosines = [float(torch.nn.functional.cosine_similarity(query, vector(p), dim=0)) for p in passages]
        order = sorted(passages, key=lambda p: -cosines[passages.index(p)])
        scores = {p: float(policy.heads["rank"](vector(row.value["query"], p)).detach()) for p in order[:depth]}
        wanted = [*sorted(scores, key=lambda p: -scores[p]), *order[depth:]]
        (right,) = row.value["positives"]
        assert (answer.output, answer.reference) == (wanted[0], right)
        assert answer.scores["rank"] == 1 + wanted.index(right)
        assert answer.scores["score"] == pytest.approx(max(scores.values()), abs=1e-4)
        assert answer.scores["candidates"] == len(passages)
        assert (base.output, base.scores["rank"]) == (order[0], 1 + order.index(right))


def test_wrong_passages_are_drawn_from_the_first_that_the_base_finds(tiny_bert: Path) -> None:
    objective, policy, renderer = _bare(tiny_bert, depth=3, negatives=2)
    rows = _held()
    bases = objective.untuned(policy, rows, renderer, SampleSpec(1))
    passages = list(objective._first.passages(rows))
    mined_NK = objective.mine(policy, rows, renderer)
    assert mined_NK.tolist() == objective.mine(policy, rows, renderer).tolist()
    assert len({tuple(own) for own in mined_NK.tolist()}) > 1
    near = [list(order[:]) for order in objective._orders(policy, rows, renderer)]
    for row, own, order, base in zip(rows, mined_NK.tolist(), near, bases, strict=True):
        assert passages[order[0]] == base.output
        known = {passages.index(text) for text in (*row.value["positives"], *row.value["negatives"])}
        assert set(own) - {-1} <= set([p for p in order if p not in known][:3])
        assert len(set(own)) == 2
    (piece, _), *_ = objective.added(mined_NK, rows, renderer)
    assert renderer.decode(piece.input_ids_T) == f"[CLS]mouse?[SEP]{passages[mined_NK[0][0]]}[SEP]"
    assert (piece.role, piece.typed_from) == ("negative", 8)


def test_a_row_without_a_wrong_passage_is_refused() -> None:
    objective = Rerank(Rerank.Options(negatives=0))
    rows = _held()
    objective.fit(rows[1:])
    with pytest.raises(InputError, match=r"f:0: this row has no wrong passage, and objective.negatives is 0"):
        objective.fit(rows)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_run_beats_the_order_of_its_base(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(request.getfixturevalue(model), tmp_path)
    rows = {"train": _rows(160), "validation": _rows(16, 1), "test": _rows(40, 2)}
    result = api.train(recipe, data=rows, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r for r in result.records}
    assert values["tuned", "mrr"]["value"] > 0.85
    assert values["vectors", "mrr"]["value"] < 0.7
    assert values["tuned", "mrr"]["candidates"] == len(PARTNERS)
    assert next(e for e in result.effects if e["metric"] == "mrr")["p"] < 0.01
    plan = json.loads((result.path / "plan.json").read_text())
    assert any("it reads the first 50 that the vectors of" in text for text in plan["substitutions"])
    assert any("the order of the passages by the base's own vectors" in text for text in plan["substitutions"])
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    validated = [line["validation"] for line in lines if "validation" in line]
    assert validated[0]["loss"] > validated[-1]["loss"] > 0  # held-out rows are given wrong passages too
    asked = [{"query": "eeeeee 7?"}, {"query": "cccccc 1?"}]
    answers = api.predict(result.path, asked)
    assert [answer.output for answer in answers] == ["p-eagle", "p-coin"]
    again = api.evaluate(result.path, _rows(20, 3), name="more")
    found = {r["model"]: r["value"] for r in again.records if (r["data"], r["metric"]) == ("more", "mrr")}
    assert found["tuned"] > found["vectors"]
    card = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-ranking" in card
    assert "A re-ranker, which reads a query and a passage together, made from" in card
    code = card.split("```python\n")[2].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(result.path / "model")))
    texts = [_passage("eagle", 1), _passage("coin", 2)]
    capsys.readouterr()
    exec(code.replace('"...", ["...", "..."]', f"'eeeeee 7?', {texts!r}"), {})
    scores = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert scores[0] == pytest.approx(answers[0].scores["score"], abs=1e-3)
    assert scores[1] < scores[0]
    assert cli.main(["chat", str(result.path), "--prompt", "where?"]) == 2


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "bottleneck"])
def test_a_tuned_model_finds_passages_as_its_base_does(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    recipe = {**_recipe(tiny_bert, tmp_path), "method": method}
    recipe["train"] = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.1}
    run = api.train(recipe, data={"train": _rows(24)}, out=tmp_path / "run").path
    loaded = api.load(run)
    objective, policy, renderer = loaded.objective, loaded.policy, loaded.renderer
    assert isinstance(objective, Rerank)
    rows = [Row({"query": row["query"], "positive_ids": row["positive_ids"]}, "f:1") for row in _rows(12, 3)]
    base = Policy(AutoModel.from_pretrained(tiny_bert), "encoder", Tokens((1,), 0), packed=True).eval()
    wanted = [order.tolist() for order in objective._orders(base, rows, renderer)]
    with policy.as_base():
        assert [order.tolist() for order in objective._orders(policy, rows, renderer)] == wanted
        nested = objective._first.vectors(policy, "query", ["a"], renderer, SampleSpec(1))
    np.testing.assert_allclose(
        nested, objective._first.vectors(base, "query", ["a"], renderer, SampleSpec(1)), atol=1e-5
    )
    assert [order.tolist() for order in objective._orders(policy, rows, renderer)] == wanted
    tuned = objective._first.vectors(policy, "query", ["a"], renderer, SampleSpec(1))
    assert np.abs(tuned - nested).max() > 1e-3
    if method == "lora":
        assert api.export(run, tmp_path / "merged", merge=True).check is not None
        corpus, asked = recipe["data"]["corpus"], [{"query": row["query"]} for row in _rows(6, 4)]
        answers = [api.load(path, corpus=corpus).predict(asked) for path in (run, tmp_path / "merged")]
        assert [a.output for a in answers[0]] == [a.output for a in answers[1]]
        scores = [[answer.scores["score"] for answer in found] for found in answers]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_micro_batches_and_packing_change_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[list[float]] = []
    for size, packs in ((None, True), (1, True), (3, True), (None, False)):
        if not packs:
            monkeypatch.setattr("tunesmith.facts.is_packable", lambda meta: False)
        recipe = _recipe(tiny_bert, tmp_path)
        recipe["train"] = {"max_steps": 3, "batch_size": 8} | ({} if size is None else {"micro_batch_size": size})
        run = api.train(recipe, data={"train": _rows(24)}, out=tmp_path / f"{size} {packs}").path
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_steps_by_tokens_are_refused_where_wrong_passages_are_added(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_bert, tmp_path)
    del recipe["objective"]["negatives"]
    recipe["train"] = {"max_steps": 3, "batch_tokens": 100}
    with pytest.raises(InputError, match=r"train.batch_tokens counts tokens, and objective.negatives adds some"):
        api.plan(recipe, data={"train": _rows(24)})


def test_more_wrong_passages_than_are_found_are_refused(tiny_bert: Path) -> None:
    asked = {"name": "rerank", "negatives": 9, "depth": 3}
    with pytest.raises(InputError, match="drawn from the first 3 passages, and 9 are asked"):
        api.plan({"model": str(tiny_bert), "data": {"train": "rows.jsonl"}, "objective": asked, "method": "lora"})
    assert Rerank.Options(depth=1).depth == 1
