"""The one entry to our kernels: what of a model runs on them, and how many modules that are."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import nn

from tunesmith.kernels import compiled_layers, decoder_layer, fp8_linear, lora_linear, rms_norm

log = logging.getLogger("tunesmith.kernels")

KERNELS = {"lora_linear": lora_linear.fuse, "rms_norm": rms_norm.fuse}
LAYERS = "decoder_layer"
COMPILED = "compiled_layers"
FP8 = "fp8_linear"


def accelerate(
    model: nn.Module, *, fp8: bool = False, layers: bool = True, compiled: Iterable[nn.Module] = ()
) -> dict[str, int]:
    """Swaps the forwards of modules that a kernel serves, after adapters are attached; idempotent.

    Returns how many modules each kernel took. Parameters and state_dict stay as they are, and module classes but for
    linear layers that train in e4m3; each kernel sees at each call whether it applies and leaves the rest to the
    module's own forward.
    fp8: frozen weights of decoder layers on CUDA are kept in e4m3. Without `layers` those keep their weights where
    they lie, as they must where other models share them. compiled: layers that torch compiles on CUDA, where no kernel
    of ours takes them, or not while they train, because adapters drop out; with fp8, what of them trains is multiplied
    in e4m3.
    """
    compiled = list(compiled)
    own = {id(layer) for layer in compiled if decoder_layer.drops_out(layer)}
    taken = dict.fromkeys([*KERNELS, LAYERS, COMPILED, FP8], 0)
    device = next((p.device.type for p in model.parameters()), "cpu")
    if layers and device == "cuda" and find_spec("triton") is not None:
        for module in model.modules():
            taken[LAYERS] += id(module) not in own and decoder_layer.fuse(module, fp8=fp8)
        if taken[LAYERS]:
            taken["rms_norm"] += sum(map(rms_norm.fuse, _behind_layers(model)))
    left = [layer for layer in compiled if device == "cuda" and not hasattr(layer, "fast")]
    for layer in left:
        taken[FP8] += fp8_linear.fuse(layer) if fp8 and fp8_linear.is_installed() else 0
        compiled_layers.fuse(layer)
    taken[COMPILED] = len(left)
    if device == "cpu":
        keep_memory()
        for module in model.modules():
            for name, fuse in KERNELS.items():
                taken[name] += fuse(module)
    log.debug("kernels: %s", taken)
    return taken


def _behind_layers(model: nn.Module) -> list[nn.Module]:
    """Modules of `model` outside its layers, which are lists of those that run fast."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(hasattr(layer, "fast") for layer in m)]
    inside = {id(part) for each in lists for part in each.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def keep_memory() -> bool:
    """Tells glibc to keep freed memory for the next step; elsewhere nothing, and False.

    By default large tensors go back to the system at each release, and each step pays for mapping them
    anew: 15,000 to 37,000 page faults and 4% of the time of a LoRA step of a 135M model.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    # Some versions of glibc take no mmap threshold above 32 MiB.
    mapped = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mapped)
