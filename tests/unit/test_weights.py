"""What counts how much in the likelihood: turns, rows, the last answer or everything; and noise on embeddings."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith import api
from tunesmith.data.chat import Renderer
from tunesmith.data.formats import convert
from tunesmith.data.pack import collate
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.sft import Sft
from tunesmith.types import Batch, Example, Row, Step

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


def _renderer(folder: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(folder))


def _sft(**options: Any) -> Sft:
    return Sft(Sft.Options(**options))


def _example(objective: Sft, messages: list[dict[str, Any]], renderer: Renderer, **tags: str) -> Example:
    return objective.example(Row({"messages": messages}, "row 1", tags), renderer)


def _policy(folder: Path, *, packed: bool = True) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(folder), "decoder", Tokens((1,), 0), packed=packed)


def _batch(*examples: Example) -> Batch:
    return collate(examples, range(len(examples)), packed=True, pad_id=0)


def _loss(objective: Sft, policy: Policy, batch: Batch) -> torch.Tensor:
    """The loss of a step of one batch."""
    part = objective.terms(policy, batch).parts["nll"]
    return (part.loss_U * part.weight_U).sum() / objective.normalisers(Step(1, [batch], {}))["nll"]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=9), st.floats(0.1, 9)), min_size=1, max_size=4))
def test_a_turn_counts_as_its_weight_says(tiny_llama: Path, turns: list[tuple[str, float]]) -> None:
    """The weighted mean over the tokens of each answer, taken from the logits of the whole conversation."""
    renderer, objective, policy = _renderer(tiny_llama), _sft(), _policy(tiny_llama)
    model, talk = AutoModelForCausalLM.from_pretrained(tiny_llama), list[dict[str, Any]]()
    total = weights = 0.0
    for text, weight in turns:
        talk.append({"role": "user", "content": "say"})
        start = len(renderer.prompt(talk))
        talk.append({"role": "assistant", "content": text, "weight": weight})
        ids = renderer.encode(talk).input_ids
        stop = start + len(renderer.plain(text)) + 1  # through its end token
        logits_TV = model(torch.from_numpy(ids).long()[None]).logits[0]
        own = F.cross_entropy(logits_TV[start - 1 : stop - 1], torch.from_numpy(ids).long()[start:stop])
        total, weights = total + weight * (stop - start) * float(own.detach()), weights + weight * (stop - start)
    ours = _loss(objective, policy, _batch(_example(objective, talk, renderer)))
    assert float(ours.detach()) == pytest.approx(total / weights, rel=1e-4)


def test_weights_as_files_say_them() -> None:
    def read(**turn: Any) -> dict[str, Any]:
        messages = [TALK[0], {**TALK[1], **turn}]
        return convert({"messages": messages}, "messages", {}, "rows.jsonl:1")["messages"][1]

    assert read(weight=0.5)["weight"] == 0.5
    assert read(weight=0)["train"] is False
    with pytest.raises(InputError, match=r"train is false, and weight is 2\.0: one says what the other denies"):
        read(weight=2.0, train=False)
    assert read(weight=1).keys() == {"role", "content"}
    for wrong in (-1, "2", math.inf):
        with pytest.raises(InputError, match=r"rows\.jsonl:1: messages\[1\]: weight must be a number of at least 0"):
            read(weight=wrong)
    with pytest.raises(InputError, match="a weight on a turn of the user, which is not learned"):
        convert({"messages": [{**TALK[0], "weight": 2}, TALK[1]]}, "messages", {}, "rows.jsonl:1")


def test_an_encoder_decoder_weighs_its_turns(tiny_t5: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_t5), None, None, 0)
    example = _example(_sft(), [TALK[0], {**TALK[1], "weight": 3.0}], renderer)
    weights = example.pieces[1].weights_T
    assert weights is not None
    assert set(weights.tolist()) == {0.0, 3.0}


def test_only_the_last_answer_or_every_token(tiny_llama: Path) -> None:
    renderer = _renderer(tiny_llama)
    learned = {}
    for learn in ("answers", "last", "all"):
        piece = _example(_sft(learn=learn), TALK, renderer).pieces[0]
        assert piece.weights_T is not None
        learned[learn] = renderer.decode(piece.input_ids_T[piece.weights_T > 0])
    behind_first = renderer.decode(renderer.encode(TALK).input_ids[1:])
    assert learned == {"answers": "hello<|im_end|>bye<|im_end|>", "last": "bye<|im_end|>", "all": behind_first}


def test_a_row_of_weight_two_is_learned_as_two_rows(tiny_llama: Path) -> None:
    renderer, policy = _renderer(tiny_llama), _policy(tiny_llama).train()
    objective = _sft(weight_column="worth")
    first, second = TALK[:2], [TALK[2], TALK[3]]
    one = [_example(objective, first, renderer, worth="2"), _example(objective, second, renderer, worth="1")]
    plain = _sft()
    three = [_example(plain, talk, renderer) for talk in (first, first, second)]
    gradients = []
    for made, examples in ((objective, one), (plain, three)):
        policy.zero_grad()
        loss = _loss(made, policy, _batch(*examples))
        loss.backward()
        gradients.append([float(loss.detach()), *(p.grad.clone() for p in policy.model.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for own, theirs in zip(gradients[0][1:], gradients[1][1:], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)
    policy.eval()  # what is measured counts each row once
    alike = [_example(plain, talk, renderer) for talk in (first, second)]
    measured = [objective.terms(policy, _batch(*examples)).parts["nll"].weight_U for examples in (one, alike)]
    assert torch.equal(*measured)


@pytest.mark.parametrize("worth", ["", "much", "0", "-1", "nan", "inf"])
def test_a_weight_that_is_no_number_above_0_is_refused(tiny_llama: Path, worth: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": "yes", "worth": worth if i == 3 else i + 1} for i in range(5)]
    recipe = {"model": str(tiny_llama), "objective": {"name": "sft", "weight_column": "worth"}, "method": "lora"}
    with pytest.raises(InputError, match=r"train\.jsonl:4: worth: objective\.weight_column must be a number above 0"):
        api.plan(recipe, data={"train": rows})


def test_a_run_counts_rows_by_their_column(tiny_llama: Path, tmp_path: Path) -> None:
    """Two answers to one question: the one that counts nine times is learned; test rows need no such column."""
    rows = [{"prompt": f"{i}, which?", "completion": c, "worth": w} for i in range(8) for c, w in (("a", 9), ("b", 1))]
    values = {}
    for column in (None, "worth"):
        recipe = {
            "model": str(tiny_llama),
            "objective": {"name": "sft", "weight_column": column},
            "method": "full",
            "train": {"epochs": 20, "batch_size": 16, "learning_rate": 0.003},
            "precision": "fp32",
        }
        test = [{"prompt": f"{i}, which?", "completion": "a"} for i in range(50, 55)]
        result = api.train(recipe, data={"train": rows, "test": test}, out=tmp_path / str(column))
        values[column] = result.record("loss", model="tuned")["value"]
    assert values["worth"] < values[None] - 0.1


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("abc", min_size=1, max_size=20), min_size=1, max_size=4), st.floats(0.1, 20), st.booleans())
def test_noise_is_that_of_the_paper(tiny_llama: Path, texts: list[str], alpha: float, packed: bool) -> None:
    """The loss with noise drawn from a seed, against each text alone through transformers with the same noise."""
    renderer, policy, objective = (
        _renderer(tiny_llama),
        _policy(tiny_llama, packed=packed).train(),
        _sft(neftune_alpha=alpha),
    )
    examples = [_example(objective, [TALK[0], {"role": "assistant", "content": text}], renderer) for text in texts]
    batch = collate(examples, range(len(examples)), packed=packed, pad_id=0)
    torch.manual_seed(5)
    ours = float(_loss(objective, policy, batch).detach())
    ids_BT = batch.streams["input"].input_ids_BT
    torch.manual_seed(5)
    uniform_BTD = 2 * torch.rand(*ids_BT.shape, policy.width) - 1
    model, total, count = AutoModelForCausalLM.from_pretrained(tiny_llama), 0.0, 0.0
    for segment, example in zip(batch.segments, examples, strict=True):
        span = segment.row, slice(segment.start, segment.stop)
        ids_T, weights_T = torch.from_numpy(example.pieces[0].input_ids_T).long(), example.pieces[0].weights_T
        scale = alpha / math.sqrt(segment.length * policy.width)
        given = model.get_input_embeddings()(ids_T) + uniform_BTD[span] * scale
        logits_TV = model(inputs_embeds=given[None]).logits[0]
        losses = F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")[np.flatnonzero(weights_T)[0] - 1 :]
        total, count = total + float(losses[: int(weights_T.sum())].sum().detach()), count + weights_T.sum()
    assert ours == pytest.approx(total / count, rel=1e-4)
    policy.eval()
    quiet = _sft()
    assert float(_loss(objective, policy, batch).detach()) == float(_loss(quiet, policy, batch).detach())


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_noise_goes_with_every_layout(tiny_llama: Path, method: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(12)]
    found = []
    for number, alpha in enumerate((0.0, 15.0, 15.0)):
        recipe = {
            "model": str(tiny_llama),
            "objective": {"name": "sft", "neftune_alpha": alpha},
            "method": method,
            "train": {"max_steps": 3, "batch_size": 4},
            "precision": "fp32",
        }
        run = api.train(recipe, data={"train": rows}, out=tmp_path / str(number)).path
        found.append((run / "metrics.jsonl").read_text().splitlines()[-1].partition('"loss":')[2][:12])
    assert found[0] != found[1] == found[2]


def test_every_token_of_an_encoder_decoder_is_refused(tiny_t5: Path) -> None:
    recipe = {"model": str(tiny_t5), "objective": {"name": "sft", "learn": "all"}, "method": "full"}
    with pytest.raises(InputError, match=r"objective\.learn is all, and the decoder of .* has the answers alone"):
        api.plan(recipe, data={"train": [{"prompt": "a", "completion": "b"}] * 3})


@pytest.mark.parametrize(("by", "descending"), [("length", False), ("grade", True)])
def test_easy_rows_come_first_in_the_first_epochs(tiny_llama: Path, tmp_path: Path, by: str, descending: bool) -> None:
    rows = [{"prompt": f"{i}?", "completion": "x" * (i * 5 % 12 + 1), "grade": -(i * 5 % 12)} for i in range(10)]
    recipe: dict[str, Any] = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": "lora",
        "train": {"epochs": 3, "batch_size": 1, "curriculum": {"by": by, "descending": descending, "epochs": 2}},
        "precision": "fp32",
    }
    run = api.train(recipe, data={"train": rows}, out=tmp_path / "run").path
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    total = [0, *(line["tokens"] for line in lines if "tokens" in line and "loss" in line)]
    tokens = [after - before for before, after in pairwise(total)]
    assert len(tokens) == 30
    assert [tokens[i : i + 10] == sorted(tokens[:10]) for i in (0, 10, 20)] == [True, True, False]
    wrong = [{**row, "grade": "hard"} for row in rows]
    with pytest.raises(InputError, match=r"grade: train\.curriculum\.by must be a number, this is 'hard'"):
        api.plan({**recipe, "train": {"curriculum": {"by": "grade"}}}, data={"train": wrong})
    labelled = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(6)]  # a column that the format itself reads
    asked = {**recipe, "objective": "classify", "train": {"curriculum": {"by": "label"}}}
    with pytest.raises(InputError, match=r"label: train\.curriculum\.by must be a number, this is 'a'"):
        api.plan(asked, data={"train": labelled})
