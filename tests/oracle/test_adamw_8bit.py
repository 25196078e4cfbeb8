"""AdamW in 8 bits against torch's in float32 and against its formulas; the kernel against the plain way; chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tunesmith.engine.adamw_8bit import BLOCK, CHUNK, AdamW8bit, fresh, move_plainly

NUMBERS: dict[str, float] = {"keep": 0.999, "rate": 0.01, "beta1": 0.9, "beta2": 0.999, "unbias": 3.0, "eps": 1e-8}
MOMENTS = ("first", "first_scale", "second", "second_scale")


def drawn(count: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A weight, its gradient, and moments as a few steps leave them."""
    torch.manual_seed(seed)
    weight, gradient = torch.randn(count), torch.randn(count) * torch.logspace(-4, 1, count)
    state = fresh(weight)
    for key in range(3):
        move_plainly(weight, gradient * torch.randn(count), *(state[n] for n in MOMENTS), key, 0, **NUMBERS)
    where = {name: value.to(device) for name, value in state.items()}
    return weight.to(device, dtype), gradient.to(device, dtype), where


def test_hash_of_known_numbers() -> None:
    """lowbias32 in Python's whole numbers."""
    from tunesmith.engine.adamw_8bit import _hashed  # pyright: ignore[reportPrivateUsage]

    def plain(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    given_ = [0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 0x12345678]
    found = _hashed(torch.tensor([x - 2**32 if x >= 2**31 else x for x in given_], dtype=torch.int32))
    assert [int(x) % 2**32 for x in found] == [plain(x) for x in given_]


def test_a_block_of_nothing_has_codes_of_nothing() -> None:
    from tunesmith.engine.adamw_8bit import _code  # pyright: ignore[reportPrivateUsage]

    draw = torch.zeros(2 * BLOCK, dtype=torch.int32)
    for scale in (0.0, 1e-45):
        codes = _code(torch.full((2 * BLOCK,), scale), torch.full((2,), scale), 127, draw)
        assert codes.isfinite().all()
    assert not _code(torch.zeros(2 * BLOCK), torch.zeros(2), 127, draw).any()


@given(st.integers(1, 3 * BLOCK), st.integers(0, 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_a_step_is_what_its_formulas_say(count: int, seed: int, key: int) -> None:
    """Each number by Python's floats; codes are one of the two that stand around the exact ones."""
    weight, gradient, state = drawn(count, torch.float32, seed)
    before = {name: value.clone() for name, value in state.items()} | {"weight": weight.clone()}
    move_plainly(weight, gradient, *(state[n] for n in MOMENTS), key, 0, **NUMBERS)
    firsts, roots = [], []
    for i in range(count):
        code = int(before["first"][i]) / 127
        first = code * abs(code) * float(before["first_scale"][i // BLOCK])
        root = (int(before["second"][i]) / 255) ** 2 * float(before["second_scale"][i // BLOCK])
        firsts.append(0.9 * first + 0.1 * float(gradient[i]))
        roots.append(math.sqrt(0.999 * root**2 + 0.001 * float(gradient[i]) ** 2))
        moved = float(before["weight"][i]) * 0.999 - 0.01 * firsts[i] / (3 * roots[i] + 1e-8)
        assert float(weight[i]) == pytest.approx(moved, rel=1e-4, abs=1e-6)
    for i in range(count):
        block = slice(i // BLOCK * BLOCK, (i // BLOCK + 1) * BLOCK)
        exact = 127 * math.sqrt(abs(firsts[i]) / max(map(abs, firsts[block])))
        assert abs(abs(int(state["first"][i])) - exact) < 1.01
        assert int(state["first"][i]) * firsts[i] >= 0
        exact = 255 * math.sqrt(roots[i] / max(roots[block]))
        assert abs(int(state["second"][i]) - max(exact, 1)) < 1.01
        assert int(state["second"][i]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_a_parameter_are_moved_as_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Tensor] = []
    for chunk in (CHUNK, 2 * BLOCK):
        monkeypatch.setattr("tunesmith.engine.adamw_8bit.CHUNK", chunk)
        results.append(trained(dtype, steps=4, count=5 * BLOCK + 3))
    assert torch.equal(*results)


def trained(dtype: torch.dtype, steps: int, count: int = 400, make: Any = AdamW8bit, **options: Any) -> Tensor:
    """A quadratic with slopes of very different sizes, from the same start."""
    torch.manual_seed(3)
    start, target = torch.randn(2, count)
    size = torch.logspace(-3, 2, count)
    parameter = nn.Parameter(start.to(dtype))
    optimizer = make([{"params": [parameter]}], lr=0.01, weight_decay=0.1, **options)
    for _ in range(steps):
        parameter.grad = (size * (parameter.detach().float() - target)).to(dtype)
        optimizer.step()
    return parameter.detach()


def test_it_goes_where_adamw_in_float32_goes() -> None:
    exact = trained(torch.float32, 300, make=torch.optim.AdamW)
    start = trained(torch.float32, 0)
    way = (exact - start).norm()
    assert (trained(torch.float32, 300) - exact).norm() < 0.03 * way
    assert (trained(torch.bfloat16, 300).float() - exact).norm() < 0.04 * way


def test_moves_below_a_bfloat16s_last_bit_add_up() -> None:
    """1,000 moves of 1e-4 at 1, below which bfloat16 has steps of 2^-8: rounded to the nearest none would be left."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamW8bit([{"params": [parameter]}], lr=1e-4)
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(parameter.detach().float().mean()) == pytest.approx(0.9, abs=0.005)


def test_a_second_moment_fades_though_its_code_is_coarser() -> None:
    """Without gradients it falls by a thousandth a step, a sixteenth of what one code is."""
    weight, count = torch.zeros(2 * BLOCK), 2 * BLOCK
    state = fresh(weight)
    state["second"].fill_(128)
    state["second"][::BLOCK] = 255
    state["second_scale"].fill_(1.0)
    for key in range(500):
        state["second_scale"].fill_(1.0)  # as if the largest of the block went on
        state["second"][::BLOCK] = 255
        slope = torch.zeros(count)
        slope[::BLOCK] = 1.0
        move_plainly(weight, slope, *(state[n] for n in MOMENTS), 7919 * key, 0, **NUMBERS)
    root = (state["second"].float() / 255).square() * state["second_scale"].repeat_interleave(BLOCK)
    mean = float(root.view(-1, BLOCK)[:, 1:].mean())
    assert mean == pytest.approx((128 / 255) ** 2 * 0.999**250, rel=0.03)


def test_the_same_seed_and_step_draw_the_same_and_others_do_not() -> None:
    one, again, other = (trained(torch.bfloat16, 3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_two_parameters_have_draws_of_their_own() -> None:
    start = torch.ones(4096, dtype=torch.bfloat16)
    pair = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = AdamW8bit([{"params": pair}], lr=1e-3)
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(*pair)


def test_a_held_step_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(300))
    optimizer = AdamW8bit([{"params": [parameter]}])
    parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(300))
    assert not optimizer.state[parameter]["first_scale"].any()
    parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_may_be_told_to_be_too_large(dtype: torch.dtype) -> None:
    moved: list[Tensor] = []
    for excess in (1.0, 8.0):
        parameter = nn.Parameter(torch.ones(300, dtype=dtype))
        optimizer = AdamW8bit([{"params": [parameter]}], lr=0.1, eps=1.0)
        optimizer.grad_scale = torch.tensor(excess)
        parameter.grad = (excess * torch.linspace(-1, 1, 300)).to(dtype)
        optimizer.step()
        moved.append(parameter.detach())
        left = torch.linspace(-1, 1, 300) * (1.0 if dtype == torch.float32 else excess)
        torch.testing.assert_close(parameter.grad, left.to(dtype))  # in float32 as torch's AdamW leaves it
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.ones(300, dtype=dtype))


def test_a_parameter_without_a_gradient_stays() -> None:
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([{"params": [moved, still]}], weight_decay=0.1)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert still not in optimizer.state


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, BLOCK, 5 * BLOCK + 3, 70_001])
@pytest.mark.parametrize(("held", "excess"), [(None, None), (0.0, 3.0), (1.0, None)])
def test_the_kernel_moves_as_the_plain_way(
    dtype: torch.dtype, count: int, held: float | None, excess: float | None
) -> None:
    from tunesmith.kernels.triton_adamw_8bit import move

    key = -123456789
    weight, gradient, state = drawn(count, dtype, seed=count, device="cuda")
    plain, before = weight.clone(), weight.clone()
    theirs = {name: value.clone() for name, value in state.items()}
    told = [None if number is None else torch.tensor(number, device="cuda") for number in (held, excess)]
    move(weight, gradient, *(state[n] for n in MOMENTS), key, *told, block=BLOCK, **NUMBERS)
    if held:
        assert torch.equal(weight, before)
        return
    move_plainly(plain, gradient.float() / (excess or 1.0), *(theirs[n] for n in MOMENTS), key, 0, **NUMBERS)
    # Sums are rounded in another order, so that a draw falls differently now and then.
    off = (weight.float() - plain.float()).abs()
    assert off.max() <= (2**-7 * plain.float().abs().max() if dtype == torch.bfloat16 else 1e-5)
    assert (off > 1e-5).float().mean() < 0.002
    for name in MOMENTS:
        codes = not name.endswith("scale")
        torch.testing.assert_close(state[name].float(), theirs[name].float(), rtol=1e-4, atol=float(codes))
        assert not codes or (state[name] != theirs[name]).float().mean() < 0.002
