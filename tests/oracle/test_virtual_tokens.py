"""Virtual tokens against PEFT's own forward and generation, and against rows laid out one by one."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from kinds import FAMILIES, PADDED, model_of, policy_of, text_ids
from tunesmith.data.pack import collate
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.models.policy import Policy
from tunesmith.protocols import Method
from tunesmith.types import Example, Piece, SampleSpec, Want

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
NAMES = ("prompt", "p_tuning", "prefix")
GENERATING = [
    (name, family)
    for name in NAMES
    for family, kind in FAMILIES.items()
    if kind != "encoder" and not (name == "prefix" and family in PADDED)
]

COPYING = ("gemma3", "t5")  # their random weights repeat the last token, whatever stands before


def attached(name: str, family: str, **given: Any) -> tuple[Policy, Method]:
    """A policy whose virtual tokens are far from anything else: their parameters are drawn wide."""
    policy = policy_of(family, **given)
    chosen = METHODS.get(name)
    method = chosen(chosen.Options.model_validate({"virtual_tokens": 4}), 0.0)
    torch.manual_seed(2)
    method.attach(policy)
    assert policy.virtual is not None
    with torch.no_grad():
        for parameter in policy.virtual.parameters():
            parameter.normal_(0, 0.5)
    return policy.eval(), method


def peft_of(policy: Policy, method: Method, family: str, folder: Path) -> Any:
    from peft import PeftModel

    method.export(policy, folder)
    return PeftModel.from_pretrained(model_of(family), str(folder)).eval()


@pytest.mark.parametrize(("name", "family"), GENERATING)
def test_greedy_answers_are_those_of_peft_alone_and_together(name: str, family: str, tmp_path: Path) -> None:
    policy, method = attached(name, family)
    spec = SampleSpec(max_new_tokens=8)
    alone = [policy.sample([prompt], spec)[0] for prompt in PROMPTS]
    if family not in COPYING:
        with method.reference(policy):
            assert [policy.sample([prompt], spec)[0] for prompt in PROMPTS] != alone
    theirs = peft_of(policy, method, family, tmp_path)
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        assert answer.token_ids == generated(theirs, prompt, family)
    assert policy.sample(PROMPTS, spec) == alone


@pytest.mark.parametrize("family", [family for family, kind in FAMILIES.items() if kind != "encoder"])
def test_prompts_together_are_answered_as_each_alone(family: str) -> None:
    """BART's encoder counts positions from the beginning of the row, so padding may only come after the text."""
    policy, spec = policy_of(family), SampleSpec(max_new_tokens=8)
    alone = [policy.sample([prompt], spec)[0] for prompt in PROMPTS]
    assert policy.sample(PROMPTS, spec) == alone
    assert family in COPYING or len({tuple(answer.token_ids) for answer in alone}) == len(PROMPTS)


def generated(model: Any, prompt: list[int], family: str) -> list[int]:
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 1, "pad_token_id": 0}
    if FAMILIES[family] != "decoder":
        options |= {"decoder_start_token_id": model.config.decoder_start_token_id, "forced_eos_token_id": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # it counts them itself
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    new = found[len(prompt) :] if FAMILIES[family] == "decoder" else found[1:]
    return new[: new.index(1)] if 1 in new else new


def test_a_start_from_text_that_is_no_token_is_refused() -> None:
    policy = policy_of("llama")
    policy.tokens = replace(policy.tokens, encode=lambda text: text_ids(text.strip()))  # as BERT's drop spaces
    chosen = METHODS.get("prompt")
    method = chosen(chosen.Options.model_validate({"init": "text", "text": " "}), 0.0)
    with pytest.raises(InputError, match=r"method.text holds no token of the model's"):
        method.attach(policy)


def test_an_answer_can_be_followed_token_by_token() -> None:
    policy, _ = attached("prompt", "llama")
    whole = policy.sample([PROMPTS[0]], SampleSpec(max_new_tokens=6))[0].token_ids
    seen: list[int] = []

    def on_token(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    stopped = policy.sample([PROMPTS[0]], SampleSpec(max_new_tokens=6, on_token=on_token))[0]
    assert seen == whole[:3] == stopped.token_ids


def test_an_answer_ends_where_the_context_is_full_with_virtual_tokens_counted() -> None:
    policy, _ = attached("prompt", "gpt2")
    full = policy.sample([[5] * 120], SampleSpec(max_new_tokens=50))[0]
    assert full.finished or len(full.token_ids) == 128 - 4 - 120


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert"])
def test_beginnings_that_texts_share_change_neither_scores_nor_gradients(name: str, family: str) -> None:
    begin = np.arange(20, 27, dtype=np.int32)
    draw = np.random.default_rng(0)
    texts = [np.concatenate([begin, draw.integers(30, 90, n).astype(np.int32)]) for n in (3, 6, 2)]
    examples = [Example((Piece(ids, np.ones(len(ids), np.float32)),)) for ids in texts]

    def run(policy: Policy) -> tuple[Tensor, list[Tensor]]:
        hidden = policy.score(collate(examples, range(3), packed=True, pad_id=0), Want(hidden=True)).hidden_BTD
        assert hidden is not None
        assert policy.virtual is not None
        parameters = list(policy.virtual.parameters())
        return hidden, list(torch.autograd.grad(hidden.sin().sum(), parameters))

    policy, _ = attached(name, family)
    together = run(policy)
    policy.share_prefixes = False
    torch.testing.assert_close(run(policy), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_is_over_the_real_tokens(pooling: str, tmp_path: Path) -> None:
    policy, method = attached("prompt", "bert")
    policy.pooling = pooling
    example = Example((Piece(np.asarray([9, 8, 7, 6], np.int32)),))
    pooled = policy.score(collate([example] * 2, range(2), packed=True, pad_id=0), Want(pooled=True)).pooled_SD
    ids = torch.tensor([[9, 8, 7, 6]])
    theirs = peft_of(policy, method, "bert", tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids))
    real_TD = theirs.last_hidden_state[0, 4:]
    expected = {"mean": real_TD.mean(0), "first": real_TD[0], "last": real_TD[-1]}[pooling]
    assert pooled is not None
    torch.testing.assert_close(pooled, expected.expand(2, -1), rtol=1e-4, atol=1e-5)
