"""What every contestant trains on: a model shape with random weights, and rows of token ids drawn by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "tie_word_embeddings": False,
    },
}
PEAK = 790e12  # measured bf16 matrix-product rate of an H100 on random data, FLOP/s
SEED = 17
RANK = 16
LEARNING_RATE = 2e-4


def lengths(kind: str, tokens: int, steps: int, file: Path | None) -> list[list[int]]:
    """Lengths of the examples of each step, together `tokens` at most.

    "4096" (any number): examples of that length. "mixture": lengths of real examples, from the file that
    `lengths.py` made, in an order drawn by seed.
    """
    if kind != "mixture":
        return [[int(kind)] * (tokens // int(kind)) for _ in range(steps)]
    assert file is not None, "a mixture needs --lengths FILE, made by lengths.py"
    drawn = np.random.default_rng(SEED).permutation(json.loads(file.read_text(encoding="utf-8"))["lengths"])
    found: list[list[int]] = [[]]
    for length in np.resize(drawn, 1_000_000).tolist():
        if sum(found[-1]) + length > tokens:
            if len(found) == steps:
                break
            found.append([])
        found[-1].append(length)
    return found


def examples(lengths_of_step: list[int], vocabulary: int, step: int) -> list[NDArray[np.int32]]:
    """Token ids whose frequencies fall as 1 / rank, so that there is something to learn."""
    generator = np.random.default_rng([SEED, step])
    ranks = np.exp(generator.random(sum(lengths_of_step)) * np.log(vocabulary)) - 1
    ids = np.minimum(ranks, vocabulary - 1).astype(np.int32)
    return np.split(ids, np.cumsum(lengths_of_step)[:-1])


def flop(shape: dict[str, Any], lengths_of_step: list[int]) -> float:
    """Floating-point operations of a LoRA step without waste: 4 N a token, and 3.5 times causal attention forward."""
    width, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    keys = width // heads * shape["num_key_value_heads"]
    linear = layers * (2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"])
    linear += width * shape["vocab_size"]
    attention = sum(2 * length * length * width * layers for length in lengths_of_step)
    return 4.0 * linear * sum(lengths_of_step) + 3.5 * attention
