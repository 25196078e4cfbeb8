"""What a recipe calls a model becomes a safe local folder: catalog name, hub id, folder or .gguf file."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError, ResourceError
from tunesmith.models import convert
from tunesmith.models.cache import Progress, cache_dir, file_sha256, files_sha256
from tunesmith.models.catalog import Entry, catalog, entry_named, entry_of_hub_id, unknown_model
from tunesmith.models.folder import check_folder, licence_of, tokenizer_files
from tunesmith.models.package import MANIFEST, fetch_package, held, is_whole, package_folder, settle

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
# Sub-folders hold other formats; consolidated.* repeats the weights in Mistral's own layout.
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A base on this machine. `resolve(local.name)` finds the same one again.

    `sha256` is over the weight files in name order and `tokenizer_sha256` over the tokenizer's
    (see `cache.files_sha256`); `source` says in words where they came from.
    """

    name: str
    folder: Path
    sha256: str
    tokenizer_sha256: str
    licence: str | None
    source: str
    entry: Entry | None


def resolve(model: str, progress: Progress | None = None) -> LocalModel:
    """Find `model`, fetching and converting it on first use, and refuse what is unsafe to load.

    A path is looked for first, except that a catalog name or a hub id the catalog knows always
    means that model. Raises InputError, RefusedError or ResourceError.
    """
    if entry := entry_named(model):
        return _from_package(entry, progress) if entry.package else _from_hub(entry.hub_id, entry, model, progress)
    if entry := entry_of_hub_id(model):
        return _from_hub(model, entry, model, progress)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _from_gguf(path.absolute(), progress)
    if path.is_dir():
        return _local(str(path.absolute()), path.absolute(), None, f"the folder {path.absolute()}", progress)
    if path.is_file():
        raise InputError(f"{model} is neither a folder nor a .gguf file", "give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or os.path.isabs(model) or model.lower().endswith(".gguf"):
        raise InputError(f"there is no {path.absolute()}", "check the path")
    if _HUB_ID.match(model):
        return _from_hub(model, None, model, progress)
    raise unknown_model(model)


def list_models() -> list[dict[str, Any]]:
    """The catalog as rows: name, kind, parameters, context, licence, cached, where."""
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "parameters": entry.parameters,
            "context": entry.context,
            "licence": entry.licence,
            "cached": _is_cached(entry),
            "where": f"pip: {entry.package.package} {entry.package.version}"
            if entry.package
            else f"hub: {entry.hub_id}",
        }
        for entry in catalog().models
    ]


def _local(name: str, folder: Path, entry: Entry | None, source: str, progress: Progress | None) -> LocalModel:
    weights = check_folder(folder)
    tokenizer = tokenizer_files(folder)
    return LocalModel(
        name=name,
        folder=folder,
        sha256=files_sha256(weights, progress),
        tokenizer_sha256=files_sha256(tokenizer),
        licence=entry.licence if entry else licence_of(folder),
        source=source,
        entry=entry,
    )


def _from_package(entry: Entry, progress: Progress | None) -> LocalModel:
    folder = fetch_package(entry, progress)
    copy = entry.package
    assert copy is not None
    made = ", dequantised to fp32" if copy.is_gguf else ""
    source = f"{Path(copy.weights).name} in the Python package {copy.package} {copy.version}{made}"
    return _local(entry.name, folder, entry, source, progress)


def _from_gguf(path: Path, progress: Progress | None) -> LocalModel:
    sha256 = file_sha256(path, progress)
    folder = cache_dir() / "models" / f"gguf-{sha256[:24]}-v{convert.VERSION}"
    if not is_whole(folder, progress):
        with held(folder, progress):
            if not is_whole(folder, progress):
                aside = folder.with_name(f".{folder.name}.new")
                shutil.rmtree(aside, ignore_errors=True)
                try:
                    convert.convert_gguf(path, aside, progress)
                    settle(aside, folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    return _local(str(path), folder, None, f"the file {path}, dequantised to fp32", progress)


def _from_hub(hub_id: str, entry: Entry | None, name: str, progress: Progress | None) -> LocalModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if progress:
        progress("download", 0, 0)
    named = entry.name if entry and entry.package else None
    copies = ", ".join(known.name for known in catalog().models if known.package)
    elsewhere = f"give a folder that holds the model, or the catalog name {named or copies}, which pip fetches"
    try:
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except GatedRepoError as error:
        raise InputError(
            f"{hub_id} asks for consent on the hub before it can be downloaded",
            f"accept its terms at https://huggingface.co/{hub_id} and run `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"the hub has no model {hub_id!r} that you may read", f"check the name, or {elsewhere}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        cause = f"the hub could not be reached for {hub_id}: {_first_line(error)}"
        raise ResourceError(cause, f"try again with a network, or {elsewhere}") from error
    return _local(name, Path(folder), entry, f"the hub's {hub_id} at {Path(folder).name[:12]}", progress)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_cached(entry: Entry) -> bool:
    if entry.package:
        return (package_folder(entry) / MANIFEST).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(entry.hub_id, "config.json"), str)
