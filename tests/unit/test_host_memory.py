"""Inputs of layers that run again, in the host's memory: the same gradients, nothing of them left on the device."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.methods.lora import Lora
from tunesmith.models import host_memory
from tunesmith.models.fetch import resolve
from tunesmith.models.few import few_layers
from tunesmith.models.layers import layers, set_dropout
from tunesmith.models.policy import Policy, Tokens
from tunesmith.models.recompute import Again, recompute

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 5, 7, 6, 5]])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _model(folder: Path, device: str, *, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = few_layers(resolve(str(folder)), "lm", "fp32", 4, device, in_nf4=False)
    if lora:  # the first layer's input then needs no gradient
        Lora(Lora.Options(rank=2), 0.2).attach(Policy(model, "decoder", Tokens((), 0), packed=False))
    return model.train()


def _learn(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_bert", "tiny_t5", "lora"])
def test_gradients_stay_to_the_bit(family: str, count: int, device: str, request: pytest.FixtureRequest) -> None:
    lora = family == "lora"
    model = _model(request.getfixturevalue("tiny_llama" if lora else family), device, lora=lora)
    set_dropout(model, 0.2)
    again = copy.deepcopy(model)
    recompute(model, "whole", count)
    recompute(again, "away", count)
    for _ in range(2):
        expected, found = _learn(model), _learn(again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_nothing_is_copied_where_nothing_is_learnt(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tiny_llama, "cpu")
    recompute(model, "away", 4)
    monkeypatch.setattr(host_memory, "_Input", lambda *_: pytest.fail("copied"))
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(pytest.fail.Exception, match="copied"):
        model(input_ids=IDS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "stay"), [("whole", 3), ("away", 0)])
def test_what_a_layer_begins_with_is_let_go(way: Again, stay: int, device: str, tiny_llama: Path) -> None:
    model = _model(tiny_llama, device)
    recompute(model, way, 4)
    inputs: list[Any] = []
    for layer in list(layers(model).values())[1:]:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
    loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
    gc.collect()
    assert sum(kept() is not None for kept in inputs) == stay
    loss.backward()


def test_the_layer_below_comes_back_while_one_runs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tiny_llama, "cpu")
    recompute(model, "away", 4)
    made: list[Any] = []
    done: list[tuple[str, int]] = []
    create, fetch = host_memory._Input.__init__, host_memory._Input.fetch

    def created(self: Any, *given: Any) -> None:
        made.append(weakref.ref(self))
        create(self, *given)

    def fetched(self: Any) -> None:
        number = next(i for i, one in enumerate(made) if one() is self)
        done.append(("there" if self._back is not None else "asked", number))
        fetch(self)

    monkeypatch.setattr(host_memory._Input, "__init__", created)
    monkeypatch.setattr(host_memory._Input, "fetch", fetched)
    losses = [model(input_ids=IDS, labels=IDS).loss for _ in range(2)]  # of two forwards each comes back by itself
    for loss in losses:
        loss.backward()
    asked = [number for state, number in done if state == "asked"]
    assert asked == [3, 2, 1, 0, 7, 6, 5, 4]
    assert [number for state, number in done if state == "there"] == [2, 1, 0, 6, 5, 4], "each was on its way"
    gc.collect()
    assert not any(one() for one in made)


@pytest.mark.gpu
def test_what_waits_for_a_copy_does_not_pile_up_on_the_device() -> None:
    """Of 24 layers, which the host queues faster than one input is copied, few inputs are on the device at a time."""
    weight = torch.eye(1024, device="cuda", requires_grad=True)
    hidden = torch.randn(16_384, 1024, device="cuda", requires_grad=True)
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    below: host_memory.Again | None = None
    out = hidden
    for _ in range(24):
        below = host_memory.Again(below)
        out = below(lambda x: x @ weight, out)
    out.sum().backward()
    most = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.ones_like(hidden))
    assert most < 9 * hidden.numel() * hidden.itemsize


@pytest.mark.gpu
def test_a_frozen_table_lies_in_the_hosts_memory(tiny_llama: Path) -> None:
    model = _model(tiny_llama, "cuda", lora=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    expected = _learn(model)
    table = model.get_input_embeddings().weight
    size, before = table.numel() * table.itemsize, torch.cuda.memory_allocated()
    recompute(model, "away", 4)
    assert before - torch.cuda.memory_allocated() >= size
    assert table.is_cuda
    found = _learn(model)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_table_that_learns_or_is_shared_stays(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "mapped", lambda _: pytest.fail("moved"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = _model(tiny_llama, "cpu")
    host_memory.keep(model, [])
    other = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.weight = other
    host_memory.keep(model, [])
    model.requires_grad_(False)
    model.lm_head.weight = model.get_input_embeddings().weight
    host_memory.keep(model, [])
    model.lm_head.weight = other
    with pytest.raises(pytest.fail.Exception, match="moved"):
        host_memory.keep(model, [])
