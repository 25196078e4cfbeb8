"""Standard tasks of lm-evaluation-harness: found, their rows answered, and their metrics as ours are, with intervals.

That library is not one of ours: it is asked for where it is used. Nothing is fetched: a task's data must be here.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation.metrics import Bounds, FloatArray, MetricKind, RowMetric, quotient
from tunesmith.types import Prediction
from tunesmith.yaml_text import compose

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.models.policy import Policy

MEND = "mend the task's YAML file, or the functions that it names"
NEAR = 3  # names that are told where a task is unknown
SHOTS_SEED = 1234  # by which that library draws examples


@dataclass(frozen=True, slots=True)
class Answered:
    """A task's rows as one model answered them, its numbers of each row among their scores; `values` are over all.

    Metrics are called as that library calls them: `acc,none` is the metric and the filter of the answers.
    """

    task: str
    signature: str
    predictions: list[Prediction]
    values: dict[str, float]
    metrics: list[RowMetric]


def check_installed() -> None:
    """InputError where the library is not there."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise InputError(
            "standard tasks are those of lm-evaluation-harness, which is not installed here",
            "install it with `pip install tunesmith[lm-eval]`",
        ) from error


def find(name: str, folder: Path | None, shots: int | None) -> dict[str, Any]:
    """The task called `name`, or those of a group or tag of that name; `folder` holds tasks beside the library's own.

    InputError for an unknown name, and for a task that cannot be had without the network.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise InputError(f"--tasks {folder} is no folder", "give the folder of the task's YAML file")
    with _alone():
        manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
        if folder is not None and name not in manager.all_tasks:
            manager = TaskManager(include_path=str(folder))
        if name not in manager.all_tasks:
            for path in sorted(folder.glob("**/*.yaml")) if folder is not None else []:
                compose(path.read_text(encoding="utf-8", errors="replace"), str(path))  # the library skips broken ones
            near = difflib.get_close_matches(name, manager.all_tasks, NEAR)
            raise InputError(
                f"lm-evaluation-harness has no task {name!r}",
                f"did you mean {' or '.join(near)}?" if near else "give the folder of its YAML file with --tasks DIR",
            )
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except OSError as error:  # among them those of a data set that is not here
            raise InputError(
                f"the task {name} cannot be had here: {type(error).__name__}: {_first_line(error)}",
                "nothing is fetched: give a task with --tasks DIR whose YAML names local files (dataset_path: json, "
                "dataset_kwargs: {data_files: ...}), or load its data set once by yourself",
            ) from error
        except Exception as error:  # a task is made of files and code of others
            raise InputError(
                f"the task {name} cannot be made: {type(error).__name__}: {_first_line(error)}", MEND
            ) from error
    for task in tasks.values():
        task.set_fewshot_seed(seed=SHOTS_SEED)
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"the task {task.task_name} runs programs that the model writes, outside of a sandbox",
                "give its rows with --data FILE and a recipe's evaluate.code, which runs them inside of one",
            )
    return tasks


def answered(
    tasks: Mapping[str, Any],
    policy: Policy,
    renderer: Renderer,
    context: int | None,
    limit: int | None,
    seed: int,
) -> list[Answered]:
    """What a model answers to the first `limit` rows of each task (None: to all), and its metrics of them."""
    from lm_eval.evaluator import evaluate

    from tunesmith.evaluation.harness.model import HarnessModel

    model = HarnessModel(policy, renderer, context, seed)
    with _alone():
        try:
            found: Any = evaluate(model, {"tasks": dict(tasks), "groups": {}}, limit=limit, bootstrap_iters=0)
        except Exception as error:
            raise InputError(
                f"{', '.join(tasks)} cannot be measured: {type(error).__name__}: {_first_line(error)}",
                MEND,
            ) from error
    return [
        _told(name, task, found["samples"][name], found["results"][name], found["versions"][name])
        for name, task in tasks.items()
    ]


def _told(
    name: str, task: Any, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any], number: Any
) -> Answered:
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(str(sample["filter"]), []).append(sample)
    rows = [sorted(own, key=lambda sample: int(sample["doc_id"])) for own in by_filter.values()]
    scores: list[dict[str, float]] = [{} for _ in rows[0]]
    values: dict[str, float] = {}
    metrics: list[RowMetric] = []
    higher, aggregations = task.higher_is_better(), task.aggregation()
    for filtered, own in zip(by_filter, rows, strict=True):
        for metric in own[0]["metrics"]:
            key = f"{metric},{filtered}"
            if key not in results or not isinstance(results[key], int | float):
                continue
            values[key] = float(results[key])
            shape = _shape(aggregations[metric].__name__, [sample.get(metric) for sample in own])
            metrics.append(_metric(shape, key, bool(higher.get(metric, True))))
            if shape is not _Whole:
                for place, sample in enumerate(own):
                    scores[place] |= _scores(key, sample[metric])
    predictions = [
        Prediction(str(sample["filtered_resps"][0]), str(sample["target"]), f"{name} {sample['doc_id']}", own)
        for sample, own in zip(rows[0], scores, strict=True)
    ]
    shots = task.config.num_fewshot or 0
    numbered = f" version {number}" * ("version" in (task.config.metadata or {}))  # else that library makes one up
    signature = f"lm-eval {version('lm_eval')}, {name}{numbered}, {shots}-shot"
    return Answered(name, signature, predictions, values, metrics)


# ---------------------------------------------------------------- metrics


class _Measured:
    """What lm-eval measured of each row; in all rows it is what the sums of these numbers and weights come to."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    kind: ClassVar[MetricKind] = "ratio"
    bounds: ClassVar[Bounds] = (-math.inf, math.inf)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return prediction.scores[self.name], prediction.scores.get(_weight(self.name), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


class _Rate(_Measured):
    kind: ClassVar[MetricKind] = "rate"
    bounds: ClassVar[Bounds] = (0.0, 1.0)


class _Share(_Measured):
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)


class _Perplexity(_Measured):
    """exp of the nats that a word, or a row, costs."""

    bounds: ClassVar[Bounds] = (0.0, math.inf)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):
            return np.exp(-quotient(sums))


class _Bits(_Measured):
    """Bits that a byte costs."""

    bounds: ClassVar[Bounds] = (0.0, math.inf)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return -quotient(sums) / math.log(2)


class _Whole(_Measured):
    """A number of all rows at once, which is no function of sums."""


_AGGREGATED: Mapping[str, type[_Measured]] = {
    "mean": _Measured,
    "nanmean": _Whole,
    "perplexity": _Perplexity,
    "weighted_perplexity": _Perplexity,
    "bits_per_byte": _Bits,
}


def _shape(aggregation: str, values: Sequence[Any]) -> type[_Measured]:
    """By what that library makes of the rows' numbers, and by these."""
    shape = _AGGREGATED.get(aggregation, _Whole)
    if not all(_is_number(value) or _is_weighed(value) for value in values):
        return _Whole
    if shape is _Measured and all(_is_number(value) for value in values):
        numbers = {float(value) for value in values}
        return _Rate if numbers <= {0.0, 1.0} else _Share if all(0 <= n <= 1 for n in numbers) else _Measured
    return shape


def _metric(shape: type[_Measured], name: str, higher: bool) -> RowMetric:
    return type(shape.__name__, (shape,), {"name": name, "higher_is_better": higher})()


def is_whole(metric: RowMetric) -> bool:
    """Whether a metric is a number of all rows at once, which has no interval."""
    return isinstance(metric, _Whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)


def _is_weighed(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))  # type: ignore[arg-type]


def _scores(key: str, value: Any) -> dict[str, float]:
    if _is_number(value):
        return {key: float(value)}
    return {key: float(value[0]), _weight(key): float(value[1])}


def _weight(key: str) -> str:
    return f"{key} weight"


# ---------------------------------------------------------------- by itself


@contextmanager
def _alone() -> Generator[None]:
    """Hub and data sets are asked of their caches alone; what the library says while it works is not heard."""
    hub, sets = (importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config"))
    places = [(hub, "HF_HUB_OFFLINE"), (sets, "HF_HUB_OFFLINE"), (sets, "HF_DATASETS_OFFLINE")]
    before, logger = [getattr(where, name) for where, name in places], logging.getLogger("lm_eval")
    level = logger.level
    for where, name in places:
        setattr(where, name, True)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for (where, name), value in zip(places, before, strict=True):
            setattr(where, name, value)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
