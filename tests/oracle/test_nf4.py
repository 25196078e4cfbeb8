"""NF4 against the slow, obvious version, against bitsandbytes where it is installed, and as the base of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith import api
from tunesmith.adapters import load_adapters
from tunesmith.engine import memory
from tunesmith.kernels import nf4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS: list[dict[str, Any]] = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(12)]


def nearest(value: float, levels: NDArray[np.float32]) -> np.float32:
    return levels[int(np.abs(levels - np.float32(value)).argmin())]


def slow(weight: Tensor) -> Tensor:
    """Block by block and weight by weight."""
    levels, dynamic = np.float32(nf4.LEVELS), nf4.dynamic_levels().numpy()
    blocks = [block.numpy() for block in weight.flatten().split(64)]
    scales = np.float32([np.abs(block).max() for block in blocks])
    mean = np.float32(torch.from_numpy(scales).mean())
    held: list[np.float32] = []
    for group in np.split(scales - mean, range(256, len(scales), 256)):
        largest = max(np.abs(group).max(), np.float32(1e-30))
        held += [nearest(scale / largest, dynamic) * largest + mean for scale in group]
    parts = [[nearest(w / s, levels) * h for w in b] for b, s, h in zip(blocks, scales, held, strict=True)]
    return torch.from_numpy(np.float32(np.concatenate(parts))).view_as(weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(24, 16), (5, 7), (192, 96)])
def test_weights_are_those_of_the_slow_version(shape: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    held = nf4.Nf4Linear(linear, device)
    torch.testing.assert_close(held.weight.cpu(), slow(linear.weight.detach()), rtol=1e-6, atol=1e-7)
    assert held.weight.dtype == torch.float32


def test_there_are_256_dynamic_levels_in_order() -> None:
    levels = nf4.dynamic_levels()
    assert len(levels) == 256
    assert bool((levels.diff() > 0).all())
    assert levels[-1] == 1
    assert float(levels[levels > 0].min()) == pytest.approx(0.55e-6)


def test_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(512, 192)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = nf4.quantise(weight)
    assert torch.equal(ours["codes"], codes.flatten())
    torch.testing.assert_close(nf4.dynamic_levels(), state.state2.code)
    torch.testing.assert_close(ours["scales"], state.state2.absmax.flatten())
    apart = (ours["scale_codes"].int() - state.absmax.flatten().int()).abs()
    assert int(apart.max()) <= 1
    assert int(apart.sum()) < 0.01 * len(apart)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_the_linear_layer_of_its_dequantised_weights(autocast: bool, device: str) -> None:
    torch.manual_seed(0)
    layer = nf4.Nf4Linear(nn.Linear(40, 24), device)
    x = torch.randn(3, 5, 40, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = layer(x)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    grad = torch.randn_like(found)
    (ours,), (theirs,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in layer.parameters())


def test_no_pass_keeps_the_weights() -> None:
    layer = nf4.Nf4Linear(nn.Linear(64, 64), "cpu")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    assert not kept


def test_the_bytes_held_are_those_that_the_plan_counts() -> None:
    held = nf4.Nf4Linear(nn.Linear(512, 512, bias=False), "cpu")
    count = sum(buffer.numel() * buffer.element_size() for buffer in held.buffers())
    assert count / 512**2 == pytest.approx(nf4.BYTES, abs=1e-4)
    whole, less = (memory.Shape(10**9, 10**8, 10**6, 16, 8, 64, 128, 100, 2, in_nf4) for in_nf4 in (0, 8 * 10**8))
    spared = memory.static_bytes(whole, torch.device("cpu")) - memory.static_bytes(less, torch.device("cpu"))
    assert spared == pytest.approx((2 - nf4.BYTES) * 8e8, rel=1e-3)


@pytest.mark.gpu
def test_a_base_on_a_gpu_is_never_there_whole() -> None:
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(8)))
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nf4.hold_in_nf4(model, "cuda")
    weights = 8 * 4096**2
    assert 0.51 < (torch.cuda.memory_allocated() - before) / weights < 0.55
    assert (torch.cuda.max_memory_allocated() - before) < 0.55 * weights + 24 * 4096**2  # one layer at a time
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    at = torch.cuda.memory_allocated()
    out = model(x)
    assert torch.cuda.memory_allocated() - at < 2 * 10 * x.numel() * 2  # activations, and no weights
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_over_four_bits_is_what_it_exports(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": {"name": method, "rank": 4},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "int4",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 4},
    }
    run = api.train(recipe, data={"train": ROWS[:8], "test": ROWS[8:]}, out=tmp_path / "run")
    loss = {r["model"]: r["value"] for r in run.records if r["metric"] == "loss"}
    assert loss["tuned"] < loss["base"]
    assert "4 bits" in (run.path / "model" / "README.md").read_text(encoding="utf-8")
    policy = api.load(run.path).policy
    policy.model.set_attn_implementation("sdpa")
    assert sum(isinstance(m, nf4.Nf4Linear) for m in policy.model.modules()) == 14
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert nf4.hold_in_nf4(base, "cpu") == 14
    ids = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = PeftModel.from_pretrained(base, str(run.path / "model")).eval()(ids).logits
        torch.testing.assert_close(policy.model(ids).logits, theirs, rtol=1e-2, atol=1e-2)
    done = api.export(run.path, tmp_path / "merged", merge=True)
    assert done.check is not None
    assert done.check.largest < 0.05
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    base_weight = slow(model.model.layers[0].self_attn.o_proj.weight.detach().float())
    apart = merged.model.layers[0].self_attn.o_proj.weight.detach() - base_weight
    assert int(torch.linalg.matrix_rank(apart, atol=1e-3)) <= (4 if method == "lora" else 32)
    answers = [api.predict(folder, ROWS[8:]) for folder in (run.path, tmp_path / "merged")]
    assert [p.output for p in answers[0]] == [p.output for p in answers[1]]
    together = load_adapters([run.path]).predict(ROWS[8:])
    assert [p.scores for p in together] == [p.scores for p in answers[0]]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (1000, 7 * 64)])
def test_one_kernel_makes_the_weights_that_torch_makes(shape: tuple[int, int]) -> None:
    layer = nf4.Nf4Linear(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16), "cuda")
    wide = torch.full((shape[0], shape[1] + 64), 7.0, dtype=torch.bfloat16, device="cuda")
    layer.dequantise_into(wide[:, : shape[1]])
    expected = layer.dequantise(torch.float32)
    # One rounding to bfloat16; level * scale + mean may be rounded once or twice before it.
    torch.testing.assert_close(wide[:, : shape[1]].float(), expected, rtol=2**-8, atol=1e-7)
    assert (wide[:, shape[1] :] == 7.0).all()
