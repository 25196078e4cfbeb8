"""How hard each training example is, for runs that see the easy ones first."""

from __future__ import annotations

import numpy as np

from tunesmith.data.fields import number_of
from tunesmith.data.source import EasyFirst
from tunesmith.data.store import TokenStore
from tunesmith.recipe import BY_LENGTH, Curriculum


def easy_first(curriculum: Curriculum | None, train: TokenStore) -> EasyFirst | None:
    """The order that a recipe asks for; InputError where a row's column is no number."""
    if curriculum is None:
        return None
    if curriculum.by == BY_LENGTH:
        hardness_N = train.lengths.astype(np.float64)
    else:
        rows = (train.row(index) for index in range(len(train)))
        hardness_N = np.array([number_of(row, curriculum.by, "train.curriculum.by") for row in rows])
    return EasyFirst(-hardness_N if curriculum.descending else hardness_N, curriculum.epochs)
