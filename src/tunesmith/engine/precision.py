"""Which dtype this machine is fast in, measured once and cached: a dtype is probed, never assumed."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from tunesmith import compat, rundir

SHAPE = (1024, 768, 2048)  # tokens, in, out: a linear layer of a small model
GPU_SHAPE = (8192, 4096, 4096)
ROUNDS, SECONDS = 5, 0.6  # a probe takes both at least: another process may have the cores for a moment
# How many times faster bf16's products must be before whole steps are taken in it. Our kernels for CPUs serve fp32:
# where products were 2.3 and 2.6 times faster, LoRA steps of a 135M model were 1.13 and 1.15 times faster, less exact,
# and took more memory with each new length (`memory.primitive_bytes`).
WORTH = {"cpu": 5.0, "mps": 1.1, "cuda": 1.1}


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured matrix-product rate in FLOP/s; 0 where a dtype is not served."""

    device: str
    fp32: float
    bf16: float

    @property
    def worth(self) -> float:
        """How many times the rate of fp32 pays for bf16."""
        return WORTH[self.device.split(":")[0]]

    @property
    def best(self) -> str:
        return "bf16" if self.bf16 > self.worth * self.fp32 else "fp32"


def choose_device(asked: str) -> torch.device:
    """The device that `asked` names; auto takes CUDA, then MPS, then the CPU."""
    compat.segments_grow()
    served = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, there in served.items() if there))
    return torch.device(asked)


def is_served(asked: str) -> bool:
    return asked == "auto" or (
        asked == "cpu"
        or (asked == "cuda" and torch.cuda.is_available())
        or (asked == "mps" and torch.backends.mps.is_available())
    )


def serves_fp8(device: torch.device) -> bool:
    """Whether tensor cores multiply e4m3 (compute capability 8.9 and later) and Triton is there to cast to it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def device_name(device: torch.device) -> str:
    """What the device calls itself, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def probe(device: torch.device, cache: Path) -> Speed:
    """Rates of this device with this torch and this many threads; measured in under a second, then cached."""
    name = f"{device.type}: {device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    path = cache / "speed" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    try:
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    fp32, bf16 = _rates(device, (torch.float32, torch.bfloat16))
    speed = Speed(name, fp32, bf16)
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path, asdict(speed), shared=True)
    return speed


def _rates(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[float]:
    """The best rate of each, in turns, so that what else the machine does falls on all of them."""
    tokens, width, outputs = GPU_SHAPE if device.type == "cuda" else SHAPE
    best = dict.fromkeys(dtypes, math.inf)
    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() < began + SECONDS:
        for dtype in dtypes:
            try:
                x = torch.randn(tokens, width, device=device, dtype=dtype)
                w = torch.randn(outputs, width, device=device, dtype=dtype)
                _wait(device)
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                _wait(device)
            except (RuntimeError, TypeError):  # a dtype that the device does not serve
                continue
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        rounds += 1
    return [2 * tokens * width * outputs / best[dtype] for dtype in dtypes]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
