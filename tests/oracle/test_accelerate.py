"""Accelerated models against untouched ones: loss, gradients, generation, saving, and shared beginnings of rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "invariant"))

from families import FAMILIES, examples_of, policy_of
from tunesmith.data.pack import collate, place
from tunesmith.errors import RefusedError
from tunesmith.kernels import attention, decoder_layer, shared_prefix
from tunesmith.kernels.accelerate import accelerate
from tunesmith.methods.lora import Lora
from tunesmith.models.policy import Policy
from tunesmith.types import Batch, Example, Piece, SampleSpec, Want

DECODERS = [family for family in FAMILIES if family != "bert"]
PREFIX = 7


def adapted(family: str, *, lora: bool = True) -> Policy:
    """A policy whose adapters are not 0."""
    policy = policy_of(family)
    if lora:
        Lora(Lora.Options(rank=4), 0.0).attach(policy)
        torch.manual_seed(3)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return policy


def batch_of(count: int = 6, *, shared: bool = False) -> Batch:
    """Random examples; shared: all begin with the same tokens, and those are trained too."""
    examples = examples_of(count)
    if shared:
        ids, weights = np.arange(10, 10 + PREFIX, dtype=np.int32), np.full(PREFIX, 0.5, np.float32)
        examples = [
            Example((Piece(np.concatenate([ids, p.input_ids_T]), np.concatenate([weights, p.weights_T])),))
            for e in examples
            for p in e.pieces
            if p.weights_T is not None
        ]
    return collate(examples, range(count), packed=True, pad_id=0)


def gradients(policy: Policy, hidden_BTD: Tensor) -> dict[str, Tensor]:
    """Of a loss over every hidden state."""
    hidden_BTD.mul(torch.linspace(-1, 1, hidden_BTD.numel()).view_as(hidden_BTD)).sum().backward()
    found = {n: p.grad.double() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    apart = sum(float((found[n] - expected[n]).square().sum()) for n in expected) ** 0.5
    assert apart < 1e-5 * sum(float(g.square().sum()) for g in expected.values()) ** 0.5


def whole(policy: Policy, batch: Batch) -> Tensor:
    hidden = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_stay(family: str, lora: bool) -> None:
    batch = batch_of()
    plain, fast = adapted(family, lora=lora), adapted(family, lora=lora)
    taken = accelerate(fast)
    assert (taken["lora_linear"] > 0) == lora
    assert (taken["rms_norm"] > 0) == (family != "bert")
    expected, found = whole(plain, batch), whole(fast, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal(gradients(fast, found), gradients(plain, expected))


@pytest.mark.parametrize("family", DECODERS)
def test_generation_and_saved_weights_stay(family: str) -> None:
    plain, fast = adapted(family), adapted(family)
    accelerate(fast)
    accelerate(fast)  # again is nothing new
    prompts, spec = [[3, 4, 5], [7, 8, 9, 10, 11]], SampleSpec(max_new_tokens=8)
    assert fast.sample(prompts, spec) == plain.sample(prompts, spec)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", DECODERS)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(family: str) -> None:
    batch, policy = batch_of(shared=True), adapted(family)
    assert shared_prefix.serves(policy.model)
    stream = batch.streams["input"]
    prefix = shared_prefix.find(stream, batch.segments)
    assert prefix is not None
    assert prefix.length == PREFIX
    assert len(prefix.kept_K) == batch.tokens - PREFIX * (len(batch.segments) - 1)
    assert torch.equal(prefix.shorten(stream.input_ids_BT)[:, prefix.place_T], stream.input_ids_BT)
    policy.share_prefixes = False  # the plain path is the oracle
    expected = whole(policy, batch)
    short = policy.model.base_model(
        input_ids=prefix.shorten(stream.input_ids_BT),
        position_ids=prefix.shorten(stream.position_ids_BT),
        use_cache=False,
        **{attention.KEYWORD: prefix.bounds},
    ).last_hidden_state
    found = prefix.restore(short)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal(gradients(policy, found), gradients(policy, expected))


def test_a_batch_on_its_way_to_a_device_knows_its_beginning() -> None:
    """There nobody looks at tokens, for it would be waited for; on the host the tokens that are there count."""
    batch, device = batch_of(shared=True), torch.device("meta")
    assert batch.common is None
    placed = place(batch, device)
    assert placed.common == PREFIX
    found = shared_prefix.find(placed.streams["input"], placed.segments, placed.common)
    expected = shared_prefix.find(batch.streams["input"], batch.segments)
    assert found is not None
    assert expected is not None
    assert (found.length, found.bounds.rows) == (expected.length, expected.bounds.rows)
    assert found.kept_K.device == device
    batch.streams["input"].input_ids_BT[0, batch.segments[1].start + PREFIX - 2] += 1  # as an annotator may
    assert place(batch, device).common == PREFIX - 2
    batch.streams["input"].input_ids_BT[0, batch.segments[1].start + shared_prefix.WORTH - 1] += 1
    assert place(batch, device).common == 0, "too short to be worth it"
    assert place(batch_of(), device).common == 0


def test_what_a_decoder_reads_is_no_beginning() -> None:
    ids = [np.arange(4, 4 + n, dtype=np.int32) for n in (6, 20)]
    pieces = Piece(ids[0]), Piece(ids[1], np.ones(20, np.float32), stream="decoder")
    batch = collate([Example(pieces)] * 2, range(2), packed=True, pad_id=0)
    assert place(batch, torch.device("meta")).common == 5


def test_beginnings_are_not_shared_where_that_is_no_gain_or_wrong() -> None:
    apart = batch_of()
    assert shared_prefix.find(apart.streams["input"], apart.segments) is None
    alone = batch_of(1, shared=True)
    assert shared_prefix.find(alone.streams["input"], alone.segments) is None
    assert not shared_prefix.serves(policy_of("bert").model)
    dropping = policy_of("llama")
    Lora(Lora.Options(rank=4), 0.1).attach(dropping)
    assert not shared_prefix.serves(dropping.model.train())
    assert shared_prefix.serves(dropping.model.eval())


def test_equal_examples_keep_a_token_of_their_own() -> None:
    example = examples_of(1)[0]
    batch = collate([example] * 3, range(3), packed=True, pad_id=0)
    prefix = shared_prefix.find(batch.streams["input"], batch.segments)
    assert prefix is not None
    assert prefix.length == batch.segments[0].length - 1


def test_a_norm_that_only_looks_like_one_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model: Any = nn.Sequential(OddRMSNorm())
    assert accelerate(model)["rms_norm"] == 0


def test_a_layer_in_fp8_that_only_looks_like_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels need a GPU; what they compute is the plain layer, which stands in for them here."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward

    class Doubling(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
            return 2 * plain(self, hidden_states, **given) - hidden_states

    def kernels(layer: Any, hidden_states: Tensor, **given: Any) -> Tensor:
        return plain(layer, hidden_states, **given)

    monkeypatch.setattr(decoder_layer, "_forward", kernels)
    layers = policy_of("llama").model.bfloat16().requires_grad_(False).model.layers
    assert decoder_layer.fuse(layers[0], fp8=True)
    layers[1].__class__ = Doubling
    assert not decoder_layer.fuse(layers[1], fp8=False)
    with pytest.raises(RefusedError, match=r"Doubling in fp8 gives another result \(relative error 0\.5"):
        decoder_layer.fuse(layers[1], fp8=True)
