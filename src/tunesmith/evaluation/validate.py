"""Validation while training: the objective's own loss over held-out rows, without gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.pack import place
from tunesmith.data.source import Examples, batches
from tunesmith.models.policy import Policy
from tunesmith.protocols import Objective


def losses(
    policy: Policy,
    objective: Objective,
    examples: Examples,
    tokens: int,
    columns: Mapping[str, NDArray[np.generic]] | None = None,
) -> dict[str, float]:
    """`loss`, the sum of the objective's parts, each a weighted mean over all units, and its metrics."""
    sums: dict[str, tuple[float, float]] = {}
    metrics: dict[str, tuple[float, float]] = {}
    training = policy.training
    policy.eval()
    with torch.no_grad():
        for batch in batches(examples, tokens, packed=policy.packed, pad_id=policy.tokens.pad, columns=columns):
            terms = objective.terms(policy, place(batch, policy.device))
            for name, part in terms.parts.items():
                weighted = float((part.loss_U * part.weight_U).double().sum()), float(part.weight_U.double().sum())
                sums[name] = _plus(sums.get(name), weighted)
            for name, pair in terms.metrics.items():
                metrics[name] = _plus(metrics.get(name), pair)
    policy.train(training)
    found = {name: value / weight for name, (value, weight) in metrics.items() if weight}
    return {"loss": sum(value / weight for value, weight in sums.values() if weight), **found}


def _plus(a: tuple[float, float] | None, b: tuple[float, float]) -> tuple[float, float]:
    return b if a is None else (a[0] + b[0], a[1] + b[1])
