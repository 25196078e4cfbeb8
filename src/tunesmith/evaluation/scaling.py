"""Probabilities made truer by what they were worth on other rows: temperature, vector and isotonic scaling.

Shape letters: N rows, V labels, J knots of a step function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from tunesmith.errors import InputError
from tunesmith.evaluation.metrics import FloatArray

IntArray = NDArray[np.int64]
# Before any row is seen, log T, and each label's w - 1 / T and b, are normal, of these variances: few rows that are all
# right would have no end of them. By five folds of CLINC150's validation rows (20 a label) the loss of vector scaling
# is 0.174 by 1, 0.172 by 0.3 or 0.1, 0.177 by 0.01. With these and so many rows true probabilities lose little
# (benchmarks/scaling_rows.py).
VARIANCE, OF_LABEL = 1.0, 0.3
LEAST_ROWS, LEAST_OF_LABEL = 20, 10
COLDEST, HOTTEST = 1 / 20, 20.0  # temperatures beyond these are those of rows that are all right, or of chance


class Scaling(Protocol):
    """What log-probabilities become; its fields are what a file holds of it. `keeps_order`: the best label stays."""

    keeps_order: ClassVar[bool]

    def __call__(self, logprobs_NV: FloatArray) -> FloatArray:
        """[N, V] probabilities."""
        ...


@dataclass(frozen=True, slots=True)
class Temperature:
    """p = softmax(log p / T), which is that of the logits by T (Guo et al. 2017, arXiv 1706.04599, section 4.2)."""

    keeps_order: ClassVar[bool] = True
    temperature: float

    @classmethod
    def fit(cls, logprobs_NV: FloatArray, label_N: IntArray) -> Temperature:
        """The temperature by which the rows' labels, and itself, are most probable."""

        def cost(cold: float) -> float:
            scaled_NV = special.log_softmax(np.exp(cold) * logprobs_NV, axis=-1)
            return cold**2 / (2 * VARIANCE) - float(scaled_NV[np.arange(len(label_N)), label_N].sum())

        found: Any = optimize.minimize_scalar(
            cost, bounds=(-np.log(HOTTEST), -np.log(COLDEST)), method="bounded", options={"xatol": 1e-5}
        )
        return cls(float(np.exp(-found.x)))

    def __call__(self, logprobs_NV: FloatArray) -> FloatArray:
        return special.softmax(logprobs_NV / self.temperature, axis=-1)


@dataclass(frozen=True, slots=True)
class Vector:
    """p = softmax(w * log p + b), a weight and a bias for each label.

    Vector scaling (Guo et al. 2017) of log-probabilities in place of logits, which is Dirichlet calibration by a
    diagonal matrix (Kull et al. 2019, arXiv 1910.12656). Where rows are few it stays near the best temperature.
    """

    keeps_order: ClassVar[bool] = False
    weight_V: list[float]
    bias_V: list[float]

    @classmethod
    def fit(cls, logprobs_NV: FloatArray, label_N: IntArray) -> Vector:
        count, labels = logprobs_NV.shape
        start_V = np.full(labels, 1 / Temperature.fit(logprobs_NV, label_N).temperature)
        wanted_NV, ridge = np.eye(labels)[label_N], 1 / (OF_LABEL * count)

        def loss(both: FloatArray) -> tuple[float, FloatArray]:
            weight_V, bias_V = both[:labels], both[labels:]
            scaled_NV = special.log_softmax(weight_V * logprobs_NV + bias_V, axis=-1)
            apart_NV = (np.exp(scaled_NV) - wanted_NV) / count
            slope = np.concatenate([(apart_NV * logprobs_NV).sum(axis=0), apart_NV.sum(axis=0)])
            far = np.concatenate([weight_V - start_V, bias_V])
            nll = -float((wanted_NV * scaled_NV).sum()) / count
            return nll + ridge * float(far @ far) / 2, slope + ridge * far

        begin = np.concatenate([start_V, np.zeros(labels)])
        found: Any = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        return cls(found.x[:labels].tolist(), found.x[labels:].tolist())

    def __call__(self, logprobs_NV: FloatArray) -> FloatArray:
        return special.softmax(np.array(self.weight_V) * logprobs_NV + np.array(self.bias_V), axis=-1)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Each label's probability by a rising function of it, all of them made to sum to 1 (Zadrozny and Elkan 2002).

    The functions are those of least squares against whether a row has the label, between knots (x, y); y stays half a
    row's share away from 0 and 1, which so many rows cannot show.
    """

    keeps_order: ClassVar[bool] = False
    knots_V: list[list[list[float]]]

    @classmethod
    def fit(cls, logprobs_NV: FloatArray, label_N: IntArray) -> Isotonic:
        least = 1 / (2 * len(label_N))
        return cls([_rising(p_N, label_N == v, least) for v, p_N in enumerate(np.exp(logprobs_NV).T)])

    def __call__(self, logprobs_NV: FloatArray) -> FloatArray:
        columns = [
            np.interp(p_N, x_J, y_J) for p_N, (x_J, y_J) in zip(np.exp(logprobs_NV).T, self.knots_V, strict=True)
        ]
        scaled_NV = np.stack(columns, axis=-1)
        return scaled_NV / scaled_NV.sum(axis=-1, keepdims=True)


def _rising(p_N: FloatArray, has_N: NDArray[np.bool_], least: float) -> list[list[float]]:
    """The knots of one label: the ends of each level."""
    x_J, place_N, count_J = np.unique(p_N, return_inverse=True, return_counts=True)
    mean_J = np.bincount(place_N, weights=has_N) / count_J
    y_J = optimize.isotonic_regression(mean_J, weights=count_J).x.clip(least, 1 - least)
    inner_J = np.zeros(len(y_J), dtype=bool)
    inner_J[1:-1] = (y_J[1:-1] == y_J[:-2]) & (y_J[1:-1] == y_J[2:])
    return [x_J[~inner_J].tolist(), y_J[~inner_J].tolist()]


SCALINGS: Mapping[str, type[Temperature] | type[Vector] | type[Isotonic]] = {
    "temperature": Temperature,
    "vector": Vector,
    "isotonic": Isotonic,
}


def check(name: str, row_labels: Sequence[str], labels: Sequence[str]) -> None:
    """InputError where rows of such labels cannot carry the scaling called `name` of the probabilities of `labels`."""
    keeps_order = SCALINGS[name].keeps_order
    least = LEAST_ROWS if keeps_order else max(LEAST_ROWS, LEAST_OF_LABEL * len(labels))
    counts = {label: row_labels.count(label) for label in labels}
    lacking = [label for label in labels if not counts[label]]
    if sum(counts.values()) < least:
        why = f"takes {least:,} or more and finds {sum(counts.values()):,}"
    elif len(lacking) > (len(labels) - 2 if keeps_order else 0):
        why = f"finds none of {', '.join(map(repr, lacking[:5]))}{', ...' * (len(lacking) > 5)}"
    else:
        return
    other = "" if keeps_order else ", ask for temperature, which takes fewer,"
    raise InputError(
        f"evaluate.calibrate is {name}, which is fitted to validation rows of the labels that are learned: it {why}",
        f"give more validation rows{other} or leave evaluate.calibrate out",
    )


def fit(name: str, logprobs_NV: FloatArray, label_N: IntArray) -> Scaling:
    return SCALINGS[name].fit(logprobs_NV, label_N)


def to_json(scaling: Scaling) -> dict[str, Any]:
    name = next(name for name, kind in SCALINGS.items() if isinstance(scaling, kind))
    return {"name": name, **asdict(scaling)}  # type: ignore[call-overload]


def from_json(told: Mapping[str, Any]) -> Scaling:
    make: Callable[..., Scaling] = SCALINGS[told["name"]]
    return make(**{key: value for key, value in told.items() if key != "name"})


def table(rows: Sequence[Mapping[str, float]], labels: Sequence[str], least: float) -> FloatArray:
    """[N, V] log-probabilities of the labels; what is below `least` counts as that much."""
    shares_NV = np.array([[row[label] for label in labels] for row in rows], dtype=np.float64)
    return np.log(np.maximum(shares_NV, least))
