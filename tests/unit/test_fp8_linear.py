"""Linear layers that train in e4m3: near the plain product where they learn, the plain product elsewhere.

On a CPU torchao emulates its kernels; a GPU-marked test multiplies in e4m3 on its tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tunesmith import api
from tunesmith.facts import Facts
from tunesmith.kernels import attention, compiled_layers, fp8_linear
from tunesmith.kernels.accelerate import COMPILED, FP8, accelerate
from tunesmith.models.layers import layers
from tunesmith.models.saved import read_card

torchao = pytest.importorskip("torchao.float8", reason="torchao is not installed")
BOUND = 0.05  # e4m3 keeps three binary digits: 2**-4 of a factor at most, and less of sums of many products


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torchao.Float8LinearConfig.from_recipe_name
    monkeypatch.setattr(torchao.Float8LinearConfig, "from_recipe_name", lambda name: replace(made(name), emulate=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.odd, self.frozen = nn.Linear(64, 48), nn.Linear(48, 40), nn.Linear(40, 32)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.odd(self.wide(x)))


def _learn(block: nn.Module, x_ND: Tensor) -> dict[str, Tensor]:
    x_ND = x_ND.clone().requires_grad_()
    block.zero_grad()
    out = block(x_ND)
    out.square().sum().backward()
    assert x_ND.grad is not None
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x_ND.grad, **grads}


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("seed", range(3))
def test_what_trains_is_multiplied_in_e4m3_and_the_rest_as_before(seed: int, emulated: None) -> None:
    torch.manual_seed(seed)
    block, x_ND = Block(), torch.randn(32, 64)
    expected = _learn(block, x_ND)
    held = dict(block.named_parameters())
    odd, frozen = block.odd, block.frozen
    assert [fp8_linear.fuse(block) for _ in range(2)] == [1, 1]
    assert block.odd is odd, "a width that is no multiple of 16"
    assert block.frozen is frozen
    assert {name: id(p) for name, p in block.named_parameters()} == {name: id(p) for name, p in held.items()}
    found = _learn(block, x_ND)
    assert found.keys() == expected.keys()
    assert 0 < _apart(found["out"], expected["out"]) < BOUND
    for name, theirs in expected.items():
        assert found[name].dtype == theirs.dtype
        assert _apart(found[name], theirs) < 2 * BOUND, name


def test_any_number_of_positions_is_multiplied_in_whole_multiples(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product for the weight's gradient is along the positions, of which tensor cores take 16 at a time."""
    torch.manual_seed(0)
    block, x_BTD = Block(), torch.randn(3, 11, 64)
    expected = _learn(block, x_BTD)
    fp8_linear.fuse(block)
    seen: list[int] = []
    theirs = type(block.wide).__base__.forward  # type: ignore[union-attr]

    def watched(self: Any, x_ND: Tensor) -> Tensor:
        seen.append(len(x_ND))
        return theirs(self, x_ND)

    monkeypatch.setattr(type(block.wide).__base__, "forward", watched)
    found = _learn(block, x_BTD)
    assert seen == [48]
    for name, theirs_of_it in expected.items():
        assert found[name].shape == theirs_of_it.shape
        assert _apart(found[name], theirs_of_it) < 2 * BOUND, name


def test_what_does_not_learn_is_multiplied_as_before(emulated: None) -> None:
    torch.manual_seed(0)
    block, x_ND = Block(), torch.randn(32, 64)
    with torch.no_grad():
        expected = block(x_ND)
        fp8_linear.fuse(block)
        assert torch.equal(block(x_ND), expected)


def test_what_was_saved_is_held_as_it_was_and_not_as_it_was_multiplied(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Facts, "multiplies_otherwise", property(lambda _: True))
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "full", "train": {"max_steps": 1}}
    recipe |= {"precision": "fp32", "place": {"device": "cpu"}}
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)]
    run = api.train(recipe, data={"train": rows}, out=tmp_path / "run")
    assert read_card(run.path / "model")["precision"] == "bf16"


@pytest.fixture
def compiled() -> Iterator[None]:
    from transformers.modeling_utils import AttentionInterface

    yield
    compiled_layers._compiled.cache_clear()
    attention.keep_outside_graphs.cache_clear()
    AttentionInterface.register(attention.IMPLEMENTATION, attention.segment_attention)


@pytest.mark.gpu
def test_a_model_learns_in_e4m3(compiled: None) -> None:
    """Both ways lose nearly the same, and every linear layer of the model was multiplied in e4m3."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    ids_BT = torch.randint(64, (2, 512), generator=torch.Generator().manual_seed(0)).cuda()
    losses: dict[bool, list[float]] = {}
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, **sizes, **heads)).cuda().train()
        taken = accelerate(model, fp8=fp8, compiled=layers(model).values())
        assert (taken[FP8], taken[COMPILED]) == ((14, 2) if fp8 else (0, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[fp8] = []
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids_BT, labels=ids_BT).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fp8].append(loss.item())
    assert losses[True][-1] < 0.9 * losses[True][0]
    assert losses[True][-1] == pytest.approx(losses[False][-1], rel=0.05)
    assert losses[True] != losses[False]
