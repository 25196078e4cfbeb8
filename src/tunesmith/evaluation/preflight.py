"""Whether the metrics that a recipe names can be measured on its rows: told before training, not after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith import sandbox
from tunesmith.errors import InputError
from tunesmith.evaluation.code_metrics import PASSED, SAMPLES
from tunesmith.evaluation.metrics import Scoring, applicable, build, statistics
from tunesmith.recipe import Code
from tunesmith.types import Prediction, Row

SEEN = 100  # rows by which a metric that nobody asked for is judged


def check_metrics(
    asked: Sequence[str],
    usual: Sequence[str],
    data: str,
    rows: Sequence[Row],
    unread: Sequence[Prediction] | None,
    code: Code | None = None,
) -> list[str]:
    """The metrics that will be measured: those `asked` for, else the `usual` ones that the rows can have.

    Measures them on answers such as a model will give: `unread`, or an empty text. Raises InputError
    for an unknown metric, for one that such answers or references cannot have, and where some rows of the set
    called `data` have an answer to compare with and others have none; with `code`, where a row asks for no answer, and
    RefusedError where programs cannot be contained.
    """
    answers = unread or [_unanswered(row) for row in rows]
    if code is not None:
        _check_programs(rows)
        answers = [replace(a, scores={**a.scores, SAMPLES: float(code.samples), PASSED: 0.0}) for a in answers]
    lacking = [answer.where for answer in answers if answer.reference is None]
    if 0 < len(lacking) < len(answers):
        raise InputError(
            f"{len(lacking)} of {len(answers)} rows of {data} have no answer to compare with, such as {lacking[0]}",
            "end these rows with the answer that is expected, or take them out",
        )
    names = list(asked) or applicable(usual, answers)
    tried = answers if asked else answers[:SEEN]
    for metric in build(names, answers):
        if isinstance(metric, Scoring):
            metric.prepare(tried)
        else:
            statistics(metric, tried)
    return names


def _check_programs(rows: Sequence[Row]) -> None:
    silent = next((row.where for row in rows if "messages" not in row.value), None)
    if silent is not None:
        raise InputError(
            f"evaluate.code runs answers that a model writes, and {silent} asks for none",
            "leave evaluate.code out, or give rows with a prompt and choose the objective sft",
        )
    sandbox.check()


def _unanswered(row: Row) -> Prediction:
    last = row.value["messages"][-1] if "messages" in row.value else {}
    reference = str(last["content"]) if last.get("role") == "assistant" else None
    own = {"bytes": float(len(row.value["text"].encode()))} if "text" in row.value else {}
    if {"positives", "positive_ids"} & row.value.keys():
        own, reference = {"rank": 1.0, "recall_at_10": 1.0, "ndcg_at_10": 1.0}, ""
    return Prediction("", reference, row.where, {"nll": 1.0, "tokens": 1.0, **own})
