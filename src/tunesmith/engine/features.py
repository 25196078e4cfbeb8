"""Vectors of a frozen backbone, made once per example and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith import rundir
from tunesmith.data.pack import place
from tunesmith.data.source import Examples, batches
from tunesmith.models.heads import joined
from tunesmith.models.policy import Policy
from tunesmith.types import Want


def pooled(
    policy: Policy, examples: Examples, tokens: int, report: Callable[[int, int], None] | None = None
) -> NDArray[np.float32]:
    """One pooled vector for each example, in their order: [N, D]; of several segments the mean of theirs."""
    found_ND = np.empty((len(examples.lengths), policy.width), dtype=np.float32)
    done = 0
    policy.eval()
    with torch.no_grad():
        for batch in batches(examples, tokens, packed=policy.packed, pad_id=policy.tokens.pad):
            vectors = policy.score(place(batch, policy.device), Want(pooled=True)).pooled_SD
            assert vectors is not None
            found_ND[batch.examples] = joined(vectors, batch.segments).float().cpu().numpy()
            done += len(batch.examples)
            if report is not None:
                report(done, len(found_ND))
    return found_ND


def cached(path: Path, make: Callable[[], NDArray[np.float32]], rows: int, width: int) -> NDArray[np.float32]:
    """The array that `path` holds, made and written there if it does not fit."""
    if path.is_file() and path.stat().st_size == rows * width * 4:
        return np.fromfile(path, dtype=np.float32).reshape(rows, width)
    made_ND = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_file(path, made_ND.tobytes(), shared=True)
    return made_ND
