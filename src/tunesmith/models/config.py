"""config.json reduced to what the model's own config class knows, before anything is built from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import compat
from tunesmith.errors import InputError, RefusedError
from tunesmith.models.folder import known_model_type, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger("tunesmith.models")

# Known to transformers, but the caller's to say or ways to another place: never a file's.
_NOT_FROM_A_FILE = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "transformers_version",
        "trust_remote_code",
    }
)
_OF_TWO_SIDES = frozenset({"decoder_start_token_id"})  # read of any encoder-decoder, and declared by few classes
_BOOKKEEPING = frozenset({"_name_or_path", "transformers_version", "torchscript", "gradient_checkpointing"})
_DTYPES = frozenset({"float32", "float16", "bfloat16", "float64"})


def safe_config(folder: Path) -> PreTrainedConfig:
    """The folder's config, from known keys only; what was dropped is logged, and `dropped_keys` lists it.

    Raises RefusedError for custom code or an unknown model type, InputError for quantised weights
    or values that the config class refuses.
    """
    kept, dropped = _filter(folder)
    if surprising := sorted(set(dropped) - _BOOKKEEPING):
        log.info("keys of %s that its model type does not know were dropped: %s", folder, ", ".join(surprising))
    config_class = compat.config_class(kept["model_type"])
    try:
        with compat.quiet_transformers():
            return config_class(**{key: value for key, value in kept.items() if key != "model_type"})
    except Exception as error:
        # Config classes validate with exceptions of several libraries; all of them mean a bad file.
        raise InputError(
            f"{folder / 'config.json'} is not a valid {kept['model_type']} config: {' '.join(str(error).split())}",
            "restore the file or fetch the model again",
        ) from error


def dropped_keys(folder: Path) -> list[str]:
    """Keys of config.json that are not used, nested ones dotted."""
    return _filter(folder)[1]


def _filter(folder: Path) -> tuple[dict[str, Any], list[str]]:
    path = folder / "config.json"
    if not path.is_file():
        raise RefusedError(f"{folder} has no config.json", "give the folder that save_pretrained wrote")
    raw = read_json(path)
    if raw.get("auto_map"):
        raise RefusedError(
            f"{path} asks for custom code by the key 'auto_map', which is never run", "use another model"
        )
    model_type = known_model_type(raw, path)
    if quantised := raw.get("quantization_config") or raw.get("compression_config"):
        how = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise InputError(f"the weights in {folder} are quantised ({how})", "use the unquantised base")
    return _known(raw, compat.config_class(model_type), "")


def _known(raw: dict[str, Any], config_class: type[Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """`raw` without what `config_class` does not read, sub-configs too, and the keys left out."""
    keys = (compat.config_keys(config_class) | {"model_type"}) - _NOT_FROM_A_FILE
    if raw.get("is_encoder_decoder"):
        keys |= _OF_TWO_SIDES
    nested: dict[str, type[Any]] = getattr(config_class, "sub_configs", {}) or {}
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in raw.items():
        if key not in keys or (key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in _DTYPES):
            dropped.append(prefix + key)
        elif key in nested and isinstance(value, dict):
            inner = _nested_class(nested[key], value)
            if inner is None:
                dropped.append(prefix + key)
                continue
            kept[key], below = _known(value, inner, f"{prefix}{key}.")
            dropped += below
        else:
            kept[key] = value
    return kept, sorted(dropped)


def _nested_class(declared: type[Any], value: dict[str, Any]) -> type[Any] | None:
    if hasattr(declared, "model_type"):
        return declared
    model_type = str(value.get("model_type"))
    return compat.config_class(model_type) if model_type in compat.model_types() else None
