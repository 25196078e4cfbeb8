"""What another model said of the units of every example, on disk: computed once, read by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data import aside

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.types import Batch


class Kept:
    """Tokens [U, K] and their log-probabilities [U, K], unit after unit and example after example."""

    def __init__(self, path: Path) -> None:
        width = int(aside.read_meta(path)["width"])
        self._bounds: NDArray[np.int64] = aside.mapped(path / "bounds", "<i8")
        self._token_UK: NDArray[np.int32] = aside.mapped(path / "tokens", "<i4").reshape(-1, width)
        self._logprob_UK: NDArray[np.float32] = aside.mapped(path / "logprobs", "<f4").reshape(-1, width)

    @classmethod
    def made(cls, path: Path, make: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Kept:
        """What stands at `path`, or what `make` gives: for each example its units' tokens and log-probabilities."""

        def build(build: aside.Build) -> dict[str, Any]:
            bounds, width = [0], 1
            tokens, logprobs = build.file("tokens"), build.file("logprobs")
            for token_UK, logprob_UK in make():
                bounds.append(bounds[-1] + len(token_UK))
                width = token_UK.shape[-1]
                tokens.array(token_UK.numpy().astype("<i4"))
                logprobs.array(logprob_UK.numpy().astype("<f4"))
            build.file("bounds").array(np.asarray(bounds, "<i8"))
            return {"width": width}

        aside.open_or_build(path, build)
        return cls(path)

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both tables at the units of a batch, in their order."""
        chosen = np.concatenate([np.arange(*self._bounds[number : number + 2]) for number in batch.examples])
        return torch.from_numpy(self._token_UK[chosen]).long(), torch.from_numpy(self._logprob_UK[chosen])
