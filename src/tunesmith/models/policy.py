"""Backbone and heads in one module: the one forward that training, evaluation and serving share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels import attention, shared_prefix
from tunesmith.kernels.transfer import sent
from tunesmith.losses.linear_cross_entropy import linear_logprobs
from tunesmith.losses.linear_reduce import linear_logits, linear_reduce
from tunesmith.models.heads import Head, pool
from tunesmith.models.projection import before, check, projection
from tunesmith.models.sample import generate
from tunesmith.models.virtual import Virtual, VirtualKeys, VirtualTokens, before_all, before_each, behind
from tunesmith.types import Batch, Completion, ModelKind, SampleSpec, Scores, Segment, Stream, Want

# Families whose position embeddings begin after the padding index (RoBERTa, arXiv 1907.11692).
OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "mpnet"}
)


WeightsOf = Callable[[Path | None], dict[str, Tensor]]
Restore = Callable[[Tensor], Tensor]  # hidden states of the positions that ran -> those of the batch's own


def _no_text(text: str) -> list[int]:
    raise RuntimeError("this policy was made without a tokenizer")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids that a policy needs to know: what ends an answer, pads a row, was added, and those of a text.

    `mask` stands where a word is hidden; None where the tokenizer has no such token.
    """

    end: tuple[int, ...]
    pad: int
    added: tuple[int, ...] = ()
    encode: Callable[[str], list[int]] = _no_text
    mask: int | None = None


class Policy(nn.Module):
    """A model of transformers, its fresh heads, and how a batch goes through them.

    `packed` says that attention can be held inside segments, so that a batch is one row without
    padding; else each piece has a padded row. `pooling` is how a segment becomes one vector.
    `autocast` is the dtype of matrix products, None for the weights' own. `share_prefixes`: what all
    segments of a row begin with is computed once, where that changes nothing. `weights` reads the base's state, or that
    of a folder that its `save_pretrained` wrote, from disk, for methods that change it. `virtual`: tokens that stand
    before every segment and are seen by nobody but the model. `as_base`: inside, the model is its base again.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: ModelKind,
        tokens: Tokens,
        *,
        packed: bool,
        pooling: str = "mean",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.kind: ModelKind = kind
        self.tokens = tokens
        self.packed = packed
        self.pooling = pooling
        self.autocast = autocast
        self.share_prefixes = True
        self._serves: bool | None = None  # what shared_prefix says of the model in this mode; see `train`
        self.asked = 0  # attention calls of the last packed forward
        self.weights: WeightsOf = _no_weights
        self.as_base: Callable[[], AbstractContextManager[None]] = nullcontext
        self.virtual: Virtual | None = None
        self._virtual_off = False
        self._noise = 0.0
        self.heads = nn.ModuleDict()
        self._position_offset = int(self.config.pad_token_id) + 1 if self.config.model_type in OFFSET_POSITIONS else 0
        attention.register()
        self._attention(self._implementation)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def add_head(self, head: Head) -> None:
        self.heads[head.spec.name] = head.to(self.device)

    def train(self, mode: bool = True) -> Policy:
        """As of any module; what was decided for the other mode is asked again."""
        self._serves = None
        return super().train(mode)

    def put_before(self, virtual: Virtual) -> None:
        """Puts virtual tokens, or their keys and values in each layer, before every segment from now on."""
        self.virtual = virtual.to(self.device)
        self._attention(self._implementation)

    @contextmanager
    def without_virtual(self) -> Generator[None]:
        """Inside, no virtual tokens stand before the segments."""
        before, self._virtual_off = self._virtual_off, True
        try:
            yield
        finally:
            self._virtual_off = before

    @contextmanager
    def noisy(self, alpha: float) -> Generator[None]:
        """Inside, while it trains, embeddings of texts carry noise: uniform in +-alpha / sqrt(L D) for a text of L.

        (NEFTune: Jain et al. 2023, arXiv 2310.05914, algorithm 1.)
        """
        self._noise = alpha
        try:
            yield
        finally:
            self._noise = 0.0

    def precision(self) -> AbstractContextManager[Any]:
        """The context every forward runs in."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def score(self, batch: Batch, want: Want) -> Scores:
        """One forward of `batch`; only what `want` names is computed.

        Units are the positions whose weight is not 0, row by row; never [B, T, V] logits.
        Pooled vectors that the source has cached (column "pooled") are taken as they are.
        """
        if want.pooled and "pooled" in batch.columns:
            return Scores(pooled_SD=batch.columns["pooled"])
        with self.precision():
            hidden_BTD = self._hidden(batch)
            scores = Scores(hidden_BTD=hidden_BTD if want.hidden else None)
            if want.pooled:
                scores.pooled_SD = pool(hidden_BTD, batch.segments, self.pooling)
            if want.logprobs or want.entropy or want.values or want.reduce is not None:
                self._score_units(batch, want, hidden_BTD, scores)
        return scores

    def logits(self, hidden_UD: Tensor) -> Tensor:
        """The model's logits of last hidden states, in float32: [U, V]."""
        return linear_logits(before(self.model, self.kind, hidden_UD), **self._projection())

    def sample(self, prompts: Sequence[Sequence[int]], spec: SampleSpec) -> list[Completion]:
        """Completions of `prompts`, in their order; end tokens are cut off."""
        self._attention("sdpa")  # generation pads left and keeps a cache: segments do not apply
        try:
            with self.precision():
                tokens = self.tokens
                return generate(self.model, prompts, spec, tokens.end, tokens.pad, self._context(), self._virtual)
        finally:
            self._attention(self._implementation)

    def check_projection(self) -> None:
        """Compares this class's log-probabilities with the model's own logits on a few tokens.

        Raises RefusedError where they differ: a scale or cap between the last hidden state and
        the logits that `projection` does not know would silently train a wrong loss.
        """
        training = self.training
        self.eval()
        self._attention("sdpa")
        check(self.model, self.kind, self._forward, self._no_cache)
        self._attention(self._implementation)
        self.train(training)

    def _score_units(self, batch: Batch, want: Want, hidden_BTD: Tensor, scores: Scores) -> None:
        unit_U = batch.unit_U
        hidden_UD = hidden_BTD.flatten(0, 1).index_select(0, unit_U)
        scores.weight_U = batch.weight_BT.flatten()[unit_U]
        scores.example_U = batch.example_U
        if want.values:
            scores.value_U = self.heads["value"](hidden_UD)[:, 0]
        if not (want.logprobs or want.entropy or want.reduce is not None):
            return
        hidden_UD, projected = before(self.model, self.kind, hidden_UD), self._projection()
        if want.logprobs or want.entropy:
            scores.logprob_U, scores.entropy_U = linear_logprobs(
                hidden_UD,
                projected["weight_VD"],
                batch.target_BT.flatten()[unit_U],
                entropy=want.entropy,
                **_without(projected, "weight_VD"),
            )
        if want.reduce is not None:
            scores.reduced_UK = linear_reduce(hidden_UD, want.reduce, **projected)

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, D] of the decoder stream if there is one, else of the input."""
        stream = batch.streams["input"]
        segments = [segment for segment in batch.segments if segment.stream == "input"]
        virtual_PD = self._virtual.exact() if isinstance(self._virtual, VirtualTokens) else None
        if self.kind == "encoder-decoder":
            decoder = batch.streams["decoder"]
            return self._forward(
                **self._padded(stream, segments, virtual_PD)[0],
                decoder_input_ids=decoder.input_ids_BT,
                decoder_attention_mask=_inside(decoder),
                **batch.extra,
            )
        if not self._is_held:
            inputs, restore = self._padded(stream, segments, virtual_PD)
            return restore(self._forward(**inputs, **batch.extra))
        inputs, bounds, restore = self._held(batch, virtual_PD)
        hidden_BTD = self._forward(**inputs, **batch.extra, **{attention.KEYWORD: bounds})
        self.asked = bounds.calls
        if not self.asked:
            raise RuntimeError(f"{type(self.model).__name__} never asked for segment bounds; its plan must not pack")
        return restore(hidden_BTD)

    def _padded(
        self, stream: Stream, segments: Sequence[Segment], virtual_PD: Tensor | None
    ) -> tuple[dict[str, Any], Restore]:
        """Rows of one segment each under a mask; an encoder-decoder counts its positions itself."""
        ids_BT, position_BT, mask_BT = stream.input_ids_BT, stream.position_ids_BT, _inside(stream)
        inputs: dict[str, Any] = {**self._read(stream, segments), **self._types(stream)}
        restore = _as_it_is
        if virtual_PD is not None:
            layout = before_each(stream, segments, len(virtual_PD))
            inputs = {"inputs_embeds": layout.lay_out(virtual_PD, self._embeddings(stream, segments))}
            position_BT, mask_BT = layout.position_BK, layout.inside_BK.long()
            restore = partial(layout.restore, text_BT=ids_BT)
        if self.kind != "encoder-decoder":
            inputs["position_ids"] = position_BT + self._position_offset
        return {**inputs, "attention_mask": mask_BT}, restore

    def _held(self, batch: Batch, virtual_PD: Tensor | None) -> tuple[dict[str, Any], attention.Bounds, Restore]:
        """Rows of several segments under bounds; what all of them begin with stands there once, where it may."""
        stream, may_share = batch.streams["input"], self._may_share(batch)
        ids_BT, position_BT = stream.input_ids_BT, stream.position_ids_BT
        shared = shared_prefix.find(stream, batch.segments, batch.common) if may_share else None
        bounds = _bounds(batch) if shared is None else shared.bounds
        if virtual_PD is None:
            position_BT = position_BT + self._position_offset
            if isinstance(self._virtual, VirtualKeys):
                position_BT, bounds = position_BT + self._virtual.count, behind(bounds, self._virtual.count)
                bounds.before = self._virtual.by_module(self.model)
            read = self._read(stream, batch.segments)
            inputs = {**read, "position_ids": position_BT, **self._types(stream)}
            if shared is None:
                return inputs, bounds, _as_it_is
            return {name: shared.shorten(value) for name, value in inputs.items()}, bounds, shared.restore
        layout = (
            before_all(stream, bounds, shared, len(virtual_PD))
            if may_share and len(ids_BT) == 1
            else before_each(stream, batch.segments, len(virtual_PD))
        )
        inputs = {
            "inputs_embeds": layout.lay_out(virtual_PD, self._embeddings(stream, batch.segments)),
            "position_ids": layout.position_BK + self._position_offset,
        }
        return inputs, layout.bounds, partial(layout.restore, text_BT=ids_BT)

    def _types(self, stream: Stream) -> dict[str, Tensor]:
        """Token types, for a model that knows more than one; without them it takes all for 0.

        Behind virtual tokens it is given none, because PEFT gives none there and is to give the same outputs.
        """
        knows = (getattr(self.config, "type_vocab_size", None) or 0) > 1 and self._virtual is None
        return {"token_type_ids": stream.type_ids_BT} if knows and stream.type_ids_BT is not None else {}

    @property
    def _virtual(self) -> Virtual | None:
        """What stands before every segment now."""
        return None if self._virtual_off else self.virtual

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of tokens, in the shape of their ids and one more dimension: [B, T, D]."""
        return self.model.get_input_embeddings()(ids_BT)

    def _read(self, stream: Stream, segments: Sequence[Segment]) -> dict[str, Tensor]:
        """What the model reads of a stream: its tokens, or their embeddings where these carry noise."""
        if self._noise and self.training:
            return {"inputs_embeds": self._embeddings(stream, segments)}
        return {"input_ids": stream.input_ids_BT}

    def _embeddings(self, stream: Stream, segments: Sequence[Segment]) -> Tensor:
        embedded_BTD = self.embedded(stream.input_ids_BT)
        if not (self._noise and self.training):
            return embedded_BTD
        length_S = sent(torch.tensor([segment.length for segment in segments]), embedded_BTD.device)
        length_BT1 = length_S[stream.segment_ids_BT.clamp(min=0)][..., None]
        uniform_BTD = 2 * torch.rand_like(embedded_BTD) - 1
        return embedded_BTD + uniform_BTD * self._noise / (length_BT1 * embedded_BTD.shape[-1]).sqrt()

    @property
    def _is_held(self) -> bool:
        """Whether attention is ours: for rows of several segments, and for keys that stand before each of them."""
        return self.packed or isinstance(self.virtual, VirtualKeys)

    @property
    def _implementation(self) -> str:
        return attention.IMPLEMENTATION if self._is_held else "sdpa"

    def _may_share(self, batch: Batch) -> bool:
        """Whether what all segments begin with may run once: see `shared_prefix`, which looks at tokens alone."""
        alike = not batch.extra and not (self._noise and self.training) and batch.streams["input"].type_ids_BT is None
        if not (self.packed and self.share_prefixes and self.kind == "decoder" and alike):
            return False
        if self._serves is None:  # a walk over every module: 9 ms of a large model
            self._serves = shared_prefix.serves(self.model)
        return self._serves

    def _forward(self, **inputs: Any) -> Tensor:
        """Last hidden states below the output projection: [B, T, D]."""
        if self.kind == "encoder-decoder":
            return self._encode_decode(**inputs)
        return self._backbone()(**inputs, **self._no_cache).last_hidden_state

    @property
    def _no_cache(self) -> dict[str, bool]:
        return {} if self.kind == "encoder" else {"use_cache": False}

    def _encode_decode(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The two halves one after the other: T5 has no module that holds both and no projection."""
        encoded = self.model.get_encoder()(attention_mask=attention_mask, **inputs)
        decoded = self.model.get_decoder()(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return decoded.last_hidden_state

    def _backbone(self) -> Any:
        """The model below its output projection; a model without one is its own backbone."""
        return self.model if self.model.get_output_embeddings() is None else self.model.base_model

    def _projection(self) -> dict[str, Any]:
        return projection(self.model, self.kind)

    def _context(self) -> int | None:
        """Positions that the model knows; None where they are relative, or the prompt has a side of its own."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None or self.kind != "decoder" else int(positions)

    def _attention(self, implementation: str) -> None:
        if getattr(self.config, "_attn_implementation", None) != implementation:
            self.model.set_attn_implementation(implementation)


def _bounds(batch: Batch) -> attention.Bounds:
    """Where the segments of a packed batch lie."""
    bounds = attention.Bounds([[] for _ in range(batch.streams["input"].input_ids_BT.shape[0])])
    for segment in batch.segments:
        bounds.rows[segment.row].append((segment.start, segment.stop))
    return bounds


def _as_it_is(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD


def _no_weights(folder: Path | None) -> dict[str, Tensor]:
    raise RuntimeError("this policy was made without files to read weights from")


def _inside(stream: Stream) -> Tensor:
    return (stream.segment_ids_BT >= 0).long()


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if k != key}
