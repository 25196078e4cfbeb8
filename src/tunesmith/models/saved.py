"""A trained model's folder: the card that says what it is, and whether its files are as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import InputError, RefusedError
from tunesmith.models.cache import file_sha256
from tunesmith.rundir import read_json

CARD = "tunesmith.json"
KEYS = ("base", "method", "objective", "files")
_REMEDY = "restore the folder from a copy, or train again"


def folder_of(path: Path) -> Path:
    """Where a run has its model, or an exported one's own folder. InputError where there is none (yet)."""
    folder = path / "model" if (path / "model" / CARD).is_file() else path
    if not (folder / CARD).is_file():
        if (path / "manifest.json").is_file():
            raise InputError(f"{path} is a run that has no model yet", f"finish it with `tunesmith resume {path}`")
        what = "holds no model of tunesmith" if path.exists() else "is not there"
        raise InputError(f"{path} {what}", "give a run's folder")
    return folder


def read_card(folder: Path) -> dict[str, Any]:
    """The card. RefusedError where it, or a file that was saved with it, is not as it was."""
    card = read_json(folder / CARD)
    if lacking := [key for key in KEYS if key not in card]:
        raise RefusedError(f"{folder / CARD} is damaged: it lacks {', '.join(lacking)}", _REMEDY)
    for name, digest in card["files"].items():
        path = folder / name
        if not path.is_file():
            raise RefusedError(f"{path} is missing", _REMEDY)
        if file_sha256(path) != digest:
            raise RefusedError(f"{path} is damaged: its sha256 is not the one that was saved", _REMEDY)
    return card
