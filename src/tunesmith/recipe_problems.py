"""What is wrong with the values of a recipe: every unknown key and wrong value, in one line each, with its place."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from tunesmith.errors import InputError
from tunesmith.recipe import Recipe
from tunesmith.recipe_schema import alternatives, child, describe, key_paths
from tunesmith.yaml_text import MAX_SHOWN, read_yaml, write_yaml

Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where each value of a recipe was given: its file and line, or the command line.

    `given` has the key paths (`train.epochs`) that the user wrote; every other value is a default.
    """

    file: Path | None = None
    lines: Mapping[str, int] = field(default_factory=dict[str, int])
    overrides: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()

    def place(self, path: str) -> str:
        """`recipe.yaml:7: ` for a key path or the nearest key above it; empty for a recipe made in Python."""
        name = self.file.name if self.file else ""
        above = path
        while above:
            if above in self.overrides:
                return "command line: "
            if above in self.lines:
                return f"{name}:{self.lines[above]}: "
            above = above.rpartition(".")[0]
        if any(key.startswith(f"{path}.") for key in self.overrides):
            return "command line: "
        return f"{name}: " if name else ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `remedy` is empty where the text says it all."""

    path: str
    text: str
    remedy: str


def refuse(problems: list[Problem], origin: Origin) -> InputError:
    """All problems as one error, in the order of their lines."""
    ordered = sorted(problems, key=lambda p: origin.lines.get(p.path, 0))
    if len(ordered) == 1:
        only = ordered[0]
        return InputError(origin.place(only.path) + only.text, only.remedy or "see docs/recipes.md for every key")
    lines = [f"{origin.place(p.path)}{p.text}" + (f": {p.remedy}" if p.remedy else "") for p in ordered]
    more = [f"and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return InputError("\n".join(lines[:MAX_SHOWN] + more), f"mend these {len(lines)}; docs/recipes.md has every key")


def find_problems(raw: Any, model: type[BaseModel], where: str = "") -> list[Problem]:
    """Everything that `model` refuses in `raw`, which stands at the key path `where` of the recipe."""
    schema = _schema(model)
    prefix: Keys = (where,) if where else ()
    found = list(_unknown_keys(raw, schema, schema, prefix)) + list(_odd_values(raw, schema, schema, prefix))
    seen = {p.path for p in found}
    try:
        model.model_validate(raw)
    except ValidationError as error:
        errors: dict[Keys, str] = {}
        for one in error.errors(include_url=False):
            if one["type"] != "extra_forbidden":
                keys = _keys_of(one["loc"], raw, one["type"])
                errors.setdefault(keys, str(one.get("ctx", {}).get("error", "")))
        for keys, message in errors.items():
            path = ".".join(prefix + keys)
            deeper = any(other[: len(keys)] == keys and len(other) > len(keys) for other in errors)
            if not deeper and path not in seen:
                found.append(_wrong_value(raw, schema, prefix, keys, message))
    return found


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


# ---------------------------------------------------------------- unknown keys


@cache
def spellings() -> dict[str, tuple[str | None, str]]:
    """Other tools' keys: the key to use here (None: none is needed) and a note."""
    text = files("tunesmith").joinpath("spellings.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = read_yaml(text, "spellings.yaml").value
    known: dict[str, tuple[str | None, str]] = {key: (None, note) for key, note in table["unneeded"].items()}
    for key, target in table["renamed"].items():
        known[key] = (target, "") if isinstance(target, str) else (target[0], target[1])
    return known


@cache
def _recipe_keys() -> tuple[str, ...]:
    return tuple(key_paths(_schema(Recipe)))


def _unknown_keys(raw: Any, node: dict[str, Any], schema: dict[str, Any], keys: Keys) -> Iterator[Problem]:
    if isinstance(raw, list):
        for index, item in enumerate(cast("list[Any]", raw)):
            if (inner := child(node, index, schema)) is not None:
                yield from _unknown_keys(item, inner, schema, (*keys, str(index)))
    if not isinstance(raw, dict):
        return
    known = [key for one in alternatives(node, schema) for key in one.get("properties", {})]
    for key, value in cast("dict[str, Any]", raw).items():
        inner = child(node, key, schema)
        if inner is not None:
            yield from _unknown_keys(value, inner, schema, (*keys, key))
        elif known:
            yield _unknown_key((*keys, key), known)
            yield from _spelled_below(value, (*keys, key))


def _spelled_below(raw: Any, keys: Keys) -> Iterator[Problem]:
    """Other tools' keys inside a section that is unknown as a whole."""
    pairs: Any = enumerate(cast("list[Any]", raw)) if isinstance(raw, list) else ()
    if isinstance(raw, dict):
        pairs = cast("dict[str, Any]", raw).items()
    for key, value in pairs:
        if _normal(str(key)) in spellings():
            yield _unknown_key((*keys, str(key)), [])
        yield from _spelled_below(value, (*keys, str(key)))


def _normal(key: str) -> str:
    return key.lower().replace("-", "_")


def _unknown_key(keys: Keys, siblings: list[str]) -> Problem:
    *above, key = keys
    path = ".".join(keys)

    def beside(name: str) -> str:
        return ".".join((*above, name))

    normal = _normal(key)
    leaves = {known.rpartition(".")[2]: known for known in reversed(_recipe_keys())}
    if "." in key and not above:
        nested = ": {".join(key.split(".")) + ": ..." + "}" * key.count(".")
        return Problem(path, f"unknown key {key!r}", f"a dotted key works on the command line only; write `{nested}`")
    if normal in siblings:
        return Problem(path, f"unknown key {path}", f"write {beside(normal)}")
    if f"{normal}s" in siblings:
        return Problem(path, f"unknown key {path}", f"write {beside(normal)}s")
    if normal in leaves:
        if "." not in leaves[normal]:
            return Problem(path, f"{path} does not belong here", f"write {normal} beside model and data")
        return Problem(path, f"{path} does not belong here", f"write {leaves[normal]}")
    if normal in spellings():
        target, note = spellings()[normal]
        if target is None:
            return Problem(path, f"{key} has no key here", note)
        return Problem(path, f"{key} has another name here", f"write {target}" + (f" ({note})" if note else ""))
    near = [beside(name) for name in difflib.get_close_matches(normal, siblings, n=1, cutoff=0.6)]
    near = near or [leaves[name] for name in difflib.get_close_matches(normal, leaves, n=1, cutoff=0.75)]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(siblings))}"
    return Problem(path, f"unknown key {path}", hint)


# ---------------------------------------------------------------- wrong values


def _odd_values(raw: Any, node: dict[str, Any] | None, schema: dict[str, Any], keys: Keys) -> Iterator[Problem]:
    """What pydantic would let through: true as the number 1, and numbers that are not finite."""
    if isinstance(raw, dict):
        for key, value in cast("dict[str, Any]", raw).items():
            yield from _odd_values(value, node and child(node, key, schema), schema, (*keys, key))
    elif isinstance(raw, list):
        for index, value in enumerate(cast("list[Any]", raw)):
            yield from _odd_values(value, node and child(node, index, schema), schema, (*keys, str(index)))
    elif isinstance(raw, float) and not math.isfinite(raw):
        yield Problem(".".join(keys), f"{'.'.join(keys)} must be a finite number, not {raw}", "")
    elif isinstance(raw, bool) and node:
        accepted = alternatives(node, schema)
        if not any(one.get("type", "boolean") == "boolean" for one in accepted):
            yield _must_be(".".join(keys), node, schema, raw)


def _keys_of(loc: tuple[int | str, ...], raw: Any, kind: str) -> Keys:
    """pydantic's location without its names of union members."""
    keys: list[str] = []
    here = raw
    for position, part in enumerate(loc):
        if isinstance(here, dict) and part in here:
            here = cast("dict[str, Any]", here)[str(part)]
        elif isinstance(here, list) and isinstance(part, int) and part < len(cast("list[Any]", here)):
            here = cast("list[Any]", here)[part]
        elif part == "[key]" or not (kind == "missing" and position == len(loc) - 1):
            continue
        keys.append(str(part))
    return tuple(keys)


def _wrong_value(raw: Any, schema: dict[str, Any], prefix: Keys, keys: Keys, message: str) -> Problem:
    path = ".".join(prefix + keys)
    if message:
        return Problem(path, f"{path}: {message}" if path else message, "")
    node, here = schema, raw
    for key in keys:
        step = int(key) if isinstance(here, list) else key
        inner = child(node, step, schema)
        if inner is None:  # a key that its own mapping does not allow, such as the name of a test set
            return Problem(path, f"{path}: {show(key)} must be {_names(node, schema)}", "")
        if isinstance(here, dict) and step not in here:
            known = inner.get("examples")
            example = write_yaml(known[0], one_line=True) if known else f"... ({describe(inner, schema)})"
            return Problem(path, f"{path} is missing", f"add `{key}: {example}`")
        node, here = inner, cast("Any", here)[step]
    return _must_be(path, node, schema, here)


def _names(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """What the keys of a mapping of free names must look like."""
    for one in alternatives(node, schema):
        if "propertyNames" in one:
            return str(one["propertyNames"].get("description", "a name"))
    return "a name"


def _must_be(path: str, node: dict[str, Any], schema: dict[str, Any], value: Any) -> Problem:
    words = [word for one in alternatives(node, schema) for word in one.get("enum", [])]
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    remedy = f"did you mean {near[0]}?" if near else ""
    if value is None:
        text = f"{path or 'the recipe'} is empty; it must be {describe(node, schema)}"
        return Problem(path, text, "give it a value, or leave the key out")
    return Problem(path, f"{path or 'the recipe'} must be {describe(node, schema)}, not {show(value)}", remedy)


def show(value: Any) -> str:
    """A value as it would stand in a recipe, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
