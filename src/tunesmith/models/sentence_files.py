"""The files by which sentence-transformers reads a folder of transformers: how a text becomes one vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith import rundir
from tunesmith.models.policy import Policy

_MODULES = "sentence_transformers.models"
_POOLINGS = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}


def write(folder: Path, policy: Policy, sequence_length: int | None, prompts: Mapping[str, str]) -> None:
    """For a whole model in `folder`: pooled vectors of length 1. `prompts`: what stands before texts, by a name."""
    steps = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_MODULES}.{name}"}
        for number, (name, path) in enumerate(steps)
    ]
    pooled = {f"pooling_mode_{name}": pooling == policy.pooling for pooling, name in _POOLINGS.items()}
    (folder / "1_Pooling").mkdir()
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": sequence_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": dict(prompts), "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {"word_embedding_dimension": policy.width, **pooled},
    }
    for name, content in files.items():
        rundir.write_json(folder / name, content)
