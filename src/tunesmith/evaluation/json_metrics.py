"""Metrics of answers that must be JSON objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, cast

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object (RFC 8259) that `text` is from end to end, or None.

    Stricter than `json.loads`: NaN and Infinity are no JSON, and a key given twice has no one meaning.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same number, true is not 1, the order of keys says nothing."""
    if isinstance(left, dict) and isinstance(right, dict):
        a, b = cast("dict[str, Any]", left), cast("dict[str, Any]", right)
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(left, list) and isinstance(right, list):
        x, y = cast("list[Any]", left), cast("list[Any]", right)
        return len(x) == len(y) and all(same(p, q) for p, q in zip(x, y, strict=True))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def same_shape(left: Any, right: Any) -> bool:
    """Whether two JSON values have one shape: objects the same fields, each of one shape, other values one type."""
    if isinstance(left, dict) and isinstance(right, dict):
        a, b = cast("dict[str, Any]", left), cast("dict[str, Any]", right)
        return a.keys() == b.keys() and all(same_shape(value, b[key]) for key, value in a.items())
    return _json_type(left) == _json_type(right)


def _json_type(value: Any) -> str:
    """JSON knows one type of number; true and false are none."""
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def asks_for_objects(predictions: Sequence[Prediction]) -> bool:
    """Whether every reference is a JSON object, so that the task is to write one."""
    return all(p.reference is not None and parse_object(p.reference) is not None for p in predictions)


def _reference_object(prediction: Prediction, metric: str) -> dict[str, Any]:
    reference = parse_object(reference_of(prediction, metric))
    if reference is None:
        raise InputError(
            f"{metric} needs references that are JSON objects, and that of {prediction.where} is not",
            f"correct that row, or leave {metric} out of evaluate.metrics",
        )
    return reference


@METRICS.register("json_valid")
class JsonValid:
    """The whole output parses as one strict JSON object; white space around it is allowed, a code fence is not."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "json_valid"
    about: ClassVar[About] = About("RFC 8259", "own, on Python's json", "answers that a program reads: whether it can")
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "rate"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(asks_for_objects)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        return (float(parse_object(prediction.output) is not None), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("schema_valid")
class SchemaValid:
    """The output is a strict JSON object of the reference's shape: its fields and no other, values of its types.

    The reference stands for the schema, so which words a field may hold is not judged here.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "schema_valid"
    about: ClassVar[About] = About(
        "own",
        "own",
        "answers that a program reads, where no field may be missing or of another type",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "rate"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(asks_for_objects)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference = _reference_object(prediction, self.name)
        return (float(same_shape(reference, parse_object(prediction.output))), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("field_accuracy")
class FieldAccuracy:
    """Mean over rows of the share of the reference's fields that the output has with the same value.

    An output that is no JSON object scores 0. Fields that only the output has are not counted, except
    that a reference without fields is met by an object without fields alone.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "field_accuracy"
    about: ClassVar[About] = About(
        "own",
        "own",
        "extraction into fields: how much of the record is right, where exact_match asks for all of it",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (0.0, 1.0)

    applies = staticmethod(asks_for_objects)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        reference = _reference_object(prediction, self.name)
        output = parse_object(prediction.output)
        if output is None:
            return (0.0, 1.0)
        if not reference:
            return (float(not output), 1.0)
        hits = sum(key in output and same(value, output[key]) for key, value in reference.items())
        return (hits / len(reference), 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)
