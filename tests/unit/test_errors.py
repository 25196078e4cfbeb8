"""Errors reach whoever can act on them: also from another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from tunesmith.errors import InputError, RefusedError, ResourceError, StoppedError, TunesmithError


@pytest.mark.parametrize("kind", [TunesmithError, InputError, RefusedError, ResourceError, StoppedError])
def test_an_error_survives_the_way_to_another_process(kind: type[TunesmithError]) -> None:
    error = kind("the cause", "the remedy")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert (again.cause, again.remedy, again.exit_code) == ("the cause", "the remedy", kind.exit_code)
        assert str(again) == str(error) == "the cause (the remedy)"
