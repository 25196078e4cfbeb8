"""Batched generation: the one caller of transformers' `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.virtual import Virtual
from tunesmith.types import Completion, SampleSpec


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    spec: SampleSpec,
    end: Sequence[int],
    pad: int,
    context: int | None = None,
    virtual: Virtual | None = None,
) -> list[Completion]:
    """Completes each prompt; the result is in the prompts' order and without the end token.

    Prompts of like length run together, at most `spec.batch_tokens` at a time (prompt and answer), padded left; those
    of an encoder-decoder right, because its encoder counts positions from the row's beginning. An answer is cut off
    where the model's `context` ends. Greedy at temperature 0, and then independent of the batching up to
    floating-point ties. Only a lone prompt can be followed by `spec.on_token`.
    `virtual` stands before each prompt.
    """
    if spec.on_token is not None and len(prompts) != 1:
        raise ValueError(f"one answer can be followed as it comes, not {len(prompts)}")
    answers: list[Completion | None] = [None] * len(prompts)
    training = model.training
    model.eval()
    if spec.temperature > 0:
        torch.manual_seed(spec.seed)
    try:
        before = 0 if virtual is None else virtual.count
        alike = virtual is not None and virtual.bars_padding(model.config)
        for chosen, room in _batches(prompts, spec, context, before, alike):
            asked = [prompts[i] for i in chosen]
            completions = (
                _complete(model, asked, spec, room, end, pad, virtual) if room else [Completion([], False)] * len(asked)
            )
            for index, completion in zip(chosen, completions, strict=True):
                answers[index] = completion
    finally:
        model.train(training)
    return [answer for answer in answers if answer is not None]


def _batches(
    prompts: Sequence[Sequence[int]], spec: SampleSpec, context: int | None, before: int, alike: bool
) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts that run together, and the new tokens each may have; longest first, to try memory at once.

    `before` more tokens stand before each; `alike`: those that run together have one length.
    """
    chosen: list[int] = []
    width = room = 0
    for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        length = before + len(prompts[index])
        left = spec.max_new_tokens if context is None else max(0, min(spec.max_new_tokens, context - length))
        other = left != room or (alike and length + left != width)
        if chosen and ((len(chosen) + 1) * width > spec.batch_tokens or other):
            yield chosen, room
            chosen = []
        if not chosen:
            width, room = length + left, left
        chosen.append(index)
    if chosen:
        yield chosen, room


@torch.no_grad()
def _complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    spec: SampleSpec,
    room: int,
    end: Sequence[int],
    pad: int,
    virtual: Virtual | None,
) -> list[Completion]:
    from transformers import GenerationConfig

    ids_BT, mask_BT = _padded(prompts, pad, model.device, left=not model.config.is_encoder_decoder)
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if virtual is not None:
        inputs = virtual.continued(model, ids_BT, mask_BT)
    greedy = spec.temperature == 0
    config = GenerationConfig(
        max_new_tokens=room,
        use_cache=True,
        do_sample=not greedy,
        eos_token_id=list(end),
        pad_token_id=pad,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        **({} if greedy else {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k}),
    )
    follower = None if spec.on_token is None else _Follower(spec.on_token, set(end))
    followed = {} if follower is None else {"streamer": follower, "stopping_criteria": [follower.stopped]}
    stored, model.generation_config = model.generation_config, GenerationConfig()  # ours alone decides
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(**inputs, generation_config=config, **followed)
    finally:
        model.generation_config = stored
    # It returns ids given before the new ones, or a decoder's start token.
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    found = [_cut(row[start:].tolist(), set(end)) for row in out]
    if follower is not None and follower.stop:  # a token may have come between the word to stop and the stop
        found = [Completion(found[0].token_ids[: follower.taken], False)]
    return found


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids, and where they are not padding: [B, T] each."""
    longest = max(len(p) for p in prompts)
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if left else 0
        ids_BT[row, start : start + len(prompt)] = torch.as_tensor(list(prompt))
        mask_BT[row, start : start + len(prompt)] = 1
    return ids_BT.to(device), mask_BT.to(device)


class _Follower:
    """A streamer of transformers: hands each token of one answer on, and remembers when it was told to stop."""

    def __init__(self, on_token: Callable[[int], bool], end: set[int]) -> None:
        self._on_token = on_token
        self._end = end
        self._prompt_seen = False
        self.taken = 0
        self.stop = False

    def put(self, value: Tensor) -> None:
        """The prompt the first time, then token by token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token not in self._end and not self.stop:
                self.taken += 1
                self.stop = self._on_token(token)

    def end(self) -> None:
        """The answer is over: its text is what `put` was given."""

    def stopped(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((ids_BT.shape[0],), self.stop, dtype=torch.bool, device=ids_BT.device)


def _cut(ids: list[int], end: set[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in end:
            return Completion(ids[:position], True)
    return Completion(ids, False)
