"""Validation while training: the objective's own loss over held-out rows, without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, Examples, batches
from tunesmith.models.policy import Policy
from tunesmith.protocols import Annotator, Coupled, Objective
from tunesmith.types import Step, Terms

GROUP = 1024  # examples that a coupled loss is taken over: as many whatever runs through the model at once


def losses(
    policy: Policy,
    objective: Objective,
    examples: Examples,
    tokens: int,
    columns: Mapping[str, NDArray[np.generic]] | None = None,
) -> dict[str, float]:
    """`loss`, the sum of the objective's parts, each a weighted mean over all units, and its metrics.

    A loss that couples examples is taken over GROUP of them at a time, in their order.
    """
    sums: dict[str, tuple[float, float]] = {}
    metrics: dict[str, tuple[float, float]] = {}
    training = policy.training
    policy.eval()
    with torch.no_grad():
        for terms in _terms(policy, objective, examples, tokens, columns):
            for name, part in terms.parts.items():
                weighted = float((part.loss_U * part.weight_U).double().sum()), float(part.weight_U.double().sum())
                sums[name] = _plus(sums.get(name), weighted)
            for name, pair in terms.metrics.items():
                metrics[name] = _plus(metrics.get(name), pair)
    policy.train(training)
    found = {name: value / weight for name, (value, weight) in metrics.items() if weight}
    return {"loss": sum(value / weight for value, weight in sums.values() if weight), **found}


def _terms(
    policy: Policy,
    objective: Objective,
    examples: Examples,
    tokens: int,
    columns: Mapping[str, NDArray[np.generic]] | None,
) -> Iterator[Terms]:
    lay_out = partial(batches, tokens=tokens, packed=policy.packed, pad_id=policy.tokens.pad)
    if not isinstance(objective, Coupled):
        for batch in lay_out(examples, columns=columns):
            seen = objective.annotate(policy, batch) if isinstance(objective, Annotator) else batch
            yield objective.terms(policy, place(seen, policy.device))
        return
    for start in range(0, len(examples.lengths), GROUP):
        group = range(start, min(start + GROUP, len(examples.lengths)))
        made = lay_out(ExampleList([examples.example(i) for i in group]))
        step = Step(0, [place(batch, policy.device) for batch in made], {})
        yield objective.couple(torch.cat([objective.embed(policy, batch) for batch in step.batches]), step)


def _plus(a: tuple[float, float] | None, b: tuple[float, float]) -> tuple[float, float]:
    return b if a is None else (a[0] + b[0], a[1] + b[1])
