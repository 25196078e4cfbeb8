"""Masked-language modelling against transformers' own loss, and what is hidden against what it promises."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    RobertaConfig,
)

from tunesmith import api
from tunesmith.data.chat import Renderer
from tunesmith.data.pack import collate, place
from tunesmith.data.source import ExampleList, batches
from tunesmith.errors import InputError
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.mlm import Mlm
from tunesmith.protocols import Converses
from tunesmith.types import Batch, Row

MASK = 4
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "bert": BertConfig(**TINY),
    "roberta": RobertaConfig(**TINY),
    "deberta": DebertaV2Config(**TINY, relative_attention=True, pos_att_type=["c2p"]),
    "modernbert": ModernBertConfig(**TINY, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
}
WORDS = st.text("abcdef ", min_size=1, max_size=60).filter(str.strip)


def _mlm(**options: float) -> Mlm:
    return Mlm(Mlm.Options(**options))


def _policy(model: torch.nn.Module, packed: bool) -> Policy:
    return Policy(model, "encoder", Tokens((), 0, mask=MASK), packed=packed).eval()


def _loss(objective: Mlm, policy: Policy, batch: Batch) -> torch.Tensor:
    part = objective.terms(policy, place(batch, policy.device)).parts["nll"]
    return (part.loss_U * part.weight_U).sum().detach()


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(4, 60), st.floats(0.05, 0.9), st.sampled_from([*CONFIGS]))
def test_the_loss_is_that_of_transformers(
    tiny_bert: Path, texts: list[str], length: int, share: float, family: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(CONFIGS[family]).eval()
    policy = _policy(model, packed=False)
    policy.check_projection()
    renderer, objective = Renderer(AutoTokenizer.from_pretrained(tiny_bert), None, length), _mlm(mlm_probability=share)
    examples = [objective.example(Row({"text": text}, "here"), renderer) for text in texts]
    seen = objective.annotate(policy, collate(examples, range(len(examples)), packed=False, pad_id=0))
    labels_BT = torch.where(seen.weight_BT > 0, seen.target_BT, -100)
    stream = seen.streams["input"]
    inputs = {"input_ids": stream.input_ids_BT, "attention_mask": (stream.segment_ids_BT >= 0).long()}
    ours = _loss(objective, policy, seen) / len(seen.unit_U)
    torch.testing.assert_close(ours, model(**inputs, labels=labels_BT).loss.detach(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(WORDS, min_size=1, max_size=5), st.integers(3, 40), st.floats(0.05, 0.9), st.integers(0, 9), st.booleans()
)
def test_micro_batches_and_packing_change_nothing(
    masked_bert: Path, texts: list[str], length: int, share: float, step: int, packed: bool
) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(masked_bert), None, length)
    policy = _policy(AutoModelForMaskedLM.from_pretrained(masked_bert), packed)
    objective = _mlm(mlm_probability=share)
    examples = [objective.example(Row({"text": text}, "here"), renderer) for text in texts]
    alone = [
        (piece.input_ids_T, float(_loss(objective, policy, objective.annotate(policy, one))))
        for example in examples
        for piece in example.pieces
        for one in [_stepped(collate([type(example)((piece,))], [0], packed=packed, pad_id=0), step)]
    ]
    together = [_stepped(batch, step) for batch in batches(ExampleList(examples), 50, packed=packed, pad_id=0)]
    total = sum(float(_loss(objective, policy, objective.annotate(policy, batch))) for batch in together)
    assert total == pytest.approx(sum(loss for _, loss in alone), rel=1e-4, abs=1e-4)
    shown = [token for ids, _ in alone for token in ids[1:-1].tolist()]
    assert renderer.decode(shown) == renderer.decode([t for text in texts for t in renderer.plain(text)])


def _stepped(batch: Batch, step: int) -> Batch:
    batch.step = step
    return batch


def test_so_many_are_hidden_most_behind_the_mask_and_anew_in_each_step(masked_bert: Path) -> None:
    renderer, objective = Renderer(AutoTokenizer.from_pretrained(masked_bert)), _mlm(mlm_probability=0.3)
    policy = _policy(AutoModelForMaskedLM.from_pretrained(masked_bert), packed=True)
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 400)) + "[SEP]"
    batch = collate([objective.example(Row({"text": text}, "here"), renderer)], [0], packed=True, pad_id=0)
    ids_T = batch.streams["input"].input_ids_BT[0]
    counts, places = np.zeros(3), set[tuple[int, ...]]()
    for step in range(40):
        seen = objective.annotate(policy, _stepped(batch, step))
        assert len(seen.unit_U) == round(0.3 * 400)
        assert torch.equal(seen.target_BT.flatten()[seen.unit_U], ids_T[seen.unit_U])
        shown_U = seen.streams["input"].input_ids_BT[0, seen.unit_U]
        counts += [int((shown_U == MASK).sum()), int((shown_U == ids_T[seen.unit_U]).sum()), len(shown_U)]
        untouched = torch.ones(len(ids_T), dtype=torch.bool)
        untouched[seen.unit_U] = False
        assert torch.equal(seen.streams["input"].input_ids_BT[0, untouched], ids_T[untouched])
        places.add(tuple(seen.unit_U.tolist()))
    assert len(places) == 40
    assert counts[0] / counts[2] == pytest.approx(0.8, abs=0.02)
    assert counts[1] / counts[2] == pytest.approx(0.1, abs=0.02)
    again = objective.annotate(policy, _stepped(batch, 39))
    assert tuple(again.unit_U.tolist()) in places


def test_a_run_learns_its_text_and_fills_its_masks(masked_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{i % 10} and then {(i + 1) % 10}, {i}"} for i in range(200)]
    recipe = {
        "model": str(masked_bert),
        "objective": {"name": "mlm", "mlm_probability": 0.3},
        "method": "full",
        "train": {"epochs": 30, "batch_size": 50, "learning_rate": 0.01},
        "precision": "fp32",
    }
    result = api.train(recipe, data={"train": rows[10:], "test": rows[:10]}, out=tmp_path / "run")
    of = {(record["model"], record["metric"]): record["value"] for record in result.records}
    assert of["tuned", "loss"] < 0.6 * of["base", "loss"]
    (answer,) = api.predict(tmp_path / "run", [{"text": "4 [MASK]nd then 5, 7"}])
    assert answer.output == "4 and then 5, 7"
    assert not isinstance(api.load(tmp_path / "run").objective, Converses)
    (answer,) = api.predict(tmp_path / "run", [{"text": "nothing is hidden"}])
    assert answer.output == ""


@pytest.mark.filterwarnings("ignore:Token type ids are not supported")  # PEFT says it of what the tokenizer makes
@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_the_card_tells_how_transformers_fills_masks(
    masked_bert: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{i % 10} and then {(i + 1) % 10}, {i}"} for i in range(60)]
    recipe = {
        "model": str(masked_bert),
        "objective": "mlm",
        "method": method,
        "train": {"epochs": 3, "learning_rate": 0.02},
        "precision": "fp32",
    }
    run = api.train(recipe, data={"train": rows[5:], "test": rows[:5]}, out=tmp_path / "run").path
    code = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8").split("```python\n")[2].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(run / "model")))
    code = code.replace(f"path/to/{masked_bert.name}", str(masked_bert))
    (answer,) = api.predict(run, [{"text": "4 [MASK]nd then 5"}])
    capsys.readouterr()
    exec(code.replace("... {tokenizer.mask_token} ...", "4 {tokenizer.mask_token}nd then 5"), {})
    (token,) = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert answer.output == f"4 {token}nd then 5"


def test_a_tokenizer_without_a_mask_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="has no mask token, so nothing can be hidden"):
        _mlm().example(Row({"text": "a"}, "here"), Renderer(AutoTokenizer.from_pretrained(tiny_llama)))
