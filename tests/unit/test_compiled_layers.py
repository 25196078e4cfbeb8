"""Layers that torch compiles: the same numbers, few graphs, and what cannot be compiled runs as before.

On a CPU with graphs that run eagerly; a GPU-marked test compiles them for its device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from tunesmith import api, compat
from tunesmith.data.pack import collate, place
from tunesmith.kernels import attention, compiled_layers, cuda_attention
from tunesmith.kernels.accelerate import COMPILED, accelerate
from tunesmith.methods.lora import Lora
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy, Tokens
from tunesmith.types import Example, Piece, Want

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Any] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gemma3": lambda: Gemma3ForCausalLM(  # layers with a window and without
        Gemma3TextConfig(
            **GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"]
        )
    ),
    "bert": lambda: BertModel(
        BertConfig(**SIZES, max_position_embeddings=8192, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
        add_pooling_layer=False,
    ),
}
LENGTHS = ([5, 9], [7, 20, 4], [30], [6, 6, 6])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that are compiled, each run as it stands."""
    from transformers.modeling_utils import AttentionInterface

    found: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled_layers._compiled.cache_clear()
    yield found
    compiled_layers._compiled.cache_clear()
    attention.keep_outside_graphs.cache_clear()
    AttentionInterface.register(attention.IMPLEMENTATION, attention.segment_attention)


def _policy(family: str, lora: bool = False) -> Policy:
    torch.manual_seed(0)
    kind = "encoder" if family == "bert" else "decoder"
    policy = Policy(FAMILIES[family](), kind, Tokens((), 0), packed=True)
    if lora:
        Lora(Lora.Options(rank=2), 0.0).attach(policy)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    return policy.train()


def _learn(policy: Policy, lengths: list[int]) -> dict[str, Tensor]:
    """The hidden states' sum of squares, and its gradients."""
    device = policy.device
    rows = [np.random.default_rng(i).integers(1, 60, n).astype(np.int64) for i, n in enumerate(lengths)]
    batch = collate([Example((Piece(row),)) for row in rows], range(len(rows)), packed=True, pad_id=0)
    policy.zero_grad()
    hidden_BTD = policy.score(place(batch, device), Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    loss = hidden_BTD.float().square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}}


def _fuse(policy: Policy) -> None:
    for layer in layers(policy.model).values():
        compiled_layers.fuse(layer)


@pytest.mark.parametrize(("family", "lora"), [("qwen3", True), ("gemma3", False), ("bert", False)])
def test_numbers_stay_and_graphs_are_few(family: str, lora: bool, graphs: list[Any]) -> None:
    policy = _policy(family, lora)
    expected = [_learn(policy, lengths) for lengths in LENGTHS]
    _fuse(policy)
    found = [_learn(policy, LENGTHS[0])]
    many = len(graphs)
    assert 0 < many <= 6, "a set of graphs for each layer, or for the first"
    found += [_learn(policy, lengths) for lengths in LENGTHS[1:]]
    assert len(graphs) == many, "another length was compiled for"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


DENSE = ([8], [8, 8], [5, 9], [12, 12, 12], [24], [7, 20, 4], [16])


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_rows_that_are_a_dense_batch_run_in_one_graph(
    family: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, "CUDNN_PAYS", 8)
    monkeypatch.setattr(cuda_attention, "BLOCK", 4)
    policy = _policy(family)
    expected = [_learn(policy, lengths) for lengths in DENSE]
    _fuse(policy)
    for lengths, theirs in zip(DENSE, expected, strict=True):
        ours = _learn(policy, lengths)
        if lengths == [8, 8]:
            assert len(graphs) == 2, "graphs that stop at attention, or one for each number of segments"
        if lengths == [5, 9]:
            many = len(graphs)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    for lengths in reversed(DENSE):
        _learn(policy, lengths)
    assert len(graphs) == many, "what ran before decides what is compiled"


def test_numbers_that_are_equal_at_first_are_not_one(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 32 positions, of which one segment has 32, of a model 32 wide."""
    monkeypatch.setattr(cuda_attention, "CUDNN_PAYS", 8)
    monkeypatch.setattr(cuda_attention, "BLOCK", 4)
    policy = _policy("qwen3")
    _fuse(policy)
    for lengths in ([32], [32, 32], [24] * 3, [16], [8]):
        _learn(policy, lengths)
    assert len(graphs) == 2  # of one segment, and of several


def test_a_window_shorter_than_dense_rows_is_kept(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "CUDNN_PAYS", 8)
    monkeypatch.setattr(cuda_attention, "BLOCK", 4)
    policy = _policy("gemma3")  # two of its layers see 4 positions
    expected = _learn(policy, [16, 16])
    _fuse(policy)
    found = _learn(policy, [16, 16])
    assert graphs
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        ({}, True),
        ({"sliding_window": 8}, True),
        ({"sliding_window": 7}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 30.0}, False),
        ({"s_aux": torch.zeros(1)}, False),
        ({"position_bias": torch.zeros(1)}, False),
    ],
)
def test_graphs_go_through_attention_whose_scores_are_as_they_come(named: dict[str, Any], plain: bool) -> None:
    assert attention._is_plain(8, named) is plain


def test_layers_that_train_are_not_taken_for_those_that_do_not(graphs: list[Any]) -> None:
    policy = _policy("qwen3")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = "layers.1" in name or "embed" in name
    expected = _learn(policy, [9, 5])
    _fuse(policy)
    found = _learn(policy, [9, 5])
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_adapters_that_are_switched_off_stay_off(graphs: list[Any]) -> None:
    policy = _policy("qwen3", lora=True)
    policy.model.get_input_embeddings().weight.requires_grad = True
    _fuse(policy)
    on = _learn(policy, [9, 5])["loss"]
    for module in policy.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)  # type: ignore[operator]
    assert not torch.equal(_learn(policy, [9, 5])["loss"], on)


def test_nothing_is_compiled_where_nothing_is_learnt(graphs: list[Any]) -> None:
    policy = _policy("qwen3")
    _fuse(policy)
    with torch.no_grad():
        policy.score(collate([Example((Piece(np.arange(5)),))], [0], packed=True, pad_id=0), Want(hidden=True))
    assert not graphs


def test_recomputed_layers_have_the_same_gradients(graphs: list[Any]) -> None:
    policy = _policy("qwen3")
    expected = _learn(policy, [9, 5])
    _fuse(policy)
    compat.recompute(policy.model, [])
    found = _learn(policy, [9, 5])
    assert graphs
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_forward_that_is_a_closure_is_compiled_too(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(torch.nn.Linear):
        def forward(self, hidden_states: Tensor, *, more: int = 1) -> Tensor:
            return super().forward(hidden_states) + more  # super() closes over the class

    layer, x = Wider(4, 4), torch.randn(2, 3, 4, requires_grad=True)
    expected = layer(x)
    compiled_layers.fuse(layer)
    for dense in (False, True):  # for each a function of its own
        monkeypatch.setattr(compiled_layers, "_is_dense", lambda *_, dense=dense: dense)
        torch.testing.assert_close(layer(x), expected)
    assert len(graphs) == 2


def test_what_torch_cannot_compile_runs_as_before(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import Unsupported

    def fails(*_: Any, **__: Any) -> Any:
        raise Unsupported("not today")

    policy = _policy("qwen3")
    expected = _learn(policy, [9, 5])
    monkeypatch.setattr("tunesmith.compat.compiled", lambda function: fails)
    _fuse(policy)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        found = _learn(policy, [9, 5])
    assert "Qwen3DecoderLayer is not compiled: not today" in caplog.text
    assert len(caplog.records) == 1
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_on_a_cpu_layers_stay_as_they_are() -> None:
    policy = _policy("qwen3")
    assert accelerate(policy, compiled=layers(policy.model).values())[COMPILED] == 0
    assert all("forward" not in vars(layer) for layer in layers(policy.model).values())


def test_a_run_hands_on_what_its_plan_says(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def watched(model: Any, *, compiled: Any = (), **options: Any) -> dict[str, int]:
        handed.append(len(list(compiled)))
        return accelerate(model, **options)

    def as_on_a_long_run(facts: Any, placement: Any, *_: Any) -> Any:
        return replace(placement, compiled=True)

    monkeypatch.setattr("tunesmith.session.accelerate", watched)
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "lora", "train": {"max_steps": 1}}
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)]
    api.train(recipe, data={"train": rows}, out=tmp_path / "short")
    monkeypatch.setattr("tunesmith.settings.with_compiling", as_on_a_long_run)
    api.train(recipe, data={"train": rows}, out=tmp_path / "long")
    assert handed == [0, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_compiled_for_cuda_numbers_stay(family: str, lora: bool) -> None:
    policy = _policy(family, lora).to("cuda")
    rows = [[n * 15 for n in lengths] for lengths in LENGTHS] + [[n * 256 for n in lengths] for lengths in DENSE]
    expected = [_learn(policy, lengths) for lengths in rows]
    assert accelerate(policy, compiled=layers(policy.model).values())[COMPILED] == 3
    for lengths, theirs in zip(rows, expected, strict=True):
        ours = _learn(policy, lengths)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=1e-5)
