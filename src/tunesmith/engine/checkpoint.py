"""Checkpoints: safetensors and JSON, written aside, fsynced, renamed, the manifest of hashes last."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from tunesmith import rundir
from tunesmith.engine.snapshot import safetensors
from tunesmith.errors import RefusedError

STEP = re.compile(r"step-(\d{6,})")
Files = Mapping[str, bytes | memoryview]  # what each file of a checkpoint holds, by name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: the step after which it was taken, and where it lies."""

    step: int
    path: Path


def write(folder: Path, step: int, states: Mapping[str, Mapping[str, Any]]) -> Checkpoint:
    """Saves each named state (tensors and JSON values, nested mappings allowed) after `step`, at once."""
    return put(folder, step, snapshot(states))


def snapshot(states: Mapping[str, Mapping[str, Any]]) -> Files:
    """What the files of a checkpoint hold of each named state as it is now."""
    files: dict[str, bytes | memoryview] = {}
    for name, state in states.items():
        tensors: dict[str, torch.Tensor] = {}
        values = _part(state, (), tensors)
        files |= {f"{name}.safetensors": safetensors(tensors), f"{name}.json": _json(values)}
    return files


def put(folder: Path, step: int, files: Files) -> Checkpoint:
    """Writes the `snapshot` that was taken after `step`.

    The checkpoint appears under its name only when it is whole and on disk.
    """
    path = folder / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{path.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    with rundir.disk_errors(str(path)):
        aside.mkdir()
    for file, content in files.items():
        rundir.write_file(aside / file, content)
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    rundir.write_file(aside / "hashes.json", _json(hashes))
    with rundir.disk_errors(str(path)):
        rundir.swap(aside, path)
    return Checkpoint(step, path)


def read(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The states of a checkpoint, after every file's hash was found right.

    Raises RefusedError naming the file that is missing, truncated or altered.
    """
    hashes = _hashes(checkpoint)
    for file, expected in hashes.items():
        path = checkpoint.path / file
        if not path.is_file() or rundir.sha256_file(path) != expected:
            raise _broken(checkpoint, path, "its sha256 is not the one that was written")
    names = [file.removesuffix(".json") for file in hashes if file.endswith(".json")]
    return {name: _join(checkpoint.path, name) for name in names}


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    path = checkpoint.path / "hashes.json"
    try:
        hashes = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _broken(checkpoint, path, "nothing says what was written") from error
    except ValueError as error:
        raise _broken(checkpoint, path, str(error)) from error
    if not isinstance(hashes, dict):
        raise _broken(checkpoint, path, "it holds no hashes by file")
    return hashes


def _broken(checkpoint: Checkpoint, path: Path, why: str) -> RefusedError:
    return RefusedError(
        f"{path} is {'damaged' if path.is_file() else 'missing'}: {why}",
        f"delete {checkpoint.path} to go on from the checkpoint before it, or restore it from a copy",
    )


def found(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in `folder`, oldest first."""
    matches = ((STEP.fullmatch(p.name), p) for p in folder.glob("step-*"))
    whole = [Checkpoint(int(m[1]), p) for m, p in matches if m and (p / "hashes.json").is_file()]
    return sorted(whole, key=lambda c: c.step)


def prune(folder: Path, keep: Iterable[int]) -> None:
    """Removes checkpoints whose step is not in `keep`, and what killed saves left behind."""
    kept = set(keep)
    for checkpoint in found(folder):
        if checkpoint.step not in kept:
            gone = folder / f".{checkpoint.path.name}.gone"
            rundir.rename(checkpoint.path, gone)  # never a checkpoint with a part of its files
            shutil.rmtree(gone)
    for left in [*folder.glob(".*.part"), *folder.glob(".*.gone")]:
        shutil.rmtree(left, ignore_errors=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _part(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON part of a state; tensors go to `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        name = "/".join(path)
        tensors[name] = value
        return {"__tensor__": name}
    if isinstance(value, Mapping):
        return {str(k): _part(v, (*path, str(k)), tensors) for k, v in value.items()}
    return value


def _join(path: Path, name: str) -> dict[str, Any]:
    tensors = load((path / f"{name}.safetensors").read_bytes())

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["__tensor__"]] if "__tensor__" in value else {k: fill(v) for k, v in value.items()}
        return value

    return fill(json.loads((path / f"{name}.json").read_text(encoding="utf-8")))
