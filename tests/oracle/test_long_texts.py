"""Long texts in windows: which tokens each has, the loss against plain transformers, and runs that need what is cut."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from tunesmith import api
from tunesmith.data.chat import Renderer
from tunesmith.data.pack import collate, split
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.regress import Regress
from tunesmith.types import Row, Step

TEXTS = st.text("abc, \n\u00e9\u4e2d\U0001f600", min_size=1, max_size=70)
STRIDES = st.one_of(st.none(), st.integers(1, 40))


@cache
def _renderer(folder: Path, length: int | None) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(folder), sequence_length=length)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(4, 40), STRIDES, st.sampled_from(["tiny_bert", "tiny_llama"]))
def test_windows_hold_all_of_a_text(
    tiny_bert: Path, tiny_llama: Path, text: str, length: int, stride: int | None, model: str
) -> None:
    folder = {"tiny_bert": tiny_bert, "tiny_llama": tiny_llama}[model]
    renderer, whole = _renderer(folder, length), _renderer(folder, None).text(text).input_ids.tolist()
    begin = int(model == "tiny_bert")  # a CLS; the decoder's tokenizer puts nothing before a text
    opening, ids, end = whole[:begin], whole[begin:-1], whole[-1]
    room = length - 1 - begin
    if len(whole) > length and stride is not None and stride > room:
        with pytest.raises(InputError, match=f"objective.stride is {stride}, and a window has room for {room} tokens"):
            renderer.stretches(text, stride)
        return
    found = [ids.tolist() for ids in renderer.stretches(text, stride)]
    if len(whole) <= length:
        assert found == [whole]
        return
    assert len(found) > 1
    assert all((w[:begin], w[-1], len(w)) == (opening, end, length) for w in found)
    step = stride or room
    starts = [at for at in range(0, len(ids), step) if at + room < len(ids)] + [len(ids) - room]
    assert [w[begin:-1] for w in found] == [ids[at : at + room] for at in starts]
    read = {place for at in starts for place in range(at, at + room)}
    assert read == set(range(len(ids)))


def test_windows_without_room_for_text_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="1 of 1 tokens are the tokenizer's own, so no text has room"):
        _renderer(tiny_llama, 1).stretches("abc")


@pytest.mark.parametrize("objective", [Classify, Regress])
def test_a_stride_of_no_windows_is_refused(objective: Any) -> None:
    with pytest.raises(InputError, match=r"objective\.stride does nothing where long texts are cut"):
        objective(objective.Options(stride=3)).fit([])


@cache
def _model(folder: Path, packed: bool) -> Any:
    return AutoModel.from_pretrained(folder)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from("ab")), min_size=1, max_size=4),
    st.integers(4, 30),
    STRIDES,
    st.sampled_from(["mean", "first", "last"]),
    st.sampled_from(["tiny_bert", "tiny_llama"]),
    st.booleans(),
)
def test_the_loss_is_that_of_each_texts_mean_vector(
    tiny_bert: Path,
    tiny_llama: Path,
    drawn: list[tuple[str, str]],
    length: int,
    stride: int | None,
    pooling: str,
    model: str,
    packed: bool,
) -> None:
    """Each window alone through the plain model of transformers, the vectors averaged, the head applied."""
    folder = {"tiny_bert": tiny_bert, "tiny_llama": tiny_llama}[model]
    stride = stride and min(stride, length - 2)  # no more than has room beside CLS and SEP
    objective = Classify(Classify.Options(long="windows", stride=stride))
    objective.adopt({"labels": ["a", "b", "c"]})
    renderer = _renderer(folder, length)
    examples = [objective.example(Row({"text": text, "label": label}, "f:1"), renderer) for text, label in drawn]
    assert not any(example.cut for example in examples)
    kind = "encoder" if model == "tiny_bert" else "decoder"
    policy = Policy(_model(folder, packed), kind, Tokens((1,), 0), packed=packed, pooling=pooling).eval()
    policy.add_head(Head(objective.heads()[0], policy.width))
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.heads["label"].linear.weight)
    plain, wanted = AutoModel.from_pretrained(folder).eval(), []
    for (text, label), example in zip(drawn, examples, strict=True):
        vectors: list[torch.Tensor] = []
        for ids in renderer.stretches(text, stride):
            hidden_TD = plain(input_ids=torch.from_numpy(ids)[None].long()).last_hidden_state[0]
            vectors.append({"mean": hidden_TD.mean(0), "first": hidden_TD[0], "last": hidden_TD[-1]}[pooling])
        assert len(vectors) == len(example.pieces)
        logits = policy.heads["label"](torch.stack(vectors).mean(0))
        wanted.append(float(F.cross_entropy(logits[None], torch.tensor(["abc".index(label)])).detach()))
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    part = objective.terms(policy, batch).parts["cross_entropy"]
    assert part.loss_U.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert part.example_U.tolist() == list(range(len(examples)))
    assert objective.normalisers(Step(1, [batch, batch], {})) == {"cross_entropy": 2 * len(examples)}
    for alone in split(batch, [[i] for i in range(len(examples))], packed=packed, pad_id=0):
        again = objective.terms(policy, alone).parts["cross_entropy"].loss_U.tolist()
        assert again == pytest.approx([wanted[alone.examples[0]]], rel=1e-4, abs=1e-4)


def _rows(count: int, start: int = 0, padding: int = 40, *, scored: bool = False) -> list[dict[str, Any]]:
    """What decides stands at the end, behind more letters than a window has."""
    draw = random.Random(start)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        right = draw.randrange(2)
        text = f"{1000 * start + i} {'x' * draw.randrange(padding, padding + 20)} {'gr'[right] * 8}"
        rows.append({"text": text, **({"score": 10.0 * right} if scored else {"label": ("green", "red")[right]})})
    return rows


def _recipe(model: Path, objective: dict[str, Any], method: str = "full") -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": objective,
        "method": method,
        "precision": "fp32",
        "train": {"epochs": 12, "batch_size": 8, "learning_rate": 3e-3, "sequence_length": 24},
    }


@pytest.mark.parametrize(("model", "method"), [("tiny_bert", "full"), ("tiny_llama", "full"), ("tiny_bert", "head")])
def test_a_run_learns_from_what_would_be_cut(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, method: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    found: dict[str, float] = {}
    for long in ("cut", "windows"):
        recipe = _recipe(folder, {"name": "classify", "long": long}, method)
        result = api.train(recipe, data={"train": _rows(120), "test": _rows(60, 1)}, out=tmp_path / long)
        (record,) = (r for r in result.records if (r["model"], r["metric"]) == ("tuned", "accuracy"))
        assert record["n"] == 60
        found[long] = record["value"]
        audit = json.loads((result.path / "plan.json").read_text())["audit"]["train"]
        assert (audit["truncated"], audit["examples"]) == (120 if long == "cut" else 0, 120)
    assert found["windows"] > 0.9
    assert found["cut"] < 0.75
    rows = [{"text": row["text"]} for row in _rows(6, 2)]
    together, alone = api.predict(tmp_path / "windows", rows), api.predict(tmp_path / "windows", rows[3:4])
    assert together[3].probabilities == pytest.approx(alone[0].probabilities, abs=1e-5)


def test_texts_that_fit_give_what_they_give_without_windows(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"train": _rows(20, padding=1, scored=True), "test": _rows(6, 1, padding=1, scored=True)}
    kept: list[str] = []
    for long in ("cut", "windows"):
        recipe = _recipe(tiny_bert, {"name": "regress", "long": long})
        recipe["train"] |= {"sequence_length": 60, "epochs": 2}
        run = api.train(recipe, data=rows, out=tmp_path / long).path
        kept.append((run / "metrics.jsonl").read_text() + (run / "evaluation.json").read_text())
    assert kept[0] == kept[1]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
@pytest.mark.parametrize("stride", [None, 9])
def test_the_code_of_the_card_gives_the_same_number(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, stride: int | None
) -> None:
    asked = {"name": "regress", "long": "windows", **({} if stride is None else {"stride": stride})}
    recipe = _recipe(request.getfixturevalue(model), asked)
    recipe["train"] |= {"epochs": 1}
    run = api.train(recipe, data={"train": _rows(20, scored=True)}, out=tmp_path / "run").path
    card = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "It reads texts in windows of at most 24 tokens" in card
    text = _rows(1, 5)[0]["text"]
    (answer,) = api.predict(run, [{"text": text}])
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    capsys.readouterr()
    exec(code.replace("path/to/this/folder", str(run / "model")).replace('"..."', repr(text)), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(float(answer.output), rel=1e-4)
