"""A language model and its tokenizer become one GGUF file, as llama.cpp and what is built on it load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.errors import InputError
from tunesmith.models.gguf_tokenizer import add_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gguf import GGUFWriter
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

# llama.cpp reads Mistral with its graph of Llama.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


def check_model(model: PreTrainedModel) -> None:
    """Raises InputError for what a GGUF file of these architectures cannot say."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"no GGUF is written of a {config.model_type} model: it is of {', '.join(ARCHITECTURES)}",
            "export a folder instead",
        )
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    slides = getattr(config, "use_sliding_window", config.model_type == "mistral")
    if slides and window is not None and window < context:
        raise InputError(
            f"this model attends to the last {window:,} tokens only, which GGUF's {ARCHITECTURES[config.model_type]} "
            "architecture cannot say",
            "export a folder instead",
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if biased or config.hidden_act != "silu":
        what = f"{biased[0]} set" if biased else f"{config.hidden_act} in its layers"
        raise InputError(f"GGUF's {config.model_type} models have no {what}", "export a folder instead")
    scaling = _rope(config).get("rope_type", "default")
    if scaling not in ("default", "llama3"):
        raise InputError(f"no GGUF is written of positions scaled by {scaling}", "export a folder instead")


def write_gguf(
    model: PreTrainedModel, tokenizer: Any, template: str | None, end_ids: Sequence[int], to: Path, dtype: str
) -> None:
    """Writes `to`, whose stem names the model; matrices are of `dtype` (a key of TYPES), vectors of fp32.

    `template` is the chat template, `end_ids` the tokens that end an answer, the template's own first.
    Raises InputError for what `check_model` refuses and for a tokenizer that GGUF has no name for.
    """
    from gguf import GGUFWriter

    check_model(model)
    writer = GGUFWriter(to, ARCHITECTURES[model.config.model_type])
    try:
        writer.add_name(to.stem)
        _add_config(writer, model.config)
        add_tokenizer(writer, tokenizer, model.config.vocab_size, template, end_ids)
        _add_tensors(writer, model, TYPES[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_config(writer: GGUFWriter, config: Any) -> None:
    width = _head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)


def _add_tensors(writer: GGUFWriter, model: PreTrainedModel, kind: str) -> None:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    known = {called: key for key, called in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(MODEL_ARCH(known[architecture]), config.num_hidden_layers)
    output: Any = model.get_output_embeddings()
    tied = output.weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise InputError(f"GGUF's {architecture} architecture has no tensor {name}", "export a folder instead")
        if architecture == "llama":
            tensor = _interleaved(name, tensor, config)
        values = tensor.detach().float().cpu().numpy()
        stored = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        _add(writer, called, values, stored)
    factors = _frequency_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)


def _add(writer: GGUFWriter, name: str, values: NDArray[np.float32], kind: Any) -> None:
    from gguf import GGMLQuantizationType, quants

    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
        return
    if kind == GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:  # its blocks are of 32
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """ggml turns neighbouring pairs of a head, transformers its two halves: rows of q and k change places."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _frequency_factors(config: Any) -> NDArray[np.float32] | None:
    """By how much Llama 3.1 slows each frequency of rotary positions down; None where it does not."""
    if _rope(config).get("rope_type", "default") == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = _head_width(config)
    plain = float(_rope(config)["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / slowed.double().numpy()).astype(np.float32)
