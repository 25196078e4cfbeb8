"""How often each training row is seen where rare classes are to be seen as often as frequent ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError
from tunesmith.recipe import BY_LABEL, Balance
from tunesmith.types import Row


def balanced(
    balance: Balance, train: TokenStore, repeats_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Repeats of each row, and those of a row of each class; the sum of all is as before.

    A class whose rows come m times has m^(1 - strength) / sum_c m_c^(1 - strength) of an epoch (with a power of 1/2:
    Mahajan et al. 2018, arXiv 1805.00932; of 0 all classes come equally often). InputError for a row without a class,
    and where all classes come equally often as it is.
    """
    names, class_N = np.unique([_class(train.row(i), balance.by) for i in range(len(train))], return_inverse=True)
    mass_C = np.bincount(class_N, weights=repeats_N)
    share_C = np.where(mass_C > 0, mass_C, 1.0) ** (1 - balance.strength) * (mass_C > 0)
    times_C = np.divide(share_C / share_C.sum() * mass_C.sum(), mass_C, out=np.ones_like(mass_C), where=mass_C > 0)
    if np.allclose(times_C, 1.0):
        why = f"and all rows have {str(names[0])!r} there" if len(names) == 1 else "whose values are equally frequent"
        raise InputError(
            f"train.balance is by {balance.by!r}, {why}",
            "leave it out, or name a column of which some values are rare",
        )
    return repeats_N * times_C[class_N], dict(zip(names.tolist(), times_C.tolist(), strict=True))


def _class(row: Row, by: str) -> str:
    if by != BY_LABEL:
        return row.tags[by]
    if "label" not in row.value:
        raise InputError(
            f"train.balance is by {BY_LABEL}, and {row.where} has no one label",
            "name a column of the rows in its place, or leave train.balance out; of several labels, "
            "objective.class_weights counts the rare ones more",
        )
    return row.value["label"]
