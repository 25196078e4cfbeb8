"""Is this folder safe to load? Which of its files are the weights, and are they whole?"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tunesmith import compat
from tunesmith.errors import RefusedError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
SHRUNK = "shrunk.json"  # beside the weights that `tunesmith shrink` wrote: of which base, and its licence
# A key that names code to import, in the file where transformers would look for it.
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_NARROW = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")  # quantised: wrong by a scale unless their format is known
_MAX_HEADER = 100_000_000
_SAFE_COPY = "save the weights as safetensors (save_pretrained does) or take a base from `tunesmith models`"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; anything else is refused."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is not valid JSON: {error}", "restore the file or fetch the model again") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{path} does not hold a JSON object", "restore the file or fetch the model again")
    return value


def check_folder(folder: Path) -> list[Path]:
    """The safetensors files that make up the weights, after everything unsafe has been refused.

    Raises RefusedError for a folder without config.json, an unknown model type, custom code, only
    pickled weights, or a weight file that is not whole.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise RefusedError(
                f"{folder} holds an adapter, not a base model: it has no config.json",
                "give the folder of the run that trained it, or the base as the model",
            )
        raise RefusedError(f"{folder} has no config.json", "give the folder that save_pretrained wrote")
    if (folder / "adapter_config.json").is_file():
        # transformers would follow the adapter to another base, named by this file.
        raise RefusedError(
            f"{folder} holds adapter_config.json beside config.json",
            "move the adapter's files to a folder of their own",
        )
    _refuse_code(folder)
    known_model_type(read_json(config_file), config_file)
    weights = weight_files(folder)
    for path in weights:
        check_safetensors(path)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files transformers would load, in name order: the index's shards, or the one file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = read_json(index).get("weight_map")
        names = sorted({str(name) for name in mapping.values()}) if isinstance(mapping, dict) else []
        if not names:
            raise RefusedError(f"{index} names no shards", "fetch the model again")
        for name in names:
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise RefusedError(f"{index} names a file outside its folder: {name!r}", "fetch the model again")
            if not (folder / name).is_file():
                raise RefusedError(f"{folder} lacks {name}, which {index.name} names", "fetch the model again")
        return [folder / name for name in names]
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    if pickles := [name for name in present if name.endswith(PICKLES)]:
        raise RefusedError(
            f"the weights in {folder} are pickles ({', '.join(pickles[:3])}), which can run code when loaded",
            _SAFE_COPY,
        )
    if others := [name for name in present if name.endswith(".safetensors")]:
        raise RefusedError(
            f"{folder} has no model.safetensors; transformers would not load {', '.join(others[:3])}",
            "rename the file to model.safetensors, or add model.safetensors.index.json",
        )
    raise RefusedError(f"{folder} has no weights", _SAFE_COPY)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that define the tokenizer, in name order."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def licence_of(folder: Path) -> str | None:
    """That of the base which a shrunk model was made of; None where the folder does not say."""
    if not (folder / SHRUNK).is_file():
        return None
    told = read_json(folder / SHRUNK).get("licence")
    return None if told is None else str(told)


def check_safetensors(path: Path) -> None:
    """Refuse a file that is not whole safetensors: header, offsets and size must agree.

    This finds truncation and disguised pickles in microseconds; a flipped bit only the sha256 finds.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            disguise = _disguise(start)
            cause = f"{path} is not safetensors{disguise}" if disguise else f"{path} is truncated or not safetensors"
            raise RefusedError(cause, _SAFE_COPY)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        used = _covered(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{path} has a damaged safetensors header: {error}", "fetch the model again") from error
    if narrow := next((n for n, info in header.items() if n.endswith("weight") and info["dtype"] in _NARROW), None):
        raise RefusedError(
            f"{path} holds weights of 8 bits, such as {narrow}, without saying what they stand for",
            "use the unquantised base",
        )
    if used != size - 8 - length:
        raise RefusedError(
            f"{path} is truncated or has trailing bytes: {size - 8 - length:,} bytes of tensors, {used:,} expected",
            "fetch the model again",
        )


def _covered(header: dict[str, Any]) -> int:
    """Bytes that the tensors of a header take, once they are seen to lie end to end."""
    spans: list[tuple[int, int]] = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = (int(x) for x in info["data_offsets"])
        shape = [int(n) for n in info["shape"]]
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * _DTYPE_BYTES[info["dtype"]]:
            raise ValueError(f"tensor {name!r} has offsets that do not fit its shape")
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError("tensors overlap or leave gaps")
        at = end
    return at


def _disguise(start: bytes) -> str:
    if start[:1] == b"\x80":
        return " but a pickle under that name"
    if start[:4] == b"PK\x03\x04":
        return " but a zip archive (torch.save) under that name"
    return ""


def _refuse_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        for key in _CODE_KEYS:
            if content.get(key):
                raise RefusedError(
                    f"{path} asks for custom code by the key {key!r}, which is never run",
                    "use a model whose architecture transformers has built in; `tunesmith models` lists some",
                )


def known_model_type(config: dict[str, Any], where: Path) -> str:
    """The `model_type` of a config.json; one that transformers does not have built in is refused."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in compat.model_types():
        raise RefusedError(
            f"{where} has model_type {model_type!r}, which transformers does not have built in",
            "upgrade transformers if the architecture is new; code from a model folder is never run",
        )
    return model_type
