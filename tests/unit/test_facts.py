"""Facts of a base are those of its config: whether its attention can be held inside segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.facts import is_packable
from tunesmith.models.fetch import resolve
from tunesmith.models.load import meta_model


@pytest.mark.parametrize(("model", "head"), [("tiny_llama", "lm"), ("tiny_llama", "pooled"), ("tiny_bert", "pooled")])
def test_a_model_whose_attention_asks_for_segments_is_packable(
    model: str, head: Any, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    assert is_packable(meta_model(resolve(str(folder)), head))


def test_norms_or_biases_alone_begin_at_a_rate_of_their_own() -> None:
    from tunesmith.methods.partial import Partial

    rates = [Partial(Partial.Options(only=only), 0.0).facts.learning_rate for only in ("all", "norms", "biases")]
    assert rates == [1e-4, 1e-3, 1e-3]
