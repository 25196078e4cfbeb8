"""Several adapters on one base: what each is, and all of them loaded over weights that are in memory once."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tunesmith import beneath, combining, exporting, measuring, session
from tunesmith.adapter_folders import Saved, check_one_base, saved
from tunesmith.data.given import PathLike, Rows
from tunesmith.engine.precision import choose_device
from tunesmith.errors import InputError
from tunesmith.loaded import Loaded
from tunesmith.models.shared import SharedBase
from tunesmith.rundir import RunDir, check_free
from tunesmith.types import Prediction


class Adapters:
    """Adapters by name over one base. Each answers as it does alone; the one in use answers `predict`.

    `names` are in the order they came. Switching moves no weights: every adapter has modules of its own over the
    same tensors. On a CUDA device they go through PEFT's own layers, not through kernels that keep the base's weights
    with one adapter's.
    """

    def __init__(self, saved: Sequence[Saved], device: str = "auto") -> None:
        check_one_base(saved)
        self._saved = {one.name: one for one in saved}
        first = saved[0]
        heads = {one.card["head"] for one in saved}
        self._device = str(choose_device(device))
        self._shared = SharedBase(
            session.base_of(first.folder, first.card),
            "fp32" if first.base_in == "fp32" else "bf16",
            "lm" if "lm" in heads else "pooled",
            self._device,
            in_nf4=first.base_in == "int4",
        )
        self._loaded = {one.name: self._load(one) for one in saved}
        self._made = Path(mkdtemp(prefix="tunesmith-"))
        weakref.finalize(self, shutil.rmtree, self._made, ignore_errors=True)
        self._base: Loaded | None = None
        self._active: str | None = first.name

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    @property
    def active(self) -> str | None:
        """The name of the adapter in use; None is the base."""
        return self._active

    def __getitem__(self, name: str) -> Loaded:
        """An adapter's model, whichever is in use; InputError for a name that is not there."""
        if name not in self._loaded:
            raise InputError(f"there is no adapter {name!r}", f"loaded: {', '.join(self.names)}")
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def add(self, name: str, run: PathLike) -> Loaded:
        """One more adapter over the same base; what is in use stays. Raises as `load_adapters`."""
        (one,) = saved({name: run})
        if name in self._saved:
            raise InputError(f"an adapter {name!r} is loaded already", "give another name")
        check_one_base([*self._saved.values(), one])
        self._loaded[name], self._saved[name] = self._load(one), one
        return self._loaded[name]

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        how: str | None = None,
        *,
        density: float | None = None,
        rank: int | None = None,
        seed: int | None = None,
    ) -> Loaded:
        """A new adapter of those that `weights` names, as `combine` writes it; `save` keeps it."""
        parts = [self._saved[one] for one in weights if self[one]]
        asked = combining.combination(parts, list(weights.values()), how, density, rank, seed)
        to = self._made / str(len(self._saved))
        return self.add(name, combining.combine(parts, asked, to))

    def save(self, name: str, to: PathLike) -> Path:
        """Writes an adapter as a folder that PEFT loads, and every verb of tunesmith."""
        self[name]
        to = Path(to)
        check_free(to)
        return exporting.copy(self._saved[name].folder, to).path

    def use(self, name: str | None) -> Loaded:
        """Switches to an adapter, or with None to the base, which answers as the first adapter that generates asks."""
        found = self._bare() if name is None else self[name]
        self._active = name
        return found

    def predict(self, rows: PathLike | Rows, max_new_tokens: int | None = None) -> list[Prediction]:
        """Answers to rows, as `Loaded.predict`, of what is in use."""
        return self.use(self._active).predict(rows, max_new_tokens)

    def _load(self, one: Saved) -> Loaded:
        return Loaded(*session.load(one.folder, self._device, self._shared))

    def _bare(self) -> Loaded:
        if self._base is None:
            like = next((one for one in self._saved.values() if one.card["head"] == "lm"), None)
            if like is None:
                raise InputError("a base without a trained head gives no labels", f"use {' or '.join(self.names)}")
            self._base = Loaded(*session.load(like.folder, self._device, self._shared, trained=False))
        return self._base


def load_adapters(runs: Sequence[PathLike] | Mapping[str, PathLike], device: str = "auto") -> Adapters:
    """Several runs' adapters, or exported ones, over one base in memory; they go by their folders' names if not given.

    The first is in use. Raises InputError where there is none, or they do not share a base; RefusedError where a base
    or a file is not as it was.
    """
    return Adapters(saved(runs), device)


def describe(one: Saved) -> dict[str, Any]:
    """What a list of adapters says of one; no weights are read. `metric` is the record its run's verdict is about."""
    from safetensors import safe_open

    own = [name for name in one.card["files"] if not name.startswith(f"{beneath.FOLDER}/")]
    files = [one.folder / name for name in own if name.endswith(".safetensors")]
    elements = 0
    for file in files:
        with safe_open(file, "numpy") as held:
            elements += sum(math.prod(held.get_slice(key).get_shape()) for key in held.keys())  # noqa: SIM118
    return {
        "name": one.name,
        "path": str(one.path),
        "method": one.card["method"]["name"],
        "rank": one.card["method"]["options"].get("rank"),
        "parameters": elements,
        "bytes": sum(file.stat().st_size for file in files),
        "objective": one.card["objective"]["name"],
        "base": one.card["base"]["name"],
        "base_sha256": one.card["base"]["sha256"],
        "beneath": [under.name for under in one.beneath],
        "metric": _headline(one.path),
    }


def _headline(run: Path) -> dict[str, Any] | None:
    from tunesmith.report.before_after import headline, tables

    if not (run / "evaluation.json").is_file():
        return None
    found = measuring.read_results(RunDir(run))
    for table in tables(found["records"], found["effects"]):
        line = headline(table.lines)
        if line is not None and table.group == "all":
            return {key: line.after[key] for key in ("metric", "data", "value", "low", "high", "n")}
    return None
