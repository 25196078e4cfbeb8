"""Divergences against sums written out, and reductions over the vocabulary against whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.losses.divergence import Kind, coarse, divergence, most_probable, with_rest
from tunesmith.losses.linear_reduce import linear_logits, linear_reduce


def tables(seed: int, rows: int, words: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = 3 * torch.randn(2, rows, words, generator=generator, dtype=torch.float64)
    return both[0].log_softmax(-1), both[1].log_softmax(-1)


def plain(teacher: Tensor, student: Tensor, kind: Kind, beta: float) -> list[float]:
    """Term by term, in Python's own numbers."""
    found: list[float] = []
    for p_V, q_V in zip(teacher.exp().tolist(), student.exp().tolist(), strict=True):
        m_V = [beta * p + (1 - beta) * q for p, q in zip(p_V, q_V, strict=True)]
        kl = [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in ((p_V, q_V), (q_V, p_V))]
        mixed = [sum(a * math.log(a / b) for a, b in zip(one, m_V, strict=True)) for one in (p_V, q_V)]
        found.append({"forward_kl": kl[0], "reverse_kl": kl[1], "jsd": beta * mixed[0] + (1 - beta) * mixed[1]}[kind])
    return found


@given(
    st.integers(0, 999),
    st.integers(1, 4),
    st.integers(2, 9),
    st.sampled_from(("forward_kl", "reverse_kl", "jsd")),
    st.floats(0.1, 0.9),
)
def test_divergences_are_those_written_out(seed: int, rows: int, words: int, kind: Kind, beta: float) -> None:
    teacher, student = tables(seed, rows, words)
    assert divergence(teacher, student, kind, beta).tolist() == pytest.approx(plain(teacher, student, kind, beta))
    assert divergence(teacher, teacher, kind, beta).tolist() == pytest.approx([0.0] * rows, abs=1e-9)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(3, 9), st.integers(1, 8))
def test_tokens_beyond_the_most_probable_count_as_one(seed: int, rows: int, words: int, count: int) -> None:
    teacher, student = tables(seed, rows, words)
    token, logprob = most_probable(teacher, count)
    kept = min(count, words)
    assert torch.equal(logprob, teacher.gather(-1, token))
    for table, made in ((teacher, with_rest(logprob)), (student, coarse(student, token))):
        assert made.exp().sum(-1).tolist() == pytest.approx([1.0] * rows, abs=1e-6)
        others = 1 - table.gather(-1, token).exp().sum(-1)
        if kept < words:
            assert made[:, -1].exp().tolist() == pytest.approx(others.tolist(), abs=1e-6)
    told = divergence(with_rest(logprob), coarse(student, token), "forward_kl")
    whole = divergence(teacher, student, "forward_kl")
    assert bool((told <= whole + 1e-6).all())  # joining tokens cannot tell two distributions further apart


@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, None, True), (2.0, 5.0, False)])
def test_a_reduction_in_chunks_is_that_of_whole_logits_in_value_and_gradient(
    scale: float, softcap: float | None, bias: bool
) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    added = torch.randn(11, requires_grad=True) if bias else None
    rows_seen: list[int] = []

    def reduce(logits: Tensor, rows: slice) -> Tensor:
        rows_seen.append(rows.stop - rows.start)
        return torch.stack([logits.logsumexp(-1), logits[:, 3] * torch.arange(7.0)[rows]], dim=-1)

    logits = scale * (hidden @ weight.T + (0 if added is None else added))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    assert torch.allclose(linear_logits(hidden, weight, added, scale, softcap), logits, atol=1e-5)
    leaves = [leaf for leaf in (hidden, weight, added) if leaf is not None]
    expected = reduce(logits, slice(0, 7))
    wanted = torch.autograd.grad((expected * torch.tensor([1.0, 0.5])).sum(), leaves)
    rows_seen.clear()
    found = linear_reduce(hidden, reduce, weight, added, scale, softcap, chunk_bytes=3 * 4 * 11)
    assert rows_seen == [3, 3, 1]
    assert torch.allclose(found, expected, atol=1e-5)
    for actual, other in zip(
        torch.autograd.grad((found * torch.tensor([1.0, 0.5])).sum(), leaves), wanted, strict=True
    ):
        assert torch.allclose(actual, other, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(linear_reduce(hidden, reduce, weight, added, scale, softcap, 132), expected, atol=1e-5)
