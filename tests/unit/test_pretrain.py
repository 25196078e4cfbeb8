"""Continued pre-training: windows hold every token once, micro-batches change nothing, and a run learns its text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from families import policy_of
from tunesmith import api
from tunesmith.data.chat import Renderer
from tunesmith.data.source import Batching, DataSource, ExampleList
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.errors import InputError
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.sft import Sft
from tunesmith.types import WINDOW, Example, Piece, Prediction, Row


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 40), st.text("abc de", min_size=1, max_size=90).filter(str.strip))
def test_windows_learn_every_token_once_and_are_no_longer_than_asked(tiny_llama: Path, length: int, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    whole, windows = (Renderer(tokenizer, sequence_length=n).windows(text) for n in (None, length))
    (document,) = whole
    assert all(len(window.input_ids) <= length for window in windows)
    rebuilt, weights = windows[0].input_ids.tolist(), windows[0].weights.tolist()
    for before, window in pairwise(windows):
        assert window.input_ids[0] == before.input_ids[-1]
        assert window.weights[0] == 0
        rebuilt += window.input_ids[1:].tolist()
        weights += window.weights[1:].tolist()
    assert rebuilt == document.input_ids.tolist()
    assert weights == document.weights.tolist()


def test_a_window_of_one_token_teaches_nothing(tiny_llama: Path) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_llama), sequence_length=1)
    with pytest.raises(InputError, match="no token of a window of one token follows another"):
        renderer.windows("ab")


def _engine(policy: Any) -> NativeEngine:
    return NativeEngine(
        policy, [{"params": list(policy.parameters())}], Optimization(1e-3, "constant", 0.0, 0.0, 1), seed=0
    )


def test_a_document_of_many_windows_may_take_several_micro_batches() -> None:
    draw = np.random.default_rng(0)
    pieces = tuple(Piece(draw.integers(2, 60, 8).astype(np.int32), np.ones(8, np.float32), WINDOW) for _ in range(5))
    examples = ExampleList([Example(pieces), Example(pieces[:1])])
    found: list[tuple[float, torch.Tensor, int]] = []
    for tokens in (1000, 16):
        policy = policy_of("llama")
        torch.manual_seed(0)
        for parameter in policy.parameters():
            parameter.data.normal_(0, 0.1)
        source = DataSource(examples, Batching(1, 1, 2, None, None, tokens), seed=0, packed=True, pad_id=0)
        step = next(iter(source.steps(policy)))
        engine = _engine(policy)
        stats = engine.forward_backward(Pretrain(None), policy, step)
        gradient = torch.cat([p.grad.flatten() for p in engine.trainable.values() if p.grad is not None])
        found.append((stats.loss, gradient, len(step.batches)))
        assert step.tokens == 48
    (loss, gradient, whole), (other, apart, parts) = found
    assert (whole, parts) == (1, 4)  # 40 tokens at most 16 at a time, and 8 more
    assert other == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(apart, gradient, rtol=1e-4, atol=1e-6)


def test_a_run_learns_its_text_and_measures_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog sat by the door "
    rows = [{"text": text * 4 + str(i)} for i in range(24)]
    held = [{"text": text * 4 + str(i)} for i in range(50, 58)]
    recipe: dict[str, Any] = {
        "model": str(tiny_llama),
        "objective": "pretrain",
        "method": "full",
        "train": {"epochs": 3, "batch_size": 4, "learning_rate": 6e-3, "sequence_length": 24, "micro_batch_size": 1},
    }
    result = api.train(recipe, data={"train": rows, "test": held}, out=tmp_path / "run")
    values = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert values["tuned", "perplexity"] < 0.7 * values["base", "perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    size = sum(len(row["text"].encode()) for row in held)
    tokens = sum(len(tokenizer(row["text"])["input_ids"]) for row in held)  # all but the first, and EOS
    bits = values["tuned", "loss"] * tokens / np.log(2) / size
    assert values["tuned", "bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert next(e for e in result.effects if e["metric"] == "loss")["p"] < 0.01


def test_rows_of_text_are_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    row = Row({"text": "x"}, "here")
    assert Pretrain(None).describe() == {}
    Pretrain(None).fit([row])
    recipe = {"model": str(tiny_llama), "objective": "pretrain", "method": "lora", "train": {"max_steps": 1}}
    with pytest.raises(InputError, match=r"cannot learn from rows of 'prompt\+completion'"):
        api.train(recipe, data={"train": [{"prompt": "a", "completion": "b"}] * 3}, out=tmp_path / "run")


def test_memory_is_planned_for_a_window_and_not_for_a_whole_document() -> None:
    from tunesmith.extent import longest

    prepared: Any = SimpleNamespace(train=SimpleNamespace(lengths=np.array([7, 9000])), tests={}, validation=None)
    facts: Any = None
    assert (longest(facts, prepared, Sft(None), 64), longest(facts, prepared, Pretrain(None), 64)) == (9000, 64)


def test_bits_per_byte_are_of_plain_text() -> None:
    from tunesmith.evaluation import METRICS

    spoken = Prediction("", "said", "f:2", {"nll": 1.0, "tokens": 1.0})
    with pytest.raises(InputError, match="bits_per_byte needs the bytes of a text, and f:2 is none"):
        METRICS.get("bits_per_byte")([]).statistics(spoken)
