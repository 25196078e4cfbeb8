"""Segment attention against a dense softmax in float64 that masks everything across segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.kernels.attention import KEYWORD, Bounds, segment_attention

MODULE: Any = SimpleNamespace(is_causal=True)


@dataclass(frozen=True)
class Case:
    """Rows of segments with gaps before, between and behind them, and how they are to be attended."""

    rows: list[list[tuple[int, int]]]
    length: int
    heads: int
    groups: int
    width: int
    causal: bool
    window: int | None
    softcap: float | None
    scaling: float | None
    loud: float

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Queries, keys and values, in transformers' layout: heads are a transposed view of [B, T, H, D]."""
        draw = torch.Generator().manual_seed(self.length)
        counts = (self.heads * self.groups, self.heads, self.heads)
        shapes = [(len(self.rows), self.length, count, self.width) for count in counts]
        q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
        return [x.transpose(1, 2).requires_grad_() for x in (q * self.loud, k, v)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows: list[list[tuple[int, int]]] = []
    for _ in range(draw(st.integers(1, 3))):
        at, spans = draw(st.integers(0, 3)), []
        for size in draw(st.lists(st.integers(1, 9), max_size=4)):
            spans.append((at, at + size))
            at += size + draw(st.sampled_from([0, 0, 1, 4]))
        rows.append(spans)
    last = max((spans[-1][1] for spans in rows if spans), default=0)
    return Case(
        rows=rows,
        length=max(1, last + draw(st.integers(0, 3))),
        heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 4, 8])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 10)),
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
        scaling=draw(st.none() | st.sampled_from([0.05, 1.0])),
        loud=draw(st.sampled_from([1.0, 100.0])),
    )


def segments(case: Case, inputs: list[Tensor], **given: Any) -> Tensor:
    keywords = {
        "scaling": case.scaling,
        "sliding_window": case.window,
        "softcap": case.softcap,
        "is_causal": case.causal,
        KEYWORD: Bounds(case.rows),
    }
    out_BTHD, weights = segment_attention(MODULE, *inputs, None, **(keywords | given))
    assert weights is None
    return out_BTHD


def dense(case: Case, inputs: list[Tensor]) -> Tensor:
    """softmax(cap(q k' scale)) v over whole rows, one query position at a time; [B, T, H, D]."""
    q, k, v = (x.double() for x in inputs)
    scale = case.width**-0.5 if case.scaling is None else case.scaling
    out: list[Tensor] = []
    for row, spans in enumerate(case.rows):
        for t in range(case.length):
            own = next(((a, b) for a, b in spans if a <= t < b), None)
            if own is None:
                out.append(q.new_zeros(q.shape[1], case.width))
                continue
            seen = [s for s in range(*own) if s <= t or not case.causal]
            seen = [s for s in seen if case.window is None or abs(t - s) < case.window]
            heads: list[Tensor] = []
            for head in range(q.shape[1]):
                score_S = k[row, head // case.groups, seen] @ q[row, head, t] * scale
                if case.softcap is not None:
                    score_S = case.softcap * torch.tanh(score_S / case.softcap)
                heads.append(score_S.softmax(0) @ v[row, head // case.groups, seen])
            out.append(torch.stack(heads))
    return torch.stack(out).unflatten(0, (len(case.rows), case.length))


def compare(case: Case, dtype: torch.dtype, tolerance: float, attend: Callable[..., Tensor] = segments) -> None:
    """Outputs and the gradients of all three inputs, for an upstream gradient that differs everywhere."""
    ours, theirs = case.inputs(dtype), case.inputs(dtype)
    found, expected = attend(case, ours), dense(case, theirs)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    # Where no row has a segment nothing leads back to the inputs, as to parameters that are not used.
    if not any(case.rows):
        return
    mine = torch.autograd.grad((found.double() * weight).sum(), ours)
    yours = torch.autograd.grad((expected * weight).sum(), theirs)
    for name, a, b in zip("qkv", mine, yours, strict=True):
        largest = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=10 * tolerance * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


@settings(max_examples=120)
@given(case=cases())
def test_float64_is_the_dense_block_mask(case: Case) -> None:
    compare(case, torch.float64, 1e-10 if case.softcap is None else 3e-5)  # a capped softmax is in float32


@settings(max_examples=60)
@given(case=cases())
def test_float32_too(case: Case) -> None:
    compare(case, torch.float32, 2e-3 if case.loud > 1 else 1e-5)


@pytest.mark.parametrize(("causal", "expected"), [(True, [1.0, 1.5, 2.5, 3.5]), (False, [1.5, 2.0, 3.0, 3.5])])
def test_windows_by_hand(causal: bool, expected: list[float]) -> None:
    """A window of 2 over values 1 to 4: itself and one before it, or one on either side."""
    v = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    flat = torch.zeros_like(v)
    keywords = {KEYWORD: Bounds([[(0, 4)]])}
    out, _ = segment_attention(MODULE, flat, flat, v, None, sliding_window=2, is_causal=causal, **keywords)
    assert out.flatten().tolist() == pytest.approx(expected)


def test_softcap_holds_scores_that_would_decide_alone() -> None:
    """Scores of 1000 and 0 under a cap of 2 are 2 and 0: e^2 / (e^2 + 1) of the weight, not all of it."""
    q = torch.full((1, 1, 2, 1), 1000.0)
    k, v = (torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1) for _ in range(2))
    keywords = {KEYWORD: Bounds([[(0, 2)]]), "scaling": 1.0, "is_causal": False}
    capped, _ = segment_attention(MODULE, q, k, v, None, softcap=2.0, **keywords)
    free, _ = segment_attention(MODULE, q, k, v, None, **keywords)
    assert capped.flatten().tolist() == pytest.approx([0.8807970779778823] * 2)
    assert free.flatten().tolist() == [1.0, 1.0]


def test_what_is_outside_every_segment_neither_gives_nor_takes() -> None:
    case = Case([[(1, 3), (4, 6)]], 8, 1, 2, 4, True, None, None, None, 1.0)
    inputs = case.inputs(torch.float32)
    out = segments(case, inputs)
    assert not out[0, [0, 3, 6, 7]].any()
    spoilt = [x.detach().clone() for x in inputs]
    for x in spoilt:
        x[:, :, [0, 3, 6, 7]] = float("nan")
    assert torch.equal(segments(case, spoilt), out)


def test_the_module_says_whether_it_looks_ahead_unless_the_call_does() -> None:
    case = Case([[(0, 5)]], 5, 1, 1, 4, True, None, None, None, 1.0)
    ahead: Any = SimpleNamespace(is_causal=False)
    inputs = case.inputs(torch.float32)
    bounds = {KEYWORD: Bounds(case.rows)}
    causal, both = segments(case, inputs), segments(case, inputs, is_causal=False)
    assert not torch.allclose(causal, both)
    assert torch.equal(segment_attention(MODULE, *inputs, None, **bounds)[0], causal)
    assert torch.equal(segment_attention(ahead, *inputs, None, **bounds)[0], both)
    assert torch.equal(segment_attention(ahead, *inputs, None, is_causal=True, **bounds)[0], causal)
    assert torch.equal(segment_attention(object(), *inputs, None, **bounds)[0], causal)  # type: ignore[arg-type]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_and_keeps_the_mean(softcap: float | None) -> None:
    case = Case([[(0, 3)]], 3, 1, 1, 1, False, None, softcap, None, 1.0)
    q, k, _ = (x.detach() for x in case.inputs(torch.float32))
    many = [x.expand(20000, -1, -1, -1) for x in (q, k, torch.ones_like(q))]
    torch.manual_seed(0)
    out = segments(case, many, dropout=0.4, **{KEYWORD: Bounds([[(0, 3)]] * 20000)})
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(out.std()) > 0.1
    assert segments(case, [x[:1] for x in many]).flatten().tolist() == pytest.approx([1.0] * 3)


def test_calls_are_counted_and_missing_bounds_or_unknown_biases_raise() -> None:
    case = Case([[(0, 2)]], 2, 1, 1, 4, True, None, None, None, 1.0)
    inputs = case.inputs(torch.float32)
    bounds = Bounds(case.rows)
    segments(case, inputs, **{KEYWORD: bounds})
    segments(case, inputs, **{KEYWORD: bounds})
    assert bounds.calls == 2
    with pytest.raises(RuntimeError, match="without segment_bounds"):
        segment_attention(MODULE, *inputs, None)
    with pytest.raises(RuntimeError, match="without segment_bounds"):
        segments(case, inputs, **{KEYWORD: case.rows})
    for name in ("position_bias", "s_aux"):
        with pytest.raises(RuntimeError, match=name):
            segments(case, inputs, **{name: torch.zeros(1)})
    with pytest.raises(RuntimeError, match="a mask"):
        segment_attention(MODULE, *inputs, torch.zeros(1), **{KEYWORD: bounds})
    assert bounds.calls == 2
