"""What a renderer makes of a text, and of words: tokens, what of them is learned, what did not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Tokens with their weights (0 for what is not learned), and how many tokens, and trained tokens, truncation took.

    `typed_from`: as in `Piece`.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    cut: int = 0
    cut_trained: int = 0
    typed_from: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Tokens of words that follow each other. `first`: of each word by its index, the position of its first token."""

    input_ids: NDArray[np.int32]
    first: Mapping[int, int]
