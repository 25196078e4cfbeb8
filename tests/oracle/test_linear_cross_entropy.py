"""`linear_logprobs` against log_softmax over whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.losses import linear_cross_entropy
from tunesmith.losses.linear_cross_entropy import linear_logprobs


@dataclass
class Case:
    hidden_UD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_U: Tensor
    scale: float
    softcap: float | None
    rows: int

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden_UD, self.weight_VD, *([] if self.bias_V is None else [self.bias_V])]

    def run(self, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        itemsize = max(4, self.hidden_UD.dtype.itemsize)
        return linear_logprobs(
            self.hidden_UD,
            self.weight_VD,
            self.target_U,
            self.bias_V,
            self.scale,
            self.softcap,
            entropy,
            chunk_bytes=2 * itemsize * self.weight_VD.shape[0] * self.rows,
        )

    def oracle(self) -> tuple[Tensor, Tensor]:
        logits_UV = self.hidden_UD @ self.weight_VD.T
        if self.bias_V is not None:
            logits_UV = logits_UV + self.bias_V
        logits_UV = logits_UV * self.scale
        if self.softcap is not None:
            logits_UV = self.softcap * torch.tanh(logits_UV / self.softcap)
        logprob_UV = torch.log_softmax(logits_UV, dim=-1)
        entropy_U = -(logprob_UV.exp() * logprob_UV).sum(-1)
        return logprob_UV.gather(-1, self.target_U[:, None]).squeeze(-1), entropy_U


@st.composite
def cases(draw: st.DrawFn) -> Case:
    units, width, vocabulary = draw(st.integers(0, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 13))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # Logits of hundreds: a softmax without its maximum taken off would overflow.
    size = draw(st.sampled_from([0.1, 1.0, 30.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        hidden_UD=(size * normal(units, width)).requires_grad_(),
        weight_VD=normal(vocabulary, width).requires_grad_(),
        bias_V=normal(vocabulary).requires_grad_() if draw(st.booleans()) else None,
        target_U=torch.randint(vocabulary, (units,), generator=generator),
        scale=draw(st.sampled_from([1.0, 0.0625, 1.5])),
        softcap=draw(st.sampled_from([None, 30.0, 2.0])),
        rows=draw(st.integers(1, 10)),
    )


@given(cases(), st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)]))
@hypothesis_settings(max_examples=150)
def test_values_and_gradients_are_those_of_whole_logits(case: Case, mix: tuple[float, float]) -> None:
    weights_U = torch.linspace(-1, 2, len(case.target_U), dtype=torch.float64)
    logprob_U, entropy_U = case.run()
    assert entropy_U is not None
    expected_logprob_U, expected_entropy_U = case.oracle()
    torch.testing.assert_close(logprob_U, expected_logprob_U, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy_U, expected_entropy_U, rtol=1e-8, atol=1e-10)

    found = torch.autograd.grad(((mix[0] * logprob_U + mix[1] * entropy_U) * weights_U).sum(), case.inputs)
    loss = ((mix[0] * expected_logprob_U + mix[1] * expected_entropy_U) * weights_U).sum()
    for ours, theirs in zip(found, torch.autograd.grad(loss, case.inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_gradcheck(softcap: float | None, entropy: bool, trained: tuple[bool, bool]) -> None:
    torch.manual_seed(3)
    hidden_UD = torch.randn(5, 4, dtype=torch.float64, requires_grad=trained[0])
    weight_VD = torch.randn(11, 4, dtype=torch.float64, requires_grad=trained[1])
    bias_V = torch.randn(11, dtype=torch.float64, requires_grad=trained[1])
    target_U = torch.randint(11, (5,))

    def outputs(hidden_UD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        results = linear_logprobs(hidden_UD, weight_VD, target_U, bias_V, 0.7, softcap, entropy, 2 * 8 * 11 * 2)
        return tuple(x for x in results if x is not None)

    assert torch.autograd.gradcheck(outputs, (hidden_UD, weight_VD, bias_V))


def test_no_units_still_have_a_graph() -> None:
    hidden_UD = torch.zeros(0, 4, requires_grad=True)
    weight_VD = torch.ones(6, 4, requires_grad=True)
    logprob_U, entropy_U = linear_logprobs(hidden_UD, weight_VD, torch.zeros(0, dtype=torch.int64), entropy=True)
    assert entropy_U is not None
    (logprob_U.sum() + entropy_U.sum()).backward()
    assert hidden_UD.grad is not None
    assert hidden_UD.grad.shape == (0, 4)
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


def test_certain_rows_keep_their_small_gradient() -> None:
    """A gap of 40 nats: the probability is 1 in float32, and the log-probability of the others must not be -inf."""
    hidden_UD = torch.tensor([[40.0], [40.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [0.0], [0.0]])
    logprob_U, entropy_U = linear_logprobs(hidden_UD, weight_VD, torch.tensor([0, 1]), entropy=True)
    assert entropy_U is not None
    torch.testing.assert_close(logprob_U, torch.tensor([0.0, -40.0]))
    assert (entropy_U >= 0).all()
    logprob_U.sum().backward()
    torch.testing.assert_close(hidden_UD.grad, torch.tensor([[0.0], [-1.0]]))


def test_enormous_logits() -> None:
    hidden_UD = torch.tensor([[3e4, -3e4]], requires_grad=True)
    weight_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.99, 0.0]])
    logprob_U, entropy_U = linear_logprobs(hidden_UD, weight_VD, torch.tensor([1]), entropy=True)
    assert entropy_U is not None
    torch.testing.assert_close(logprob_U, torch.tensor([-6e4]))
    torch.testing.assert_close(entropy_U, torch.tensor([0.0]))


@pytest.mark.parametrize("entropy", [False, True])
def test_half_precision_accumulates_in_float32(entropy: bool) -> None:
    """Only rounding the inputs and the gradients may be seen: logits themselves are never bf16."""
    torch.manual_seed(0)
    hidden_UD = torch.randn(30, 64).bfloat16().requires_grad_()
    weight_VD = (torch.randn(9000, 64) * 0.3).bfloat16().requires_grad_()
    case = Case(hidden_UD, weight_VD, None, torch.randint(9000, (30,)), 1.0, None, rows=8)
    wide = Case(
        hidden_UD.detach().double().requires_grad_(),
        weight_VD.detach().double().requires_grad_(),
        None,
        case.target_U,
        1.0,
        None,
        rows=8,
    )
    logprob_U, entropy_U = case.run(entropy)
    expected_U, expected_entropy_U = wide.oracle()
    assert logprob_U.dtype == torch.float32
    torch.testing.assert_close(logprob_U.double(), expected_U, rtol=1e-5, atol=1e-5)
    loss, expected = logprob_U.sum(), expected_U.sum()
    if entropy_U is not None:
        torch.testing.assert_close(entropy_U.double(), expected_entropy_U, rtol=1e-5, atol=1e-5)
        loss, expected = loss + entropy_U.sum(), expected + expected_entropy_U.sum()
    found = torch.autograd.grad(loss, case.inputs)
    for ours, theirs in zip(found, torch.autograd.grad(expected, wide.inputs), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=2**-8 * float(theirs.abs().max()))


def test_rows_of_the_weight_beyond_the_tokenizer_are_part_of_the_softmax() -> None:
    """A vocabulary padded for the hardware: the model was trained with those logits, so they count."""
    torch.manual_seed(1)
    hidden_UD, weight_VD = torch.randn(4, 8), torch.randn(64, 8)
    weight_VD[50:] = 0
    target_U = torch.randint(50, (4,))
    logprob_U, _ = linear_logprobs(hidden_UD, weight_VD, target_U)
    torch.testing.assert_close(
        logprob_U, torch.log_softmax(hidden_UD @ weight_VD.T, -1).gather(-1, target_U[:, None]).squeeze(-1)
    )


def test_chunks_do_not_change_anything_but_memory() -> None:
    torch.manual_seed(2)
    weight_VD, target_U = torch.randn(50, 16), torch.randint(50, (33,))
    results: list[Tensor] = []
    for rows in (1, 4, 33, 1000):
        hidden_UD = torch.linspace(-1, 1, 33 * 16).reshape(33, 16).requires_grad_()
        logprob_U, _ = linear_logprobs(hidden_UD, weight_VD, target_U, chunk_bytes=2 * 4 * 50 * rows)
        logprob_U.sum().backward()
        assert hidden_UD.grad is not None
        results.append(torch.cat([logprob_U.detach()[:, None], hidden_UD.grad], dim=-1))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_backward_twice_gives_the_gradient_twice() -> None:
    torch.manual_seed(4)
    hidden_UD, weight_VD = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    logprob_U, _ = linear_logprobs(hidden_UD, weight_VD, torch.tensor([0, 1, 2]))
    logprob_U.sum().backward(retain_graph=True)
    once = None if hidden_UD.grad is None else hidden_UD.grad.clone()
    logprob_U.sum().backward()
    assert once is not None
    torch.testing.assert_close(hidden_UD.grad, 2 * once)


def test_nothing_is_kept_without_gradients() -> None:
    hidden_UD, weight_VD = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.no_grad():
        logprob_U, entropy_U = linear_logprobs(hidden_UD, weight_VD, torch.tensor([0, 1, 2]))
    assert entropy_U is None
    assert not logprob_U.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cuda_half_precision_accumulates_in_float32(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden_UD = torch.randn(257, 128, device="cuda").bfloat16().requires_grad_()
    weight_VD = (torch.randn(5003, 128, device="cuda") * 0.3).bfloat16().requires_grad_()
    target_U = torch.randint(5003, (257,), device="cuda")
    case = Case(hidden_UD, weight_VD, None, target_U, 1.0, softcap, rows=100)
    wide = Case(
        hidden_UD.detach().double().requires_grad_(),
        weight_VD.detach().double().requires_grad_(),
        None,
        target_U,
        1.0,
        softcap,
        rows=100,
    )
    logprob_U, entropy_U = case.run()
    assert entropy_U is not None
    expected_U, expected_entropy_U = wide.oracle()
    torch.testing.assert_close(logprob_U.double(), expected_U, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_U.double(), expected_entropy_U, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((logprob_U + entropy_U).sum(), case.inputs)
    for ours, theirs in zip(
        found, torch.autograd.grad((expected_U + expected_entropy_U).sum(), wide.inputs), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=2**-7 * float(theirs.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 2**30])
def test_under_autocast_on_cuda_products_are_in_half_precision(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes kept for the backward or made again: the same gradients, in float32 for a float32 weight that trains."""
    monkeypatch.setattr(linear_cross_entropy, "KEPT_BYTES", kept)
    torch.manual_seed(0)
    hidden_UD = torch.randn(257, 128, device="cuda").requires_grad_()
    weight_VD = (torch.randn(5003, 128, device="cuda") * 0.3).requires_grad_()
    target_U = torch.randint(5003, (257,), device="cuda")
    case = Case(hidden_UD, weight_VD, None, target_U, 1.0, None, rows=100)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden_UD, weight_VD)]
    wide = Case(rounded[0], rounded[1], None, target_U, 1.0, None, rows=100)
    with torch.autocast("cuda", torch.bfloat16):
        logprob_U, _ = case.run(entropy=False)
    expected_U, _ = wide.oracle()
    torch.testing.assert_close(logprob_U.double(), expected_U, rtol=1e-5, atol=1e-5)
    weights_U = torch.linspace(-1, 2, 257, device="cuda")
    found = torch.autograd.grad((logprob_U * weights_U).sum(), case.inputs)
    for ours, theirs in zip(found, torch.autograd.grad((expected_U * weights_U).sum(), wide.inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=2**-7 * float(theirs.abs().max()))
