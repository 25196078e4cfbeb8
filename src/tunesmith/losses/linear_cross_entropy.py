"""Log-probabilities of chosen tokens straight from hidden states, without ever holding the logits whole.

Shape letters: U units, V vocabulary, D width, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Each chunk reads the whole weight again, so small chunks are slow. On two CPU cores, 500 units, D 576 and V 49152,
# forward with gradient took 606 ms at 16 MiB, 477 at 32, 408 at 64, 389 at 128 (F.cross_entropy, whole logits: 432).
CPU_CHUNK_BYTES = 64 * 2**20
GPU_CHUNK_BYTES = 1024 * 2**20
# Rows of a half-precision weight turned to float32 at a time, where the device cannot accumulate in it itself.
WEIGHT_BLOCK = 8192
# Slopes of the logits that a weight which trains keeps for the backward; where they are more, it computes them again.
KEPT_BYTES = 6 * 2**30


@dataclass(frozen=True, slots=True)
class _Shape:
    """What makes logits of a projection: softcap * tanh(scale * (h W' + b) / softcap)."""

    scale: float
    softcap: float | None
    entropy: bool
    chunk_bytes: int
    products: torch.dtype | None  # of the matrix products, where it is not the inputs' own

    def cast(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs if self.products is None else tuple(x.to(self.products) for x in inputs)


@dataclass(slots=True)
class _Chunk:
    """Softmax statistics of some rows; the two large tensors are scratch and may be overwritten."""

    shifted_RV: Tensor
    probability_RV: Tensor
    maximum_R1: Tensor
    logprob_R: Tensor
    mean_R1: Tensor | None
    entropy_R: Tensor | None


def linear_logprobs(
    hidden_UD: Tensor,
    weight_VD: Tensor,
    target_U: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(softcap * tanh(scale * (h W' + b) / softcap))[target], and the entropy in nats if asked for.

    Returns float32 (float64 for float64 inputs) `logprob_U` and `entropy_U`. Logits exist for a few
    rows at a time, in about `chunk_bytes`. Because each result is one number per unit, its gradient
    to that unit's hidden state is one row of D numbers: it is computed in the forward, beside the
    logits, and the backward only multiplies. A weight or bias that trains costs one recomputation of
    the logits in the backward, or in half precision on CUDA their slopes, kept. Under autocast on CUDA
    products are in its dtype, and the gradient of a float32 weight is in float32. `softcap` is Gemma 2's
    (arXiv 2408.00118, section 2); `scale` is Cohere's logit_scale or one over Granite's logits_scaling.
    Second derivatives are not available.
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden_UD.device.type == "cpu" else GPU_CHUNK_BYTES
    autocast = hidden_UD.is_cuda and torch.is_autocast_enabled("cuda")
    products = torch.get_autocast_dtype("cuda") if autocast else None
    shape = _Shape(scale=scale, softcap=softcap, entropy=entropy, chunk_bytes=chunk_bytes, products=products)
    # needs_input_grad is also set inside no_grad, where keeping Jacobian rows would be wasted work.
    jacobian = torch.is_grad_enabled() and hidden_UD.requires_grad
    apply = cast(Callable[..., Any], _LinearLogprobs.apply)
    results = apply(hidden_UD, weight_VD, bias_V, target_U, shape, jacobian)
    return (results[0], results[1]) if entropy else (results, None)


class _LinearLogprobs(torch.autograd.Function):
    """See `linear_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_U: Tensor,
        shape: _Shape,
        jacobian: bool,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.hidden_dtype, parameter_VD = hidden_UD.dtype, weight_VD
        hidden_UD, weight_VD = shape.cast(hidden_UD, weight_VD)
        dtype = _accumulated(hidden_UD.dtype)
        count = hidden_UD.shape[0]
        logprob_U = hidden_UD.new_empty(count, dtype=dtype)
        entropy_U = hidden_UD.new_empty(count, dtype=dtype) if shape.entropy else None
        logprob_JUD = torch.empty_like(hidden_UD) if jacobian else None
        entropy_JUD = torch.empty_like(hidden_UD) if jacobian and shape.entropy else None
        fused = _is_fused(hidden_UD, weight_VD, bias_V, shape)
        kept = fused and jacobian and ctx.needs_input_grad[1] and 2 * count * len(weight_VD) <= KEPT_BYTES
        slope_UV = hidden_UD.new_empty(count, len(weight_VD)) if kept else None
        with torch.autocast(hidden_UD.device.type, enabled=False):
            if fused:
                _fused(hidden_UD, weight_VD, target_U, shape, logprob_U, logprob_JUD, slope_UV)
            for rows, chunk in () if fused else _chunks(hidden_UD, weight_VD, bias_V, target_U, shape):
                logprob_U[rows] = chunk.logprob_R
                if entropy_U is not None and chunk.entropy_R is not None:
                    entropy_U[rows] = chunk.entropy_R
                if logprob_JUD is None:
                    continue
                slope_RV = _softcap_slope(chunk, shape)
                if entropy_JUD is not None:
                    d_RV = _entropy_slope(chunk, slope_RV)
                    entropy_JUD[rows] = _times_weight(d_RV, weight_VD, hidden_UD.dtype).mul_(shape.scale)
                d_RV = _logprob_slope(chunk, target_U[rows], slope_RV)
                logprob_JUD[rows] = _times_weight(d_RV, weight_VD, hidden_UD.dtype).mul_(shape.scale)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        inputs = (hidden_UD, parameter_VD, bias_V, target_U) if trained else (None, None, None, None)
        ctx.save_for_backward(logprob_JUD, entropy_JUD, slope_UV, *inputs)
        ctx.shape, ctx.fused = shape, fused
        return (logprob_U, entropy_U) if shape.entropy else logprob_U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_logprob_U = grad_outputs[0]
        grad_entropy_U = grad_outputs[1] if len(grad_outputs) > 1 else None
        logprob_JUD, entropy_JUD, slope_UV, hidden_UD, weight_VD, bias_V, target_U = ctx.saved_tensors
        grad_hidden_UD: Tensor | None = None
        for grad_U, jacobian_UD in ((grad_logprob_U, logprob_JUD), (grad_entropy_U, entropy_JUD)):
            if grad_U is None or jacobian_UD is None:
                continue
            # A new tensor: the graph may be kept for a second backward.
            part_UD = (grad_U[:, None] * jacobian_UD).to(ctx.hidden_dtype)
            grad_hidden_UD = part_UD if grad_hidden_UD is None else grad_hidden_UD.add_(part_UD)
        grad_weight_VD: Tensor | None = None
        grad_bias_V: Tensor | None = None
        if ctx.fused and ctx.needs_input_grad[1] and grad_logprob_U is not None:
            with torch.autocast("cuda", enabled=False):
                (half_VD,) = ctx.shape.cast(weight_VD)
                inputs = (hidden_UD, half_VD, target_U, grad_logprob_U, ctx.shape, slope_UV)
                grad_weight_VD = _fused_weight_gradient(*inputs).to(weight_VD.dtype)
        elif ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            with torch.autocast(hidden_UD.device.type, enabled=False):
                grad_weight_VD, grad_bias_V = _parameter_gradients(
                    (hidden_UD, weight_VD, bias_V, target_U),
                    (grad_logprob_U, grad_entropy_U),
                    (ctx.needs_input_grad[1], ctx.needs_input_grad[2]),
                    ctx.shape,
                )
        return grad_hidden_UD, grad_weight_VD, grad_bias_V, None, None, None


def _is_fused(hidden_UD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shape: _Shape) -> bool:
    """Whether the Triton kernel serves: plain log-probabilities in half precision on CUDA."""
    plain = bias_V is None and shape.scale == 1.0 and shape.softcap is None and not shape.entropy
    half = hidden_UD.is_cuda and hidden_UD.dtype == weight_VD.dtype and hidden_UD.dtype.itemsize == 2
    return plain and half and find_spec("triton") is not None


def _fused(
    hidden_UD: Tensor,
    weight_VD: Tensor,
    target_U: Tensor,
    shape: _Shape,
    logprob_U: Tensor,
    jacobian_UD: Tensor | None,
    slope_UV: Tensor | None,
) -> None:
    """Log-probabilities and their Jacobian rows; the slopes of all units stay in `slope_UV`, unless it is None."""
    needed = jacobian_UD is not None
    for rows, slope_RV in _slopes(hidden_UD, weight_VD, target_U, shape, logprob_U, slope_UV, needed):
        if slope_RV is not None and jacobian_UD is not None:
            torch.mm(slope_RV, weight_VD, out=jacobian_UD[rows])


def _slopes(
    hidden_UD: Tensor,
    weight_VD: Tensor,
    target_U: Tensor,
    shape: _Shape,
    logprob_U: Tensor,
    slope_UV: Tensor | None,
    needed: bool,
) -> Iterator[tuple[slice, Tensor | None]]:
    """Chunk by chunk the slopes of logits in half precision, in `slope_UV` or else in one buffer; None if not needed.

    Logits are in float32 and read twice.
    """
    from tunesmith.losses.triton_softmax import logprob_and_slope

    count, vocabulary = hidden_UD.shape[0], weight_VD.shape[0]
    size = _equal_chunks(count, shape.chunk_bytes // (vocabulary * (4 + weight_VD.itemsize)))
    logits_RV = hidden_UD.new_empty((size, vocabulary), dtype=torch.float32)
    buffer_RV = hidden_UD.new_empty((size, vocabulary)) if needed and slope_UV is None else None
    for start in range(0, count, max(1, size)):
        rows = slice(start, min(start + size, count))
        length = rows.stop - start
        torch.mm(hidden_UD[rows], weight_VD.T, out_dtype=torch.float32, out=logits_RV[:length])
        slope_RV = slope_UV[rows] if slope_UV is not None else None if buffer_RV is None else buffer_RV[:length]
        logprob_and_slope(logits_RV[:length], target_U[rows], logprob_U[rows], slope_RV)
        yield rows, slope_RV


def _fused_weight_gradient(
    hidden_UD: Tensor, weight_VD: Tensor, target_U: Tensor, grad_U: Tensor, shape: _Shape, slope_UV: Tensor | None
) -> Tensor:
    """sum_u grad_u slope_u h_u' in float32, from slopes that were kept or that are made again."""
    weighted_UD = (grad_U[:, None] * hidden_UD).to(hidden_UD.dtype)
    if slope_UV is not None:
        return torch.mm(slope_UV.T, weighted_UD, out_dtype=torch.float32)
    total_VD: Tensor | None = None
    unread_U = torch.empty_like(grad_U)
    for rows, slope_RV in _slopes(hidden_UD, weight_VD, target_U, shape, unread_U, None, needed=True):
        assert slope_RV is not None
        part_VD = torch.mm(slope_RV.T, weighted_UD[rows], out_dtype=torch.float32)
        total_VD = part_VD if total_VD is None else total_VD.add_(part_VD)
    return weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if total_VD is None else total_VD


def _equal_chunks(count: int, most: int) -> int:
    """Rows of a chunk, so that chunks of at most `most` rows are equally long."""
    pieces = -(-count // max(1, most))
    return -(-count // max(1, pieces))


def _parameter_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool],
    shape: _Shape,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, summed over recomputed chunks in the accumulating dtype."""
    hidden_UD, parameter_VD, bias_V, target_U = inputs
    (weight_VD,) = shape.cast(parameter_VD)
    grad_logprob_U, grad_entropy_U = grads
    dtype = _accumulated(hidden_UD.dtype)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[0] else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs[1] and bias_V is not None else None
    for rows, chunk in _chunks(hidden_UD, weight_VD, bias_V, target_U, shape):
        slope_RV = _softcap_slope(chunk, shape)
        d_RV: Tensor | None = None
        if grad_entropy_U is not None:
            d_RV = _entropy_slope(chunk, slope_RV).mul_(grad_entropy_U[rows, None])
        if grad_logprob_U is not None:
            part_RV = _logprob_slope(chunk, target_U[rows], slope_RV).mul_(grad_logprob_U[rows, None])
            d_RV = part_RV if d_RV is None else d_RV.add_(part_RV)
        if d_RV is None:
            break
        if shape.scale != 1.0:
            d_RV.mul_(shape.scale)
        if grad_bias_V is not None:
            grad_bias_V.add_(d_RV.sum(dim=0))
        if grad_weight_VD is not None:
            _add_outer(grad_weight_VD, d_RV, hidden_UD[rows])
    return (
        None if grad_weight_VD is None else grad_weight_VD.to(parameter_VD.dtype),
        None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
    )


def _chunks(
    hidden_UD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_U: Tensor, shape: _Shape
) -> Iterator[tuple[slice, _Chunk]]:
    """Softmax statistics of equally many rows at a time, in two buffers that every chunk uses again."""
    count, vocabulary = hidden_UD.shape[0], weight_VD.shape[0]
    if count == 0:
        return
    dtype = _accumulated(hidden_UD.dtype)
    size = _equal_chunks(count, shape.chunk_bytes // (2 * vocabulary * dtype.itemsize))
    logits_RV = hidden_UD.new_empty((size, vocabulary), dtype=dtype)
    probability_RV = torch.empty_like(logits_RV)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        length = rows.stop - start
        z_RV = _logits(hidden_UD[rows], weight_VD, bias_V, shape, logits_RV[:length])
        yield rows, _softmax(z_RV, target_U[rows], probability_RV[:length], shape.entropy)


def _logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shape: _Shape, out_RV: Tensor) -> Tensor:
    """Logits in the accumulating dtype, written to `out_RV`."""
    if weight_VD.dtype == out_RV.dtype:
        torch.mm(hidden_RD.to(out_RV.dtype), weight_VD.T, out=out_RV)
    elif weight_VD.is_cuda and hidden_RD.dtype == weight_VD.dtype:
        torch.mm(hidden_RD, weight_VD.T, out_dtype=out_RV.dtype, out=out_RV)
    else:
        wide_RD = hidden_RD.to(out_RV.dtype)
        for start in range(0, weight_VD.shape[0], WEIGHT_BLOCK):
            block_VD = weight_VD[start : start + WEIGHT_BLOCK].to(out_RV.dtype)
            torch.mm(wide_RD, block_VD.T, out=out_RV[:, start : start + WEIGHT_BLOCK])
    if bias_V is not None:
        out_RV.add_(bias_V)
    if shape.scale != 1.0:
        out_RV.mul_(shape.scale)
    if shape.softcap is not None:
        out_RV.div_(shape.softcap).tanh_().mul_(shape.softcap)
    return out_RV


def _softmax(z_RV: Tensor, target_R: Tensor, probability_RV: Tensor, entropy: bool) -> _Chunk:
    """One softmax, and from it what is wanted of each row.

    logsumexp - max is -log of the largest probability, which is at least 1/V: nothing underflows, and
    the exponentials are taken once.
    """
    maximum_R1 = z_RV.amax(dim=-1, keepdim=True)
    torch.softmax(z_RV, dim=-1, out=probability_RV)
    log_largest_R = probability_RV.amax(dim=-1).log_()
    target_z_R = z_RV.gather(-1, target_R[:, None]).sub_(maximum_R1).squeeze(-1)
    mean_R1: Tensor | None = None
    entropy_R: Tensor | None = None
    if entropy:
        z_RV.sub_(maximum_R1)
        mean_R1 = torch.bmm(probability_RV[:, None, :], z_RV[:, :, None]).squeeze(-1)
        # Rounding may leave a certain row a hair below zero.
        entropy_R = (-log_largest_R - mean_R1.squeeze(-1)).clamp_min_(0)
    return _Chunk(z_RV, probability_RV, maximum_R1, target_z_R + log_largest_R, mean_R1, entropy_R)


def _softcap_slope(chunk: _Chunk, shape: _Shape) -> Tensor | None:
    """d capped logit / d logit = 1 - tanh^2."""
    if shape.softcap is None:
        return None
    z_RV = chunk.shifted_RV + chunk.maximum_R1 if shape.entropy else chunk.shifted_RV.clone()
    return z_RV.div_(shape.softcap).square_().neg_().add_(1)


def _logprob_slope(chunk: _Chunk, target_R: Tensor, slope_RV: Tensor | None) -> Tensor:
    """d logprob / d logits = onehot - p, in the place of p."""
    d_RV = chunk.probability_RV.neg_()
    # Before any rounding to half precision: a confident token's gradient is the small rest 1 - p.
    d_RV.scatter_add_(-1, target_R[:, None], torch.ones_like(target_R, dtype=d_RV.dtype)[:, None])
    return d_RV if slope_RV is None else d_RV.mul_(slope_RV)


def _entropy_slope(chunk: _Chunk, slope_RV: Tensor | None) -> Tensor:
    """d entropy / d logits = -p (z - E z), in the place of z; call it before `_logprob_slope`."""
    assert chunk.mean_R1 is not None
    d_RV = chunk.shifted_RV.sub_(chunk.mean_R1).mul_(chunk.probability_RV).neg_()
    return d_RV if slope_RV is None else d_RV.mul_(slope_RV)


def _times_weight(d_RV: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """d W, accumulated wide, then in the dtype of the hidden states."""
    if weight_VD.dtype == d_RV.dtype:
        return torch.mm(d_RV, weight_VD).to(dtype)
    if weight_VD.is_cuda:
        return torch.mm(d_RV.to(weight_VD.dtype), weight_VD, out_dtype=d_RV.dtype).to(dtype)
    total_RD = d_RV.new_zeros((d_RV.shape[0], weight_VD.shape[1]))
    for start in range(0, weight_VD.shape[0], WEIGHT_BLOCK):
        block_VD = weight_VD[start : start + WEIGHT_BLOCK].to(d_RV.dtype)
        total_RD.addmm_(d_RV[:, start : start + WEIGHT_BLOCK], block_VD)
    return total_RD.to(dtype)


def _add_outer(total_VD: Tensor, d_RV: Tensor, hidden_RD: Tensor) -> None:
    """total += d' h, in total's dtype."""
    if hidden_RD.is_cuda and hidden_RD.dtype != total_VD.dtype:
        total_VD.add_(torch.mm(d_RV.to(hidden_RD.dtype).T, hidden_RD, out_dtype=total_VD.dtype))
    else:
        total_VD.addmm_(d_RV.T, hidden_RD.to(total_VD.dtype))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
