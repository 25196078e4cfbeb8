"""Products with a frozen weight, by the library that is fastest on this processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def times_transposed(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W' + b over the last dimension of x, for use where autograd does not look."""
    if _onednn_serves(x, weight_OI):
        return _onednn(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


def times(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W over the last dimension of x, for use where autograd does not look."""
    return _onednn(x, weight_OI.T, None) if _onednn_serves(x, weight_OI) else x @ weight_OI


def _onednn_serves(x: Tensor, weight_OI: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32 and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products go to oneDNN rather than to MKL, torch's choice for them.

    A rule and no probe, because the two round differently and a resumed run must repeat its bits. MKL
    keeps its best kernels for Intel: on one AMD EPYC (Zen 4) core, 1,000 x 576 by 576 x 1,536 ran at 81
    GFLOP/s in MKL and 92 in oneDNN, the same backwards at 95 and 103, from 1,536 to 576 at 90 and 102,
    backwards at 78 and 101; a LoRA step of a 135M model took 11% less time.
    """
    mkldnn = cast(Any, torch.backends).mkldnn
    if not (mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def _onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """torch's own call to oneDNN's inner product, the one its compiler emits; it takes strided weights as they are."""
    return cast(Any, torch.ops.mkldnn)._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
