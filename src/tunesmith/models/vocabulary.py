"""Tokens added to a model: whole words of the tokenizer, and rows of the embeddings and of the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.compat import quiet_transformers


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Their ids; a token that the vocabulary has already keeps its own."""
    from tokenizers import AddedToken

    # Not flagged as special: a special token that a message spells is taken apart, and would never be trained.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def widen(model: Any, size: int) -> None:
    """Gives the model a row for each id below `size`; new rows are the mean of the others, tied ones stay tied."""
    before = model.get_input_embeddings().weight.shape[0]
    if size <= before:
        return
    with quiet_transformers(), torch.no_grad():
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for part in () if module is None else module.parameters():
                part[before:] = part[:before].float().mean(0).to(part.dtype)
