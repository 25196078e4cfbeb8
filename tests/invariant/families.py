"""Tiny random models of several families, and examples of real-looking lengths, for equivalence tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tunesmith import demo
from tunesmith.models.policy import Policy, Tokens
from tunesmith.types import Example, Piece

VOCABULARY = 97  # of random tokens
REAL_VOCABULARY = 262  # of bytes and the special tokens


def _configs(vocabulary: int) -> dict[str, Any]:
    from transformers import BertConfig, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

    size = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    grouped = {**size, "num_key_value_heads": 2, "head_dim": 8}
    return {
        "llama": LlamaConfig(**grouped),
        "qwen3": Qwen3Config(**grouped),
        "mistral": MistralConfig(**grouped, sliding_window=6),
        "gemma3": Gemma3TextConfig(
            **grouped, sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
        "bert": BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    }


FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "bert"]


def policy_of(family: str, *, packed: bool = True, vocabulary: int = VOCABULARY) -> Policy:
    """A policy over a random model; the same weights at every call."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(5)
    config = _configs(vocabulary)[family]
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    kind = "encoder" if family == "bert" else "decoder"
    return Policy(auto.from_config(config), kind, Tokens((1,), 0), packed=packed)


def examples_of(count: int, seed: int = 3) -> list[Example]:
    """Examples of 3 to 30 tokens; about half of each is trained, with weights that differ."""
    draw = np.random.default_rng(seed)
    made: list[Example] = []
    for index in range(count):
        length = int(draw.integers(3, 31))
        weights = np.where(np.arange(length) >= length // 2, draw.uniform(0.5, 2.0, length), 0.0).astype(np.float32)
        ids = draw.integers(2, VOCABULARY, length).astype(np.int32)
        made.append(Example((Piece(ids, weights),), {"label": index % 3}))
    return made


def examples_of_text(count: int) -> list[Example]:
    """The demo's hand-written conversations as bytes, of 100 to 300 tokens each; the answer is trained."""
    rows = demo.rows(quick=False)["test"][:count]
    made: list[Example] = []
    for index, row in enumerate(rows):
        *asked, answer = ("".join((turn["content"], "\n")).encode() for turn in row["messages"])
        ids = np.frombuffer(b"".join([*asked, answer]), np.uint8).astype(np.int32) + 2
        weights = (np.arange(len(ids)) >= len(ids) - len(answer)).astype(np.float32)
        made.append(Example((Piece(ids, weights),), {"label": index % 3}))
    return made
