"""A safe local folder becomes a tokenizer, a backbone with its weights, or a backbone of shapes only."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tunesmith import compat
from tunesmith.errors import InputError, RefusedError, ResourceError
from tunesmith.models.config import dropped_keys, safe_config
from tunesmith.models.fetch import LocalModel
from tunesmith.models.folder import check_folder, tokenizer_files
from tunesmith.types import ModelKind

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

log = logging.getLogger("tunesmith.models")

Head = Literal["lm", "pooled"]
Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}  # as torch calls them

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Buffers that older checkpoints saved and models now compute.
_COMPUTED = re.compile(r"(position_ids|rotary_emb\.inv_freq|attn\.(masked_)?bias)$")
# Heads of other tasks, left out on purpose when only the backbone is wanted.
_OTHER_HEAD = re.compile(r"^(cls|lm_head|classifier|score|qa_outputs|pooler|.*\.pooler|head|decoder|.*predictions.*)\.")


@dataclass(frozen=True, slots=True)
class MetaModel:
    """A model without weights, and the facts a plan needs of it.

    `parameters` counts tied weights once; `embedding_parameters` is the input embedding's share.
    `context_length` is None where positions are relative and nothing sets a limit.
    """

    module: nn.Module
    model_type: str
    kind: ModelKind
    parameters: int
    embedding_parameters: int
    context_length: int | None
    tied_embeddings: bool
    vocab_size: int
    width: int
    layers: int
    dropped_keys: tuple[str, ...]


def load_tokenizer(local: LocalModel) -> PreTrainedTokenizerFast:
    """The folder's tokenizer as its tokenizer.json has it, without stored truncation or padding.

    Raises InputError when there is none that can be made fast.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = str(local.folder)
    try:
        with compat.quiet_transformers():
            if not (local.folder / "tokenizer.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, config=safe_config(local.folder), local_files_only=True
                )
            else:
                # Classes that rebuild a tokenizer from its vocabulary may split text differently.
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
                if tokenizer.pad_token is None or (tokenizer.eos_token is None and tokenizer.cls_token is None):
                    _name_special_tokens(tokenizer, local)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        held = ", ".join(path.name for path in tokenizer_files(local.folder)) or "no file of one"
        raise InputError(
            f"{folder} has no tokenizer that can be loaded ({type(error).__name__}); it holds {held}",
            "put tokenizer.json and tokenizer_config.json beside the weights",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"the tokenizer in {folder} has no fast form", "save it with a tokenizer.json")
    # Some published files carry a demo's limits: all-minilm-l6-v2 pads everything to 128 tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def load_backbone(
    local: LocalModel,
    dtype: Dtype,
    kind_of_head: Head,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    *,
    in_nf4: bool = False,
) -> nn.Module:
    """The model with its weights, in evaluation mode, every parameter from the checkpoint.

    "lm" has the language-model head (of an encoder: the one that fills masks), "pooled" ends at the last hidden
    states (a pooler that nothing would use is not built). `in_nf4`: linear layers are held in 4 bits, and the device
    never has all of them whole. Raises RefusedError when the checkpoint lacks weights of the model or has them in
    other shapes, InputError for a model that is none of text, ResourceError for memory.
    """
    import torch

    check_folder(local.folder)
    config = safe_config(local.folder)
    auto, extra = builder(config, kind_of_head)
    try:
        with compat.quiet_transformers():
            model, report = auto.from_pretrained(
                str(local.folder),
                config=config,
                dtype=getattr(torch, DTYPES[dtype]),
                attn_implementation=_checked_attention(attn_implementation),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that it names them, for `_judge` to refuse
                **extra,
            )
            _judge(report, local)
            if (start := decoder_start(local)) is not None:
                model.config.decoder_start_token_id = start
            if in_nf4:
                from tunesmith.kernels.nf4 import hold_in_nf4

                hold_in_nf4(model, device)
            return model.to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{local.name} does not fit in memory", "use bf16, a smaller base or another device"
        ) from error


def meta_model(local: LocalModel, head: Head) -> MetaModel:
    """The model on the meta device: its modules and shapes in well under a second, no weights read."""
    import torch

    config = safe_config(local.folder)
    auto, extra = builder(config, head)
    with compat.quiet_transformers(), torch.device("meta"):
        module = auto.from_config(config, dtype=torch.float32, **extra)
    text = config.get_text_config()
    embedding = module.get_input_embeddings().weight
    output = module.get_output_embeddings() if head == "lm" else None
    return MetaModel(
        module=module,
        model_type=str(config.model_type),
        kind=kind_of(config),
        parameters=sum(p.numel() for p in module.parameters()),
        embedding_parameters=embedding.numel(),
        context_length=context_length(config, local),
        tied_embeddings=output is not None and output.weight is embedding,
        vocab_size=int(text.vocab_size),
        width=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        dropped_keys=tuple(dropped_keys(local.folder)),
    )


def kind_of(config: PreTrainedConfig) -> ModelKind:
    """Decoder, encoder or encoder-decoder, from the model type; other kinds are refused."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if config.model_type in compat.encoder_types() and not getattr(config, "is_decoder", False):
        return "encoder"
    if config.model_type in compat.decoder_types():
        return "decoder"
    raise InputError(
        f"a model of type {config.model_type!r} is neither a text decoder, an encoder nor both",
        "use a text model; `tunesmith models` lists some",
    )


def decoder_start(local: LocalModel) -> int | None:
    """The token that the decoder of an encoder-decoder begins with; None for models of one side.

    Raises InputError where the config names none, and none that may stand for it.
    """
    config = safe_config(local.folder)
    if not config.is_encoder_decoder:
        return None
    named = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in named if token is not None), None)
    if start is None:
        raise InputError(
            f"config.json in {local.folder} names no token that the decoder begins with",
            "set decoder_start_token_id there",
        )
    return int(start)


def builder(config: PreTrainedConfig, head: Head) -> tuple[Any, dict[str, Any]]:
    """The Auto class for the head, and arguments of its constructor."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kind = kind_of(config)
    if head == "pooled":
        built = inspect.signature(compat.backbone_class(config).__init__).parameters
        return AutoModel, {"add_pooling_layer": False} if "add_pooling_layer" in built else {}
    with_head = {
        "decoder": AutoModelForCausalLM,
        "encoder": AutoModelForMaskedLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }
    return with_head[kind], {}


def _checked_attention(name: str) -> str:
    # transformers would download a kernel for a name with a slash.
    if "/" in name or ":" in name:
        raise InputError(f"attention {name!r} would fetch code from the hub", "use a registered name such as sdpa")
    return name


def _judge(report: dict[str, Any], local: LocalModel) -> None:
    """Refuse what would leave a layer random; say what of the checkpoint was not used."""
    mismatched: list[tuple[str, Any, Any]] = list(report.get("mismatched_keys") or [])
    if wrong := sorted(mismatched):
        name, held, wanted = wrong[0]
        raise RefusedError(
            f"{len(wrong)} weights in {local.folder} do not have the shapes that config.json says: "
            f"{name} is {list(held)}, not {list(wanted)}",
            "fetch the model again",
        )
    if missing := sorted(key for key in report.get("missing_keys") or () if not _COMPUTED.search(key)):
        raise RefusedError(
            f"the checkpoint in {local.folder} lacks {len(missing)} weights of the model, which would be random: "
            f"{', '.join(missing[:5])}",
            "fetch the model again, or use a checkpoint that has them",
        )
    unexpected = sorted(str(key) for key in report.get("unexpected_keys") or ())
    if surprising := [key for key in unexpected if not _COMPUTED.search(key) and not _OTHER_HEAD.match(key)]:
        log.warning("%d weights in %s are not used: %s", len(surprising), local.folder, ", ".join(surprising[:5]))
    elif unexpected:
        log.info("weights of other heads in %s are not used: %s", local.folder, ", ".join(unexpected[:5]))


def context_length(config: PreTrainedConfig, local: LocalModel) -> int | None:
    """Tokens that the model sees; None where positions are relative and nothing sets a limit."""
    limits: list[int] = [local.entry.context] if local.entry else []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions:
        limits.append(int(positions) - compat.positions_before_text(config))
    return min(limits, default=None)


def _name_special_tokens(tokenizer: PreTrainedTokenizerFast, local: LocalModel) -> None:
    """Old checkpoints leave the names of special tokens to the model's tokenizer class; take them from it."""
    from transformers import AutoTokenizer

    named = AutoTokenizer.from_pretrained(str(local.folder), config=safe_config(local.folder), local_files_only=True)
    vocabulary = tokenizer.get_vocab()
    for name in _SPECIAL_TOKENS:
        token = getattr(named, name, None)
        if getattr(tokenizer, name) is None and token is not None and str(token) in vocabulary:
            setattr(tokenizer, name, token)
