"""Options of objectives whose head reads one vector a text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.recipe import Positive, Strict


class PooledOptions(Strict):
    """How hidden states become one vector, and what the head makes of it."""

    pooling: Literal["mean", "first", "last"] | None = Field(
        None, description="mean over the tokens, the first (CLS) or the last one; the base's own by default"
    )
    hidden: Positive | None = Field(None, description="width of a hidden layer in the head; a linear head without")
