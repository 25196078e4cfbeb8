"""A GGUF file, weights and tokenizer, becomes a folder of fp32 safetensors; the same bytes every time."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import compat
from tunesmith.errors import InputError, RefusedError, ResourceError
from tunesmith.models.cache import Progress, file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 2
"""Part of the key of what is cached: raise it when the folder that comes out changes."""

_AGAIN = "fetch the .gguf file again and compare its sha256 with the publisher's"


def check_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file; a damaged or truncated one is refused.

    Only scalar and string fields are returned, not the vocabulary.
    """
    from gguf import GGUFReader, GGUFValueType

    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RefusedError(f"{path} is not a GGUF file: it does not begin with GGUF", _AGAIN)
    try:
        reader = GGUFReader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != GGUFValueType.ARRAY
        }
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise RefusedError(f"{path} is truncated or damaged: {error}", _AGAIN) from error
    if not reader.tensors or end > size:
        raise RefusedError(f"{path} is truncated: {size:,} bytes, its tensors need {end:,}", _AGAIN)
    return fields


def convert_gguf(source: Path, to: Path, progress: Progress | None = None) -> str:
    """Write `source` as a transformers folder at `to`, which must not exist; returns the weights' sha256.

    The tokenizer, its chat template and the tokens that end a turn are kept. Raises RefusedError
    for a damaged file, InputError for what transformers cannot convert, ResourceError for a full
    disk or too little memory.
    """
    fields = check_gguf(source)
    try:
        with compat.quiet_transformers():
            tokenizer = _tokenizer(source, fields)
            model = _model(source, fields, progress)
        _settle_tokens(model, tokenizer, fields)
        to.mkdir(parents=True)
        _write(model, tokenizer, to)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left to convert {source.name} in {to}", "free some disk space") from error
        raise
    except MemoryError as error:
        raise ResourceError(f"not enough memory to convert {source.name} to fp32", "use a smaller base") from error
    return file_sha256(to / "model.safetensors", progress, remember=False)


def _model(source: Path, fields: dict[str, Any], progress: Progress | None) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    def report(done: int, total: int) -> None:
        if progress:
            progress("convert", done, total)

    try:
        config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
        width = fields.get(f"{fields.get('general.architecture')}.attention.key_length")
        if width is not None and getattr(config, "head_dim", width) != width:
            config.head_dim = int(width)  # transformers leaves it out for Qwen3
        with compat.gguf_progress(report):
            return AutoModelForCausalLM.from_pretrained(
                str(source.parent),
                gguf_file=source.name,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
            )
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"transformers cannot convert {source.name}: {error}", "give the model's safetensors folder or hub id"
        ) from error


def _tokenizer(source: Path, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"transformers cannot convert the tokenizer of {source.name}: {error}",
            "give the model's safetensors folder or hub id",
        ) from error
    if fields.get("tokenizer.ggml.model") == "llama" and fields.get("tokenizer.ggml.add_space_prefix", True):
        # Before each stretch of text, behind special tokens too, as llama.cpp does; not at the beginning alone.
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.backend_tokenizer.pre_tokenizer = None
    split = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") == "gpt2" and split is not None:
        if split in compat.GGUF_SINGLE_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif split not in compat.gguf_splits().keys() | compat.GGUF_PLAIN_GPT2:
            # Another split would still give tokens, only not those the model was trained on.
            raise InputError(
                f"{source.name} splits text by the rule {split!r}, which this version cannot reproduce",
                f"{compat.gguf_remedy()}give the model's safetensors folder or hub id",
            )
    return tokenizer


def _settle_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, fields: Mapping[str, Any]) -> None:
    """Make config, generation config and tokenizer agree on which tokens begin, end and pad, as the file says."""
    for name in ("bos", "eos"):  # transformers 5.17 takes the first for both
        if (number := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(number)))
    model.config.architectures = [type(model).__name__]
    if tokenizer.model_max_length > model.config.max_position_embeddings:
        tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    assert model.generation_config is not None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    from safetensors.torch import save_file

    # Written by name and with fixed metadata, so that the bytes do not change with transformers.
    save_file(_distinct(model), str(to / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=True))
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    (to / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    assert model.generation_config is not None
    model.generation_config.save_pretrained(str(to))
    tokenizer.save_pretrained(str(to))
    # The name that every version of transformers knows, and nothing about the place of conversion.
    file = to / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for path in to.iterdir():
        path.chmod(0o644)


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in name order, tied weights once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    # The embedding's name stays and the head's goes, as in every published tied checkpoint.
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: (item[0] == "lm_head.weight", item[0])):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.contiguous()
    return kept
