"""Adapters that stay in use, frozen, beneath the one that trains: found on disk, and kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.models.saved import folder_of, read_card

FOLDER = "beneath"  # in a model's folder; one folder of PEFT each, counted from the base up
FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class Beneath:
    """One such adapter: its folder of PEFT, and what its card says. `sha256` is of its weights."""

    name: str
    path: str
    folder: Path
    method: str
    head: str
    base: str
    base_sha256: str
    tokens: tuple[str, ...]
    sha256: str

    def told(self) -> dict[str, str]:
        """What plan, manifest and card say of it."""
        return {"name": self.name, "method": self.method, "sha256": self.sha256}


def find(paths: Sequence[str], base: Path) -> tuple[Beneath, ...]:
    """The adapters of runs or folders from the base up, each after those that it stands on itself.

    Raises InputError where there is none, or one comes twice; RefusedError where a file is not as it was saved.
    """
    found: dict[str, Beneath] = {}
    for path in paths:
        folder = folder_of((base / path).resolve())
        card = read_card(folder)
        method = card["method"]["name"]
        if not (folder / FILES[0]).is_file():
            raise InputError(
                f"adapters: {path} is by {method}, which leaves no adapter of PEFT to stand on",
                "go on from it as `model`, or from its export with --merge",
            )
        own = _of(path, name_of(folder), folder, card, method, card["files"][FILES[0]])
        for one in (*held(folder, card), own):
            if one.sha256 in found:
                raise InputError(
                    f"adapters: {path} brings {one.name}, which {found[one.sha256].path} has brought already",
                    "name each adapter once: one that stands on others brings them along",
                )
            found[one.sha256] = one
    return tuple(found.values())


def held(folder: Path, card: Mapping[str, Any]) -> list[Beneath]:
    """Those that a saved model stands on, from the base up; they are part of its folder."""
    return [
        _of(str(folder), told["name"], folder / told["folder"], card, told["method"], told["sha256"])
        for told in card.get(FOLDER, ())
    ]


def save(adapters: Sequence[Beneath], to: Path) -> list[dict[str, str]]:
    """Copies them byte for byte into a model's folder; returns what its card says of them."""
    told: list[dict[str, str]] = []
    for place, one in enumerate(adapters, 1):
        folder = to / FOLDER / f"{place:02}-{one.name}"
        folder.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(one.folder / name, folder / name)
        told.append({**one.told(), "folder": folder.relative_to(to).as_posix()})
    return told


def elements(adapters: Sequence[Beneath]) -> int:
    """How many parameters they have; no weights are read."""
    import math

    from safetensors import safe_open

    count = 0
    for one in adapters:
        with safe_open(one.folder / FILES[0], "numpy") as tensors:
            count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return count


def _of(path: str, name: str, folder: Path, card: Mapping[str, Any], method: str, sha256: str) -> Beneath:
    base, tokens = card["base"], tuple(card.get("tokens", ()))
    return Beneath(name, path, folder, method, card["head"], base["name"], base["sha256"], tokens, sha256)


def name_of(path: Path) -> str:
    """What a run, its model/, or an exported folder is called."""
    absolute = path.absolute()
    return absolute.parent.name if absolute.name == "model" else absolute.name
