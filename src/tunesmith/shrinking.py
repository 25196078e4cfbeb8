"""A smaller model from some of a base's layers: a student to distil into, or to train as it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith import __version__, rundir
from tunesmith.compat import quiet_transformers
from tunesmith.errors import InputError, RefusedError
from tunesmith.models.fetch import LocalModel, resolve
from tunesmith.models.folder import SHRUNK, tokenizer_files
from tunesmith.models.layers import stacks, whole_state
from tunesmith.models.load import Dtype, Head, kind_of, load_backbone
from tunesmith.models.saved import CARD, folder_of, read_card

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of hidden states, relative to the largest


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The new folder, which layers of the base it has (counted from 0), and its parameters."""

    path: Path
    layers: tuple[int, ...]
    parameters: int


def shrink(model: str, layers: int | Sequence[int], to: Path) -> Shrunk:
    """Writes a folder of transformers with some layers of `model`: so many, evenly spread, or these.

    The first and the last are among those that are spread, as in DistilBERT's start (arXiv 1910.01108, section 3)
    for every second layer. What is written is loaded again and must compute what those layers compute. InputError for
    layers that there are not, or a model of two stacks; RefusedError where the folder computes something else.
    """
    rundir.check_free(to)
    local = _source(model)
    from tunesmith.models.config import safe_config

    config = safe_config(local.folder)
    kind = kind_of(config)
    if kind == "encoder-decoder":
        raise InputError(
            f"{model} has a stack of layers on each side, and shrink takes layers of one",
            "name a decoder or an encoder",
        )
    head: Head = "lm" if kind == "decoder" else "pooled"
    dtype: Dtype = "fp32" if config.dtype in (None, torch.float32) else "bf16"
    whole: Any = load_backbone(local, dtype, head)
    found = stacks(whole)
    text = whole.config.get_text_config()
    if len(found) != 1 or len(next(iter(found.values()))) != text.num_hidden_layers:
        raise InputError(f"{model} is not one stack of {text.num_hidden_layers} layers", "choose another base")
    ((name, stack),) = found.items()
    chosen = _chosen(layers, len(stack))
    _keep(whole, name, stack, chosen)
    _describe(text, len(stack), chosen)
    with rundir.replace_folder(to) as folder:
        with quiet_transformers():
            whole.save_pretrained(folder, state_dict=whole_state(whole))
        for file in tokenizer_files(local.folder):
            shutil.copyfile(file, folder / file.name)
        told = {"of": local.name, "sha256": local.sha256, "layers": chosen, "licence": local.licence}
        rundir.write_json(folder / SHRUNK, {"tunesmith": __version__, **told})
        _check(whole, folder, dtype, head)
    return Shrunk(to, tuple(chosen), sum(p.numel() for p in whole.parameters()))


def _source(model: str) -> LocalModel:
    """The base, or a run's whole model."""
    path = Path(model).expanduser()
    if any((place / CARD).is_file() for place in (path, path / "model")):
        folder = folder_of(path)
        method = read_card(folder)["method"]["name"]
        if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{model} is an adapter by {method}, whose base has the layers",
                f"make it a whole model first: `tunesmith export {model} --merge --to DIR`",
            )
        return resolve(str(folder))
    return resolve(model)


def _chosen(layers: int | Sequence[int], count: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers < count:
            raise InputError(
                f"{layers} of {count} layers make no smaller model", f"give a number from 1 to {count - 1}"
            )
        return [round(i * (count - 1) / max(1, layers - 1)) for i in range(layers)]
    found = list(layers)
    if not found or sorted(set(found)) != found or not 0 <= found[0] <= found[-1] < count or len(found) == count:
        raise InputError(
            f"layers {', '.join(map(str, found)) or '(none)'} are no smaller model of {count} layers",
            f"name some of 0 to {count - 1}, each once and in their order",
        )
    return found


def _keep(whole: nn.Module, name: str, stack: nn.ModuleList, chosen: Sequence[int]) -> None:
    """Puts the chosen layers in place of all; each knows its new place."""
    kept = nn.ModuleList(stack[i] for i in chosen)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    above, _, last = name.rpartition(".")
    setattr(whole.get_submodule(above), last, kept)


def _describe(config: Any, count: int, chosen: Sequence[int]) -> None:
    """The config of so few layers: every list with an entry a layer keeps those of the chosen ones."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:  # pyright: ignore[reportUnknownArgumentType]
            setattr(config, key, [value[i] for i in chosen])
    config.num_hidden_layers = len(chosen)


def _check(whole: Any, folder: Path, dtype: Dtype, head: Head) -> None:
    """Raises RefusedError where the folder, loaded as anybody would, computes something else than these layers."""
    again: Any = load_backbone(resolve(str(folder)), dtype, head)
    ids = torch.arange(3, 19)[None] % whole.config.get_text_config().vocab_size
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids)[0].float() for model in (whole, again))
    apart = float((ours - theirs).abs().max() / ours.abs().max())
    if not apart <= TOLERANCE[whole.dtype]:
        raise RefusedError(
            f"{type(whole).__name__} of these layers computes something else once it is loaded again "
            f"(relative difference {apart:.2g}): what a layer does depends on its place in this family",
            "choose other layers, or another base",
        )
