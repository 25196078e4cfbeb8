"""Whether the metrics that a recipe names can be measured on its rows: told before training, not after."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith import sandbox
from tunesmith.data.rows import labels_of
from tunesmith.data.store import some_rows
from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS, scaling
from tunesmith.evaluation.baselines import label_counts, unread
from tunesmith.evaluation.calibrated import parts
from tunesmith.evaluation.code_metrics import PASSED, SAMPLES, PassAtK, program
from tunesmith.evaluation.conformal import OF_SETS, least_rows
from tunesmith.evaluation.groups import parted
from tunesmith.evaluation.likelihood_metrics import Loss
from tunesmith.evaluation.metrics import Scoring, applicable, build, check_fit, statistics
from tunesmith.models.drawing import Setting, settings
from tunesmith.types import Prediction, Row

if TYPE_CHECKING:
    from tunesmith.data.prepare import Prepared
    from tunesmith.data.store import TokenStore
    from tunesmith.declared import ObjectiveNeeds
    from tunesmith.protocols import Objective
    from tunesmith.recipe import Recipe
    from tunesmith.recipe_evaluation import Code, Evaluate

_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # of a text that is no Python
SEEN = 100  # rows by which a metric that nobody asked for is judged


def measured(recipe: Recipe, objective: Objective, prepared: Prepared) -> list[str]:
    """The metrics that the rows will be measured by; refuses what could not be measured once the model is trained."""
    usual, counts = objective.needs.metrics, label_counts(prepared.audit.to_json()["train"])
    stopping, held = recipe.train.early_stopping, prepared.validation
    judges = len(prepared.tests) + recipe.data.judged_by_folds
    chosen_on = [] if held is None else _rows(held)
    check_calibration(recipe.evaluate, objective.describe(), chosen_on, judges, recipe.seed)
    check_decoding(recipe.evaluate, objective.needs, chosen_on, judges)
    if held is not None and stopping is not None and stopping.metric not in (None, "loss"):
        _check_stopping(stopping.metric)
        rows = _rows(held)
        code = recipe.evaluate.code
        check_metrics([stopping.metric], usual, "validation", rows, unread(objective, rows, counts), code)
    sets = prepared.tests or ({"validation": held} if held is not None else {})
    asked, sets_too = recipe.evaluate.metrics or [], recipe.evaluate.conformal is not None
    asked = list(dict.fromkeys([*asked, *OF_SETS])) if asked and sets_too else asked
    found: dict[str, None] = {}
    of_sets = {name: _rows(store) for name, store in sets.items()}
    if recipe.data.fold is None:
        check_groups(recipe.evaluate, [some_rows(store, recipe.evaluate.limit, recipe.seed) for store in sets.values()])
    for name, rows in of_sets.items():
        tried = check_metrics(asked, usual, name, rows, unread(objective, rows, counts), recipe.evaluate.code, sets_too)
        found |= dict.fromkeys(tried)
    _check_code_is_read(recipe, found)
    return list(found)


def _check_stopping(metric: str | None) -> None:
    if metric in OF_SETS:
        raise InputError(
            f"train.early_stopping.metric is {metric}, and sets of labels are made when training has ended",
            "choose another, such as loss",
        )


def _check_code_is_read(recipe: Recipe, metrics: Iterable[str]) -> None:
    """Programs are run for a metric that says how many pass; without one each would be run for nothing."""
    choosing = [asked.metric for asked in (recipe.train.early_stopping, recipe.evaluate.decoding) if asked]
    named = [*metrics, *filter(None, choosing)]
    if recipe.evaluate.code and not any(isinstance(METRICS.get(name)([]), PassAtK) for name in named):
        raise InputError(
            f"evaluate.code runs answers as programs, and no metric counts those that pass: {', '.join(named)}",
            "add pass_at_1 to evaluate.metrics, or leave evaluate.code out",
        )


def check_metrics(
    asked: Sequence[str],
    usual: Sequence[str],
    data: str,
    rows: Sequence[Row],
    unread: Sequence[Prediction] | None,
    code: Code | None = None,
    sets: bool = False,
) -> list[str]:
    """The metrics that will be measured: those `asked` for, else the `usual` ones that the rows can have.

    Measures them on answers such as a model will give: `unread`, or an empty text; with `sets` of labels. InputError
    for an unknown metric, for one that is not of such answers, for one that they or their references cannot have, and
    where some rows of the set called `data` have an answer to compare with and others have none; with `code`, where a
    row asks for no answer, and RefusedError where programs cannot be contained.
    """
    answers = unread or [_unanswered(row) for row in rows]
    if code is not None:
        _check_programs(rows, code)
        answers = [replace(a, scores={**a.scores, SAMPLES: float(code.samples), PASSED: 0.0}) for a in answers]
    lacking = [answer.where for answer in answers if answer.reference is None]
    if 0 < len(lacking) < len(answers):
        raise InputError(
            f"{len(lacking)} of {len(answers)} rows of {data} have no answer to compare with, such as {lacking[0]}",
            "end these rows with the answer that is expected, or take them out",
        )
    answers = [replace(answer, label_set=()) for answer in answers] if sets else answers
    check_fit(asked, answers)
    names = list(asked) or applicable((*usual, *OF_SETS), answers)
    tried = answers if asked else answers[:SEEN]
    for metric in build(names, answers):
        if isinstance(metric, Scoring):
            metric.prepare(tried)
        elif not np.isfinite(statistics(metric, tried)).all():
            raise InputError(
                f"{metric.name} has no finite number for a row of {data} that is not answered yet",
                "mend the metric, or leave it out",
            )
    return names


def _check_programs(rows: Sequence[Row], code: Code) -> None:
    silent = next((row.where for row in rows if "messages" not in row.value), None)
    if silent is not None:
        raise InputError(
            f"evaluate.code runs answers that a model writes, and {silent} asks for none",
            "leave evaluate.code out, or give rows with a prompt and choose the objective sft",
        )
    untested = [row.where for row in rows if _does_nothing(row.tags[code.tests])]
    if untested:
        raise InputError(
            f"{len(untested)} of {len(rows)} rows have no tests ({code.tests!r}), so that any answer passes, such as "
            f"{untested[0]}",
            "give these rows programs that fail where an answer is wrong, as by `assert`, or take them out",
        )
    broken = [where for row in rows if (where := _broken(row, code)) is not None]
    if broken:
        raise InputError(
            f"{len(broken)} of {len(rows)} rows have tests ({code.tests!r}) that are no Python behind the answer that "
            f"is expected, such as {broken[0]}",
            "mend them, or take these rows out: any answer would fail",
        )
    sandbox.check()


def _broken(row: Row, code: Code) -> str | None:
    """Where the row's tests make no program of its own answer, and what is wrong; None of a row without one."""
    last = row.value["messages"][-1]
    if last.get("role") != "assistant":
        return None
    try:
        ast.parse(program(str(last["content"]), replace(row, tags={**row.tags, code.tests: ""}), code))
    except _UNREADABLE:
        return None  # the answer is none by itself, which says nothing of the tests
    try:
        ast.parse(program(str(last["content"]), row, code))
    except _UNREADABLE as error:
        return f"{row.where} ({error})"
    return None


def _does_nothing(program: str) -> bool:
    """Whether it is empty, or numbers and texts alone; what is no program may go on from what stands before."""
    try:
        steps = ast.parse(program).body
    except _UNREADABLE:
        return False
    return all(isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) for step in steps)


def check_calibration(
    evaluate: Evaluate, learned: Mapping[str, Any], validation: Sequence[Row], tests: int, seed: int
) -> None:
    """InputError where the recipe asks for truer probabilities or sets of labels and the run can have none.

    `learned`: what the objective did of the training rows; `tests`: how many sets, or other judges; `seed`: by which
    validation rows are parted.
    """
    asked = [name for name in ("calibrate", "conformal") if getattr(evaluate, name) is not None]
    if not asked:
        return
    key = f"evaluate.{asked[0]}"
    if "labels" not in learned or learned.get("multi_label"):
        raise InputError(
            f"{key} is of the probabilities of labels of which each row has one, and this objective learns no such",
            "leave it out, or choose an objective such as classify with rows of one `label`",
        )
    if not validation or not tests:
        raise InputError(
            f"{key} is fitted to the validation rows and judged on others, and there are no "
            f"{'validation rows' if not validation else 'test rows'}",
            f"set {' and '.join(_left_out(validation, tests))}",
        )
    sets = evaluate.conformal
    scaled, left = parts(len(validation), evaluate.calibrate is not None, sets is not None, seed)
    if sets is not None and len(left) < least_rows(sets.coverage):
        raise InputError(
            f"evaluate.conformal is {sets.coverage:g}, which takes {least_rows(sets.coverage):,} validation "
            f"rows{' that no scaling is fitted to' * (len(asked) == 2)}, and there are {len(left):,}",
            "give more validation rows, or ask for less",
        )
    if evaluate.calibrate is not None:
        scaling.check(
            evaluate.calibrate, [label for i in scaled for label in labels_of(validation[i].value)], learned["labels"]
        )


def _left_out(validation: Sequence[Row], tests: int) -> list[str]:
    """The keys of the rows that there are none of."""
    return ["data.validation"] * (not validation) + ["data.test"] * (not tests)


def check_groups(evaluate: Evaluate, sets: Sequence[Sequence[Row]]) -> None:
    """InputError where the values of a column that the recipe asks for make no groups in any of the sets of rows."""
    least = evaluate.least_of_group
    for column in evaluate.by if sets else []:
        if all([row.tags[column]] == labels_of(row.value) for rows in sets for row in rows):
            raise InputError(
                f"evaluate.by is {column!r}, which is each row's label",
                "leave it out: precision and recall of each label are in the report as it is",
            )
        of_sets = [parted([row.tags[column] for row in rows], column, least) for rows in sets]
        if any(of.judged and len(of.judged) + len(of.small) > 1 for of in of_sets):
            continue
        one = next((value for of in of_sets for value in of.judged), None)
        largest = max(count for of in of_sets for count in (of.small or {"": 0}).values())
        raise InputError(
            f"evaluate.by is {column!r}, "
            + (
                f"of which no value has {least} rows or more to measure; the most frequent has {largest}"
                if one is None
                else f"and all rows to measure have {one!r} there"
            ),
            "name another column, or leave it out" + ", or set evaluate.smallest_group" * (one is None),
        )


def check_decoding(evaluate: Evaluate, needs: ObjectiveNeeds, validation: Sequence[Row], tests: int) -> None:
    """InputError where the recipe asks for a way to draw answers, and none can be told from another.

    `tests`: how many sets of test rows there are, or other judges.
    """
    asked = evaluate.decoding
    if asked is None:
        return
    if not (needs.writes and "messages" in needs.formats):
        raise InputError(
            "evaluate.decoding is of answers that a model writes, and this objective's are none",
            "leave it out, or choose an objective such as sft with rows of a prompt and a completion",
        )
    if not validation or not tests:
        raise InputError(
            "evaluate.decoding is chosen on the validation rows and judged on others, and there are no "
            f"{'test' if validation else 'validation'} rows",
            f"set {' and '.join(_left_out(validation, tests))}",
        )
    if settings(asked) == [Setting()]:
        raise InputError(
            "evaluate.decoding tries temperature 0 alone, which is how answers are drawn anyway",
            "leave it out, or name other temperatures beside it: temperature: [0, 0.5, 1]",
        )
    if isinstance(METRICS.get(asked.metric)([]), Loss):
        raise InputError(
            f"evaluate.decoding.metric is {asked.metric}, which is of the references and not of what the model writes",
            "choose a metric of answers, such as rouge_l",
        )
    silent = next((row.where for row in validation if "messages" not in row.value), None)
    if silent is not None:
        raise InputError(
            f"evaluate.decoding is of answers, and {silent} asks for none",
            "leave it out, or give validation rows with a prompt and a completion",
        )
    check_metrics([asked.metric], (), "validation", validation, None, evaluate.code)


def _rows(store: TokenStore) -> list[Row]:
    return [store.row(i) for i in range(len(store))]


def _unanswered(row: Row) -> Prediction:
    last = row.value["messages"][-1] if "messages" in row.value else {}
    reference = str(last["content"]) if last.get("role") == "assistant" else None
    own = {"bytes": float(len(row.value["text"].encode()))} if "text" in row.value else {}
    if {"positives", "positive_ids"} & row.value.keys():
        own, reference = {"rank": 1.0, "recall_at_10": 1.0, "ndcg_at_10": 1.0}, ""
    return Prediction("", reference, row.where, {"nll": 1.0, "tokens": 1.0, **own})
