"""Answers that are programs: run with their rows' tests in a sandbox, and how often one of k of them passes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from math import comb
from typing import ClassVar

from tunesmith import sandbox
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient
from tunesmith.recipe_evaluation import Code
from tunesmith.types import AnswerKind, Prediction, Row

SAMPLES, PASSED = "samples", "passed"  # scores of a prediction
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k answers passes, from n of which c do; k at most n.

    Chen et al. 2021 (arXiv 2107.03374), equation 1: unbiased, which 1 - (1 - c / n)^k is not.
    """
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


class PassAtK:
    """Mean over rows of the chance that one of k answers to a row passes its tests, from all that were drawn.

    Any k: `pass_at_1`, `pass_at_10`. `evaluate.code` names the tests and how many answers are drawn. Chen's unbiased
    estimate; of one answer a row, the share that passes. Programs run in a sandbox, without network.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str]
    k: ClassVar[int]
    about: ClassVar[About] = About(
        "Chen et al. 2021, arXiv 2107.03374, equation 1",
        "own",
        "programs: whether they do what tests ask, where texts of the same program differ",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @classmethod
    def applies(cls, predictions: Sequence[Prediction]) -> bool:
        return all(p.scores.get(SAMPLES, 0.0) >= cls.k for p in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        if SAMPLES not in prediction.scores:
            raise InputError(
                f"{self.name} needs tests, and the answer to {prediction.where} was run with none",
                "name the column that holds them: evaluate: {code: {tests: COLUMN}}",
            )
        samples, passed = int(prediction.scores[SAMPLES]), int(prediction.scores[PASSED])
        if samples < self.k:
            raise InputError(
                f"{self.name} needs {self.k} answers to each row, and {prediction.where} has {samples}",
                f"set evaluate.code.samples to {self.k} or more",
            )
        return (pass_at_k(samples, passed, self.k), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register_numbered("pass_at_")
@cache
def pass_at(k: int) -> type[PassAtK]:
    """The metric of one k."""
    own = {"name": f"pass_at_{k}", "k": k, "about": PassAtK.about, "__doc__": PassAtK.__doc__, "__module__": __name__}
    return type(f"PassAt{k}", (PassAtK,), own)


METRICS.register("pass_at_1")(pass_at(1))


def judged(
    predictions: Sequence[Prediction], drawn: Sequence[Sequence[str]], rows: Sequence[Row], code: Code
) -> list[Prediction]:
    """The predictions with how many answers were `drawn` for each row, and how many of them pass the row's tests.

    Raises RefusedError where the sandbox cannot be had.
    """
    programs = [program(answer, row, code) for answers, row in zip(drawn, rows, strict=True) for answer in answers]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        outcomes = iter([outcome.passed for outcome in pool.map(sandbox.run, programs)])
    return [
        replace(p, scores={**p.scores, SAMPLES: float(len(of)), PASSED: float(sum(next(outcomes) for _ in of))})
        for p, of in zip(predictions, drawn, strict=True)
    ]


def program(answer: str, row: Row, code: Code) -> str:
    """The row's code, the answer and its tests in one; of an answer that has fenced code, the first such."""
    fenced = FENCED.search(answer)
    parts = [row.tags[code.before]] if code.before else []
    parts += [fenced[1] if fenced else answer, "\n\n", row.tags[code.tests]]
    parts += [f"\n\ncheck({row.tags[code.entry_point]})"] if code.entry_point else []
    return "".join(parts)
