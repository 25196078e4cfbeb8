"""Which dtype this machine is fast in, measured once and cached: a dtype is probed, never assumed."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from tunesmith import compat, rundir

SHAPE = (1024, 768, 2048)  # tokens, in, out: a linear layer of a small model
GPU_SHAPE = (8192, 4096, 4096)
# How many times faster bf16's products must be before whole steps are taken in it. Our kernels for CPUs serve fp32:
# where products were 2.6 and 3.3 times faster, LoRA steps of a 135M model were 1.15 and 1.13 times faster, less exact,
# and took more memory with each new length (`memory.kernel_bytes`).
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
    speed = Speed(name, _rate(device, torch.float32), _rate(device, torch.bfloat16))
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path, asdict(speed), shared=True)
    return speed


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    tokens, width, outputs = GPU_SHAPE if device.type == "cuda" else SHAPE
    try:
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        w = torch.randn(outputs, width, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            _wait(device)
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    except RuntimeError:  # a dtype that the device does not serve
        return 0.0
    return 2 * tokens * width * outputs / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
