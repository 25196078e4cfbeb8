"""What every contestant trains on: a model shape with random weights, and rows of token ids drawn by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
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
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
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
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}


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


def build(shape: dict[str, Any], dtype: torch.dtype, **options: Any) -> Any:
    """A model of this shape on the device, with random weights drawn by seed."""
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**{"model_type": "llama", **shape})
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def flop(shape: dict[str, Any], lengths_of_step: list[int], method: str = "lora") -> float:
    """Floating-point operations of a step without waste: 4 N a token by LoRA and 6 N in full, and 3.5 times causal
    attention forward.
    """
    width, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    head = shape.get("head_dim", width // heads)
    queries, keys = head * heads, head * shape["num_key_value_heads"]
    linear = layers * (2 * width * queries + 2 * width * keys + 3 * width * shape["intermediate_size"])
    linear += width * shape["vocab_size"]
    attention = sum(2 * length * length * queries * layers for length in lengths_of_step)
    return {"lora": 4.0, "full": 6.0}[method] * linear * sum(lengths_of_step) + 3.5 * attention
