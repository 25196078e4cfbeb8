"""Balanced sampling: how often rows of each class come, against counting; and the same bits after a resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunesmith import api
from tunesmith.data.balance import balanced
from tunesmith.data.source import epoch_order
from tunesmith.errors import InputError, StoppedError
from tunesmith.events import StopRun
from tunesmith.recipe import Balance
from tunesmith.rundir import sha256_file
from tunesmith.types import Row


class Rows:
    """As much of a store as is asked for."""

    def __init__(self, classes: list[str], column: str | None = None) -> None:
        of_tags = [Row({"text": "x"}, f"row {i}", {column: name}) for i, name in enumerate(classes) if column]
        self._rows = of_tags or [Row({"text": "x", "label": name}, f"row {i}") for i, name in enumerate(classes)]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]


def made(classes: list[str], repeats: Any = None, **balance: Any) -> Any:
    store: Any = Rows(classes, balance.get("by"))
    return balanced(Balance(**balance), store, np.ones(len(classes)) if repeats is None else repeats)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from("aaaaaaabbc"), min_size=1, max_size=40), st.integers(0, 9))
def test_over_epochs_all_classes_come_equally_often(classes: list[str], seed: int) -> None:
    counts, epochs = Counter(classes), 12
    assume(len(set(counts.values())) > 1)
    repeats, times = made(classes)
    assert repeats.sum() == pytest.approx(len(classes))
    assert times == pytest.approx({name: len(classes) / len(counts) / count for name, count in counts.items()})
    seen = Counter(classes[i] for epoch in range(epochs) for i in epoch_order(repeats, epoch, seed))
    for name, count in counts.items():  # each row comes as often as it should, up to one
        assert abs(seen[name] - epochs * len(classes) / len(counts)) <= count


def test_strength_is_a_power_and_the_weights_of_sets_stay() -> None:
    repeats, times = made(["a"] * 16 + ["b"] * 4, strength=0.5)
    assert 16 * times["a"] / (4 * times["b"]) == pytest.approx(4 / 2)
    assert repeats.sum() == pytest.approx(20)
    weighted, _ = made(["a", "a", "b"], np.array([1.0, 3.0, 2.0]))
    assert weighted.tolist() == pytest.approx([0.75, 2.25, 3.0])
    unseen, _ = made(["a", "b", "b", "c"], np.array([1.0, 1.0, 1.0, 0.0]))
    assert unseen.tolist() == pytest.approx([1.5, 0.75, 0.75, 0.0])


def test_a_column_can_say_the_classes() -> None:
    _, times = made(["de", "en", "en", "en"], by="language")
    assert times == pytest.approx({"de": 2.0, "en": 2 / 3})


def test_a_row_without_one_label_is_refused() -> None:
    store: Any = Rows(["x"], "language")
    with pytest.raises(InputError, match="row 0 has no one label"):
        balanced(Balance(), store, np.ones(1))


@pytest.mark.parametrize(
    ("classes", "cause"),
    [("xxxx", "all rows have 'x' there"), ("abcdef", "values are equally frequent"), ("aabb", "are equally frequent")],
)
def test_what_has_nothing_to_balance_is_refused(classes: str, cause: str) -> None:
    with pytest.raises(InputError, match=f"train.balance is by 'label', .*{cause}"):
        made(list(classes))


def test_a_balanced_run_resumes_to_the_same_bits(tiny_bert: Path, tmp_path: Path) -> None:
    """And its plan says how often rows are seen."""
    lines = [json.dumps({"text": f"a plain text {i}", "label": "rare" if i % 10 == 0 else "usual"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    recipe: dict[str, Any] = {
        "model": str(tiny_bert),
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "objective": {"name": "classify", "focal_gamma": 1.0, "label_smoothing": 0.1},
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 8, "batch_size": 8, "save_every": 3, "balance": "label"},
        "place": {"threads": 1},
        "precision": "fp32",
    }
    assert "train.balance: a row is seen 5 times in an epoch where 'rare' is" in api.plan(recipe).warnings[-1]

    def stop(name: str, told: Any) -> None:
        if name == "step" and told["step"] == 5:
            raise StopRun

    api.train(recipe, out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        api.train(recipe, out=tmp_path / "stopped", listen=stop)
    api.resume(tmp_path / "stopped")
    for name in ("metrics.jsonl", "model/adapter_model.safetensors", "model/heads.safetensors"):
        assert sha256_file(tmp_path / "whole" / name) == sha256_file(tmp_path / "stopped" / name)
