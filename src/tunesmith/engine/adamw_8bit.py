"""AdamW whose moments take 8 bits a number, and whose bfloat16 weights are rounded by chance."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 256  # numbers that share a scale
CHUNK = 2**18  # numbers moved at a time where no kernel serves: on a CPU core 22 ns each, 36 by 2**20, 38 by 2**14
LEAST = 1e-30  # of a scale that is divided by
_STEP, _PLACE = 0x9E3779B1, 0x85EBCA77  # odd, so that steps and parameters have draws of their own


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) in 2 bytes of state a parameter.

    Both moments are in blocks of 256 that share a scale in float32, as in Dettmers et al. 2022 (arXiv 2110.02861),
    but by the square root: the first moment as `sign(c) (c / 127)^2` of the block's largest, the root of the second as
    `(c / 255)^2` of it, which is never 0 where the moment is not, so that no step is divided by nothing. Codes and
    bfloat16 weights are rounded up or down by chance, in proportion to what is lost, so that what is smaller than
    their last bit adds up as it should (Gupta et al. 2015, arXiv 1502.02551). The draw is by seed, step, parameter and
    place: a run that goes on makes the one that was never stopped. float32 weights are moved as they are.

    `found_inf`: a step moves nothing where this number on the device is not 0. `grad_scale`: gradients are so many
    times too large; those in float32 are divided in place, as torch's AdamW does. Neither is waited for. On CUDA one
    Triton kernel a parameter reads 6 bytes of each number of a bfloat16 parameter and writes 4.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        place = 0
        if self.grad_scale is not None:  # what learns from a float32 gradient afterwards finds it as torch leaves it
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if whole := [gradient for gradient in gradients if gradient.dtype == torch.float32]:
                cast(Any, torch)._foreach_div_(whole, self.grad_scale)
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(fresh(parameter))
                state["step"] += 1
                number = int(state["step"])
                key = _key(self._seed, number, place)
                excess = None if parameter.grad.dtype == torch.float32 else self.grad_scale
                _move(parameter, state, group, key, number, self.found_inf, excess)


def fresh(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter that has not moved yet."""
    count = parameter.numel()
    blocks, device = -(-count // BLOCK), parameter.device
    return {
        "step": torch.zeros((), dtype=torch.int64),
        "first": torch.zeros(count, dtype=torch.int8, device=device),
        "first_scale": torch.zeros(blocks, device=device),
        "second": torch.zeros(count, dtype=torch.uint8, device=device),
        "second_scale": torch.zeros(blocks, device=device),
    }


def _key(seed: int, step: int, place: int) -> int:
    """32 bits, as a signed number, that tell the draws of one parameter's step from others."""
    return (seed + step * _STEP + place * _PLACE) % 2**32 - 2**31


def _move(
    parameter: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    key: int,
    number: int,
    held: Tensor | None,
    excess: Tensor | None,
) -> None:
    gradient = parameter.grad
    assert gradient is not None
    beta1, beta2 = group["betas"]
    numbers = {
        "keep": 1.0 - group["lr"] * group["weight_decay"],
        "rate": group["lr"] / (1.0 - beta1**number),
        "beta1": beta1,
        "beta2": beta2,
        "unbias": (1.0 - beta2**number) ** -0.5,
        "eps": group["eps"],
    }
    flat, slope = parameter.view(-1), gradient.reshape(-1)
    codes = (state["first"], state["first_scale"], state["second"], state["second_scale"])
    if parameter.is_cuda and find_spec("triton") is not None:
        from tunesmith.kernels.triton_adamw_8bit import move

        move(flat, slope, *codes, key, held, excess, block=BLOCK, **numbers)
    elif held is None or not held:
        slope = slope if excess is None else slope.float() / excess
        for start in range(0, len(flat), CHUNK):
            part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            first, first_scale, second, second_scale = codes
            moments = (first[part], first_scale[blocks], second[part], second_scale[blocks])
            move_plainly(flat[part], slope[part], *moments, key, start, **numbers)


def move_plainly(
    weight_N: Tensor,
    gradient_N: Tensor,
    first_N: Tensor,
    first_scale_B: Tensor,
    second_N: Tensor,
    second_scale_B: Tensor,
    key: int,
    start: int,
    *,
    keep: float,
    rate: float,
    beta1: float,
    beta2: float,
    unbias: float,
    eps: float,
) -> None:
    """One step of `N` numbers, whose first is number `start` of its parameter, in place; the kernel does the same."""
    draw_N = _hashed(torch.arange(start, start + len(weight_N), dtype=torch.int32, device=weight_N.device) ^ key)
    gradient_N = gradient_N.float()
    code_N = first_N.float()
    moment_N = code_N * code_N.abs() * _each(first_scale_B / 127**2, first_N)
    root_N = second_N.float().square() * _each(second_scale_B / 255**2, second_N)
    moment_N = beta1 * moment_N + (1 - beta1) * gradient_N
    root_N = (beta2 * root_N.square() + (1 - beta2) * gradient_N.square()).sqrt()
    moved_N = weight_N.float() * keep - rate * moment_N / (root_N * unbias + eps)
    if weight_N.dtype == torch.bfloat16:  # a bfloat16 is the upper half of a float32
        moved_N = ((moved_N.view(torch.int32) + (draw_N & 0xFFFF)) & -0x10000).view(torch.float32)
    weight_N.copy_(moved_N)
    first_scale_B.copy_(_largest(moment_N.abs()))
    first_N.copy_(_code(moment_N.abs(), first_scale_B, 127, draw_N >> 16).copysign(moment_N))
    second_scale_B.copy_(_largest(root_N))
    second_N.copy_(_code(root_N, second_scale_B, 255, draw_N >> 24).clamp(min=1) * (root_N > 0))


def _hashed(x: Tensor) -> Tensor:
    """32 bits in which each bit of 32 given ones changes half (lowbias32: nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _blocks(x_N: Tensor) -> Tensor:
    """[B, 256], zeros behind the last."""
    return torch.nn.functional.pad(x_N, (0, -len(x_N) % BLOCK)).view(-1, BLOCK)


def _largest(x_N: Tensor) -> Tensor:
    return _blocks(x_N).amax(1)


def _each(scale_B: Tensor, like_N: Tensor) -> Tensor:
    """The scale of each number's block."""
    return scale_B.repeat_interleave(BLOCK)[: len(like_N)]


def _code(x_N: Tensor, scale_B: Tensor, most: int, draw_N: Tensor) -> Tensor:
    """The whole number `c` for which `(c / most)^2` of the block's scale is `x_N` on average over the draw's 8 bits."""
    square_N = x_N * _each(most**2 / scale_B.clamp(min=LEAST), x_N)
    code_N = square_N.sqrt().floor()
    up_N = (draw_N & 0xFF) * (2 * code_N + 1) < 256 * (square_N - code_N.square())
    return (code_N + up_N).clamp(max=most)
