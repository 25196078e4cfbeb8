"""Backbone and heads in one module: the one forward that training, evaluation and serving share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import RefusedError
from tunesmith.kernels import attention, shared_prefix
from tunesmith.losses.linear_cross_entropy import linear_logprobs
from tunesmith.models.heads import Head, pool
from tunesmith.models.sample import generate
from tunesmith.types import Batch, Completion, ModelKind, SampleSpec, Scores, Stream, Want

# Families whose position embeddings begin after the padding index (RoBERTa, arXiv 1907.11692).
OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "mpnet"}
)


WeightsOf = Callable[[Path | None], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids that a policy needs to know: what ends an answer, what pads a row, and what was added."""

    end: tuple[int, ...]
    pad: int
    added: tuple[int, ...] = ()


class Policy(nn.Module):
    """A model of transformers, its fresh heads, and how a batch goes through them.

    `packed` says that attention can be held inside segments, so that a batch is one row without
    padding; else each piece has a padded row. `pooling` is how a segment becomes one vector.
    `autocast` is the dtype of matrix products, None for the weights' own. `share_prefixes`: what all
    segments of a row begin with is computed once, where that changes nothing. `weights` reads the base's state, or that
    of a folder that its `save_pretrained` wrote, from disk, for methods that change it.
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
        self.asked = 0  # attention calls of the last packed forward
        self.weights: WeightsOf = _no_weights
        self.heads = nn.ModuleDict()
        self._position_offset = int(self.config.pad_token_id) + 1 if self.config.model_type in OFFSET_POSITIONS else 0
        if packed:
            attention.register()
        self._attention(attention.IMPLEMENTATION if packed else "sdpa")

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
            if want.logprobs or want.entropy or want.values:
                self._score_units(batch, want, hidden_BTD, scores)
        return scores

    def sample(self, prompts: Sequence[Sequence[int]], spec: SampleSpec) -> list[Completion]:
        """Completions of `prompts`, in their order; end tokens are cut off."""
        self._attention("sdpa")  # generation pads left and keeps a cache: segments do not apply
        try:
            with self.precision():
                return generate(self.model, prompts, spec, self.tokens.end, self.tokens.pad, self._context())
        finally:
            self._attention(attention.IMPLEMENTATION if self.packed else "sdpa")

    def check_projection(self) -> None:
        """Compares this class's log-probabilities with the model's own logits on a few tokens.

        Raises RefusedError where they differ: a scale or cap between the last hidden state and
        the logits that `OutputProjection` does not know would silently train a wrong loss.
        """
        ids = torch.tensor([[t % self.config.get_text_config().vocab_size for t in (3, 14, 15, 92, 65, 35)]]).to(
            self.device
        )
        training = self.training
        self.eval()
        self._attention("sdpa")
        with torch.no_grad():
            inputs = {"decoder_input_ids": ids} if self.kind == "encoder-decoder" else {}
            logits_TV = self.model(input_ids=ids, use_cache=False, **inputs).logits[0].float()
            hidden_TD = self._forward(input_ids=ids, **inputs)[0]
            projection = self._projection()
            ours_T, _ = linear_logprobs(hidden_TD, projection["weight_VD"], ids[0], **_without(projection, "weight_VD"))
            theirs_T = logits_TV.log_softmax(-1).gather(-1, ids[0][:, None])[:, 0]
        self._attention(attention.IMPLEMENTATION if self.packed else "sdpa")
        self.train(training)
        if not logits_TV.isfinite().all():
            raise RefusedError(
                f"the logits of {type(self.model).__name__} are not finite numbers: its weights are damaged",
                "fetch the model again",
            )
        error = float((ours_T - theirs_T).abs().max())
        if not error < (1e-3 if hidden_TD.dtype == torch.float32 else 0.2):
            raise RefusedError(
                f"{type(self.model).__name__} turns hidden states into logits in a way tunesmith does not know "
                f"(log-probabilities differ by {error:.3g})",
                "choose another base model, and report this one",
            )

    def _score_units(self, batch: Batch, want: Want, hidden_BTD: Tensor, scores: Scores) -> None:
        unit_U = batch.weight_BT.flatten().nonzero()[:, 0]
        hidden_UD = hidden_BTD.flatten(0, 1).index_select(0, unit_U)
        stream = batch.streams["decoder" if "decoder" in batch.streams else "input"]
        segment_U = stream.segment_ids_BT.flatten()[unit_U]
        example_S = torch.tensor([s.example for s in batch.segments], device=segment_U.device)
        scores.weight_U = batch.weight_BT.flatten()[unit_U]
        scores.example_U = example_S[segment_U]
        if want.logprobs or want.entropy:
            projection = self._projection()
            scores.logprob_U, scores.entropy_U = linear_logprobs(
                hidden_UD,
                projection["weight_VD"],
                batch.target_BT.flatten()[unit_U],
                entropy=want.entropy,
                **_without(projection, "weight_VD"),
            )
        if want.values:
            scores.value_U = self.heads["value"](hidden_UD)[:, 0]

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, D] of the decoder stream if there is one, else of the input."""
        stream = batch.streams["input"]
        inputs: dict[str, Any] = {"input_ids": stream.input_ids_BT}
        if self.kind == "encoder-decoder":
            decoder = batch.streams["decoder"]
            inputs |= {
                "attention_mask": _inside(stream),
                "decoder_input_ids": decoder.input_ids_BT,
                "decoder_attention_mask": _inside(decoder),
            }
            return self._forward(**inputs, **batch.extra)
        inputs["position_ids"] = stream.position_ids_BT + self._position_offset
        if not self.packed:
            return self._forward(attention_mask=_inside(stream), **inputs, **batch.extra)
        prefix = shared_prefix.find(stream, batch.segments) if self._may_share(batch) else None
        if prefix is not None:
            inputs = {name: prefix.shorten(value) for name, value in inputs.items()}
            bounds = prefix.bounds
        else:
            bounds = attention.Bounds([[] for _ in range(stream.input_ids_BT.shape[0])])
            for segment in batch.segments:
                bounds.rows[segment.row].append((segment.start, segment.stop))
        hidden_BTD = self._forward(**inputs, **batch.extra, **{attention.KEYWORD: bounds})
        self.asked = bounds.calls
        if not self.asked:
            raise RuntimeError(f"{type(self.model).__name__} never asked for segment bounds; its plan must not pack")
        return hidden_BTD if prefix is None else prefix.restore(hidden_BTD)

    def _may_share(self, batch: Batch) -> bool:
        """Whether what all segments begin with may run once: see `shared_prefix`."""
        return self.share_prefixes and self.kind == "decoder" and not batch.extra and shared_prefix.serves(self.model)

    def _forward(self, **inputs: Any) -> Tensor:
        """Last hidden states below the output projection: [B, T, D]."""
        if self.kind == "encoder-decoder":
            return self._encode_decode(**inputs)
        cache = {"use_cache": False} if self.kind == "decoder" else {}
        return self._backbone()(**inputs, **cache).last_hidden_state

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
        """What `linear_logprobs` needs to turn hidden states into the model's log-probabilities."""
        output = self.model.get_output_embeddings()
        config = self.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        if self.kind == "encoder-decoder" and getattr(config, "tie_word_embeddings", False):
            scale *= (
                config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", config.model_type == "t5") else 1.0
            )
        return {
            "weight_VD": output.weight,
            "bias_V": getattr(output, "bias", None),
            "scale": scale,
            "softcap": getattr(config, "final_logit_softcapping", None),
        }

    def _context(self) -> int | None:
        """Positions that the model knows; None where they are relative, or the prompt has a side of its own."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None or self.kind != "decoder" else int(positions)

    def _attention(self, implementation: str) -> None:
        if getattr(self.config, "_attn_implementation", None) != implementation:
            self.model.set_attn_implementation(implementation)


def _no_weights(folder: Path | None) -> dict[str, Tensor]:
    raise RuntimeError("this policy was made without files to read weights from")


def _inside(stream: Stream) -> Tensor:
    return (stream.segment_ids_BT >= 0).long()


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if k != key}
