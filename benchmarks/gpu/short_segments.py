"""Attention over short segments, forward and backward: each alone, one padded batch, FlexAttention's blocks.

    python benchmarks/gpu/short_segments.py

One CUDA card; bfloat16; median of 30 after warm-up (compilation is in "first"). One line a shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels import cuda_attention, padded_attention
from tunesmith.kernels.attention import Bounds
from tunesmith.kernels.cuda_attention import Look

SHAPES = {  # name: segments, shortest, longest, heads, width, causal
    "32 messages, MiniLM": (32, 8, 60, 12, 32, False),
    "32 paragraphs, BERT": (32, 60, 400, 12, 64, False),
    "8 chats, SmolLM2-135M": (8, 100, 300, 9, 64, True),
    "28 chats, Llama-3.1-8B": (28, 180, 400, 32, 128, True),
    "4 documents, Llama-3.1-8B": (4, 500, 3000, 32, 128, True),
}


def milliseconds(go: Callable[[], None], repeats: int = 30) -> float:
    times: list[float] = []
    for _ in range(repeats + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        go()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def ways(inputs: list[Tensor], look: Look) -> dict[str, Callable[[], Tensor]]:
    def each() -> Tensor:
        cut = [[x[:, :, a:b] for x in inputs] for a, b in look.bounds.rows[0]]
        rows = [F.scaled_dot_product_attention(*qkv, is_causal=look.causal) for qkv in cut]
        return torch.cat(rows, dim=2).transpose(1, 2).contiguous()

    return {
        "each": each,
        "padded": lambda: padded_attention.attend(*inputs, look, 0.0),
        "blocks": lambda: cuda_attention.attend(*inputs, look),
    }


def measure(name: str, count: int, shortest: int, longest: int, heads: int, width: int, causal: bool) -> str:
    torch.manual_seed(0)
    ends = torch.randint(shortest, longest + 1, (count,)).cumsum(0).tolist()
    look = Look(Bounds([list(zip([0, *ends], ends, strict=False))]), ends[-1], causal, None, None, None)
    inputs = [torch.randn(1, ends[-1], heads, width, device="cuda").bfloat16().transpose(1, 2) for _ in range(3)]
    for x in inputs:
        x.requires_grad_()
    words = [f"{name}: {ends[-1]} positions"]
    for way, act in ways(inputs, look).items():
        started = time.perf_counter()
        gradient = torch.ones_like(act())
        torch.autograd.grad(act(), inputs, gradient)
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        found = milliseconds(partial(_both, act, inputs, gradient))
        words.append(f"{way} {found:.2f} ms (first {first:.1f} s)")
    return ", ".join(words)


def _both(act: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(act(), inputs, gradient)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; forward and backward of one layer's attention")
    for name, shape in SHAPES.items():
        print(measure(name, *shape), flush=True)


if __name__ == "__main__":
    main()
