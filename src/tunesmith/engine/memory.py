"""Predicted peak memory and time of a step, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from tunesmith.kernels import nf4

GIB = 2**30
NF4_SCRATCH = 12  # bytes a weight of the layer that is made anew: codes as integers, fp32, fp32 scaled, bf16
ADAM_BYTES = 16  # of one trainable parameter: fp32 weight, gradient and two moments
ADAM_8BIT_BYTES = {"fp32": 10, "bf16": 6}  # likewise, by what the weight is in, with moments in 8 bits
SNAPSHOT = 0.75  # of these is in a checkpoint that is being written: all but the gradient, with 8 bits a little less
# Bytes of a product that oneDNN has made for one shape, in bf16 on a CPU with AVX-512, whatever its widths; it holds so
# many at most, of which a step of new lengths makes so many.
PRIMITIVE, PRIMITIVES, OF_A_STEP = 580_000, 1024, 10
LOGIT_CHUNK = {"cpu": 3 * 64 * 2**20, "mps": 3 * 2**30, "cuda": 3 * 2**30}  # what the loss holds at once


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and time depend on. Widths are per token and layer."""

    parameters: int
    embedding_parameters: int
    trainable: int
    trainable_bytes: int  # of one that trains, with its gradient and moments
    layers: int
    width: int
    intermediate: int
    vocabulary: int
    weight_bytes: int  # of one frozen parameter
    in_nf4: int = 0  # frozen parameters that are held in 4 bits

    @property
    def linear(self) -> int:
        """Parameters of matrix products."""
        return self.parameters - self.embedding_parameters

    @property
    def trains_all(self) -> bool:
        return self.trainable >= self.linear


def activation_bytes(shape: Shape, bytes_each: int, recompute: bool) -> int:
    """Bytes kept for the backward for each token.

    A decoder or encoder layer keeps about its two norms' inputs and outputs, q, k, v, the attention
    output and the residuals (11 widths), and gate, up, their product and its input (5 intermediate
    widths). Recomputation keeps one width a layer and one layer's activations. A trained output projection in half
    precision keeps the slopes of a token's logits.
    """
    layer = 11 * shape.width + 5 * shape.intermediate
    kept = shape.width * shape.layers + layer if recompute else layer * shape.layers
    slopes = shape.vocabulary if bytes_each == 2 and shape.trains_all else 0
    return bytes_each * (kept + 8 * shape.width + slopes)


def static_bytes(shape: Shape, device: torch.device) -> int:
    """Weights, optimizer, and the loss's scratch: what does not grow with the batch.

    A snapshot of what trains is in the host's memory, so it counts where the model is there too.
    """
    frozen = shape.parameters - shape.trainable
    spared = int(shape.in_nf4 * (shape.weight_bytes - nf4.BYTES))
    anew = NF4_SCRATCH * shape.width * shape.intermediate if shape.in_nf4 else 0
    trained = shape.trainable * shape.trainable_bytes
    trained += 0 if device.type == "cuda" else int(SNAPSHOT * trained)
    return frozen * shape.weight_bytes - spared + anew + trained + LOGIT_CHUNK[device.type]


def primitive_bytes(device: torch.device, precision: str, steps: int) -> int:
    """What a run comes to hold of products that are made for one shape each: up to 0.6 GB, within a hundred steps."""
    if device.type != "cpu" or precision == "fp32":
        return 0
    return PRIMITIVE * min(PRIMITIVES, OF_A_STEP * steps)


def process_bytes(device: torch.device) -> int:
    """What this process holds before the model is there: on a CPU the libraries count too."""
    return 0 if device.type == "cuda" else psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on the device, within the share of it that torch was told to keep to."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device.index or torch.cuda.current_device())
        return min(free, int(share * total) - torch.cuda.memory_reserved(device))
    return psutil.virtual_memory().available


def flop_per_token(shape: Shape, trained_share: float, frozen_backbone: bool, recompute: bool) -> float:
    """2N forward, 2N for the gradient of activations, 2 per trainable for its own; the head where there is loss."""
    linear, full = shape.linear, shape.trains_all
    if frozen_backbone:
        return 2.0 * linear
    passes = 2 + 2 + (2 if recompute else 0) + (2 if full else 0)
    return (
        passes * linear + 6.0 * (0 if full else shape.trainable) + 4.0 * trained_share * shape.vocabulary * shape.width
    )
