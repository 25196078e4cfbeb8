"""Adapters on disk: by which names they go, and whether they stand on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.beneath import Beneath, held, name_of
from tunesmith.data.given import PathLike
from tunesmith.errors import InputError, RefusedError
from tunesmith.methods import METHODS
from tunesmith.models.saved import folder_of, read_card

BASE = "base"


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter on disk, under the name that it goes by here."""

    name: str
    path: Path
    folder: Path
    card: dict[str, Any]

    @property
    def beneath(self) -> list[Beneath]:
        """The adapters that it stands on, from the base up."""
        return held(self.folder, self.card)

    @property
    def base_in(self) -> str:
        """What the base's weights are held in where several adapters stand on them."""
        precision = str(self.card["precision"])
        return precision if precision in ("fp32", "int4") else "bf16"


def saved(runs: Sequence[PathLike] | Mapping[str, PathLike]) -> list[Saved]:
    """The adapters of runs by name. InputError for a name that two would have."""
    named = runs.items() if isinstance(runs, Mapping) else [(name_of(Path(run)), run) for run in runs]
    found: dict[str, Saved] = {}
    for name, run in named:
        if name in found or name == BASE:
            taken = f"of {found[name].path} too" if name in found else "what the base is called"
            raise InputError(f"{run} would be called {name!r}, which is {taken}", "give it a name: NAME=RUN")
        path = Path(run)
        folder = folder_of(path)
        found[name] = Saved(name, path, folder, read_card(folder))
    if not found:
        raise InputError("there is no adapter to load", "give the folder of a run")
    return list(found.values())


def by_name(words: Sequence[str]) -> dict[str, str]:
    """RUN or NAME=RUN, as the command line has them. InputError for a name given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, run = word.partition("=")
        if not equals or Path(word).exists():
            name, run = name_of(Path(word)), word
        if name in found:
            raise InputError(f"{run} and {found[name]} are both called {name!r}", f"name one: other={run}")
        found[name] = run
    return found


def check_one_base(saved: Sequence[Saved]) -> None:
    """Raises what `clash` finds."""
    if (found := clash(saved)) is not None:
        raise found


def clash(saved: Sequence[Saved]) -> InputError | RefusedError | None:
    """Why the first that cannot stand on the same base as the first one cannot; None where all can."""
    first = saved[0]
    for one in saved:
        method = one.card["method"]["name"]
        if METHODS.get(method).facts.reference != "switch":
            return InputError(
                f"{one.path} is by {method}, which is a whole model of its own and no adapter",
                "load it by itself, or train an adapter (lora)",
            )
        base, other = first.card["base"], one.card["base"]
        if other["sha256"] != base["sha256"]:
            return RefusedError(
                f"{first.path} stands on {base['name']} ({base['sha256'][:12]}...), "
                f"and {one.path} on {other['name']} ({other['sha256'][:12]}...)",
                "load together only adapters of one base",
            )
        if one.card.get("tokens") and len(saved) > 1:
            return InputError(
                f"{one.path} added tokens to the vocabulary, and its base has rows for them that no other's has",
                "load it by itself",
            )
        if one.base_in != first.base_in:
            return InputError(
                f"{first.path} was trained over a base in {first.card['precision']}, "
                f"and {one.path} over one in {one.card['precision']}",
                "load them apart, or train one again with the other's `precision`",
            )
    return None
