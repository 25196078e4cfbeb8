"""Adapters of one base -> one adapter: a folder that PEFT loads, with a card, so that every verb takes it too."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tunesmith import beneath, session
from tunesmith.adapter_folders import Saved, check_one_base
from tunesmith.declared import Combination
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.low_rank_sum import WAYS
from tunesmith.models import drawing
from tunesmith.protocols import Combinable
from tunesmith.rundir import check_free, replace_folder

WEIGHTS = beneath.FILES[0]


def combination(
    adapters: Sequence[Saved],
    weights: Sequence[float] | None,
    how: str | None,
    density: float | None,
    rank: int | None,
    seed: int | None,
) -> Combination:
    """What was asked for with its defaults, the mean of the updates. InputError for what nothing would read."""
    method = adapters[0].card["method"]["name"]
    ways = METHODS.get(method).facts.combines
    how = how or ("cat" if "cat" in ways else next(iter(sorted(ways)), "cat"))
    if how not in WAYS:
        raise InputError(f"there is no way {how!r} to combine adapters", f"known: {', '.join(WAYS)}")
    way = WAYS[how]
    for name, value, read in (("density", density, way.pruned), ("rank", rank, way.whole), ("seed", seed, way.drawn)):
        if value is not None and not read:
            raise InputError(f"{name} is given, and {how} reads none", f"leave {name} out, or combine in another way")
    if density is not None and not 0 < density < 1:
        raise InputError(f"density is {density:g}", "give the share of entries that stay, between 0 and 1")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}", "give a whole number of at least 1")
    if weights is not None and (len(weights) != len(adapters) or not all(map(math.isfinite, weights))):
        raise InputError(
            f"{len(adapters)} adapters are combined, and the weights are {', '.join(f'{w:g}' for w in weights)}",
            "give one number for each adapter, in their order",
        )
    asked = Combination(how, tuple(weights or [1 / len(adapters)] * len(adapters)))
    given = {"density": density, "rank": rank, "seed": seed}
    return Combination(asked.how, asked.weights, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def combine(adapters: Sequence[Saved], asked: Combination, to: Path) -> Path:
    """Writes the combination of adapters into the new folder `to`; no weights of the base are read.

    Raises InputError or RefusedError where they do not stand on one base, are not of one kind, or cannot be combined
    in this way: nothing is left behind then.
    """
    check_free(to)
    _check(adapters, asked.how)
    first = adapters[0]
    method = cast("type[Combinable]", METHODS.get(first.card["method"]["name"]))
    with replace_folder(to) as folder:
        options = method.combine(*_with_beneath(adapters, asked), folder)
        for name in first.card["files"]:
            if name not in (*beneath.FILES, drawing.FILE) and not name.endswith(".md") and "/" not in name:
                shutil.copyfile(first.folder / name, folder / name)
        session.write_card(folder, _card(adapters, asked, options.model_dump(mode="json")))
    return to


def _with_beneath(adapters: Sequence[Saved], asked: Combination) -> tuple[list[Path], Combination]:
    """The folders whose sum is asked for: an adapter counts with those that it stands on."""
    parts = [
        (folder, weight)
        for one, weight in zip(adapters, asked.weights, strict=True)
        for folder in (*(under.folder for under in one.beneath), one.folder)
    ]
    return [folder for folder, _ in parts], replace(asked, weights=tuple(weight for _, weight in parts))


def _check(adapters: Sequence[Saved], how: str) -> None:
    check_one_base(adapters)
    first = adapters[0]
    for one in adapters:
        method = one.card["method"]["name"]
        if how not in (ways := METHODS.get(method).facts.combines):
            raise InputError(
                f"{one.path} is by {method}, whose adapters cannot be combined{f' by {how}' * bool(ways)}",
                f"combine by {' or '.join(sorted(ways))}" if ways else "load the adapters side by side instead",
            )
        if one.beneath and not WAYS[how].is_exact:
            raise InputError(
                f"{one.path} stands on {', '.join(under.name for under in one.beneath)}, and {how} sums no updates",
                "combine it alone by cat first, which makes one adapter of it, or export it with --merge",
            )
        for what, mine, theirs in (
            ("method", first.card["method"]["name"], method),
            ("objective", first.card["objective"]["name"], one.card["objective"]["name"]),
            ("chat template", first.card["templates"], one.card["templates"]),
        ):
            if mine != theirs:
                named = f" ({mine} and {theirs})" if isinstance(mine, str) else ""
                raise InputError(
                    f"{first.path} and {one.path} differ in their {what}{named}",
                    "combine adapters that were trained alike, or load them side by side",
                )
        if one.card["head"] != "lm":
            raise InputError(
                f"{one.path} has a head of its own, which stands for its labels and cannot be summed",
                "load the adapters side by side instead",
            )


def _card(adapters: Sequence[Saved], asked: Combination, options: dict[str, Any]) -> dict[str, Any]:
    first = adapters[0].card
    parts = [
        {"name": one.name, "weight": weight, "sha256": one.card["files"][WEIGHTS]}
        for one, weight in zip(adapters, asked.weights, strict=True)
    ]
    way = WAYS[asked.how]
    read = {"density": asked.density if way.pruned else None, "seed": asked.seed if way.drawn else None}
    told = {"how": asked.how, "of": parts, **{key: value for key, value in read.items() if value is not None}}
    longest = {key: max(one.card[key] for one in adapters) for key in ("sequence_length", "max_new_tokens")}
    alone = {key: value for key, value in first.items() if key not in (beneath.FOLDER, "calibration", drawing.CARD_KEY)}
    return {**alone, **longest, "method": {"name": first["method"]["name"], "options": options}, "combined": told}
