"""What stands between a model's last hidden states and its logits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import RefusedError
from tunesmith.losses.linear_cross_entropy import linear_logprobs
from tunesmith.types import ModelKind


def projection(model: Any, kind: ModelKind) -> dict[str, Any]:
    """What `linear_logprobs` needs to turn what `before` returns into the model's log-probabilities."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    if kind == "encoder-decoder" and getattr(config, "tie_word_embeddings", False):
        scale *= config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", config.model_type == "t5") else 1.0
    return {
        "weight_VD": output.weight,
        "bias_V": getattr(output, "bias", None),
        "scale": scale,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def before(model: Any, kind: ModelKind, hidden_UD: Tensor) -> Tensor:
    """Hidden states as the projection takes them: of an encoder, through the other layers of its masked-language head.

    Those are the model's own modules beside its backbone, in their order (Devlin et al. 2019, arXiv 1810.04805: a
    dense layer, a non-linearity and a norm). `Policy.check_projection` refuses a model that joins them otherwise.
    """
    if kind != "encoder":
        return hidden_UD
    output = model.get_output_embeddings()
    with _passed_by(output):
        for module in model.children():
            if module is not model.base_model and module is not output:
                hidden_UD = module(hidden_UD)
    return hidden_UD


def check(model: Any, kind: ModelKind, forward: Callable[..., Tensor], no_cache: Mapping[str, bool]) -> None:
    """RefusedError where log-probabilities of what `forward` gives are not those of the model's own logits."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    ids = torch.tensor([[token % vocabulary for token in (3, 14, 15, 92, 65, 35)]]).to(device)
    inputs = {"decoder_input_ids": ids} if kind == "encoder-decoder" else {}
    with torch.no_grad():
        logits_TV = model(input_ids=ids, **no_cache, **inputs).logits[0].float()
        hidden_TD = before(model, kind, forward(input_ids=ids, **inputs)[0])
        ours_T, _ = linear_logprobs(hidden_TD, target_U=ids[0], **projection(model, kind))
        theirs_T = logits_TV.log_softmax(-1).gather(-1, ids[0][:, None])[:, 0]
    if not logits_TV.isfinite().all():
        raise RefusedError(
            f"the logits of {type(model).__name__} are not finite numbers: its weights are damaged",
            "fetch the model again",
        )
    error = float((ours_T - theirs_T).abs().max())
    if not error < (1e-3 if hidden_TD.dtype == torch.float32 else 0.2):
        raise RefusedError(
            f"{type(model).__name__} turns hidden states into logits in a way tunesmith does not know "
            f"(log-probabilities differ by {error:.3g})",
            "choose another base model, and report this one",
        )


@contextmanager
def _passed_by(module: nn.Module) -> Generator[None]:
    """Inside, the module returns what it is given."""
    module.forward = lambda given: given  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
