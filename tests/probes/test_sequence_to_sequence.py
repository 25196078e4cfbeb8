"""Probe: T5 from input to answer, two streams in padded rows, against transformers' own loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe import VOCABULARY, Bare, assert_same, gradient_of, run, source_of, tokens
from tunesmith.models.policy import Policy, Tokens
from tunesmith.types import Batch, Example, Part, Piece, Step, Terms, Want

START = 0
INPUTS = [tokens(n, n) for n in (3, 9, 6, 4)]
ANSWERS = [np.append(tokens(n, 50 + n), 1).astype(np.int32) for n in (5, 1, 7, 2)]


class Answer(Bare):
    """Negative log-likelihood of the decoder's tokens."""

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"nll": sum(float(b.weight_BT.sum()) for b in step.batches)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        assert scores.weight_U is not None
        assert scores.example_U is not None
        return Terms({"nll": Part(-scores.logprob_U, scores.weight_U, scores.example_U)})


def t5(*, old: bool) -> Policy:
    """`old` scales the decoder's outputs, as T5 does and T5 1.1 does not."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu" if old else "gated-gelu",
        decoder_start_token_id=START,
        pad_token_id=0,
        **({} if old else {"tie_word_embeddings": False}),
    )
    torch.manual_seed(2)
    return Policy(T5ForConditionalGeneration(config), "encoder-decoder", Tokens((1,), 0), packed=False)


def examples() -> list[Example]:
    made: list[Example] = []
    for asked, answer in zip(INPUTS, ANSWERS, strict=True):
        ids = np.concatenate([[START], answer]).astype(np.int32)
        weights = np.array([0] + [1] * len(answer), np.float32)
        made.append(Example((Piece(asked), Piece(ids, weights, stream="decoder"))))
    return made


def padded(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    tensors = [torch.from_numpy(row).long() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


@pytest.mark.parametrize("old", [True, False])
def test_loss_and_gradient_are_those_of_transformers(old: bool) -> None:
    policy, theirs = t5(old=old), t5(old=old)
    policy.check_projection()
    seen = run(source_of(examples(), policy, micro_batch_size=3, max_steps=8), policy, Answer())
    ids = padded(INPUTS, 0)
    loss = theirs.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=padded(ANSWERS, -100)).loss
    assert seen.losses[0] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert_same(seen.gradients[0], gradient_of(theirs, loss), 1e-5)
    assert seen.losses[-1] < 0.5 * seen.losses[0]
