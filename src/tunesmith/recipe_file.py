"""Recipes as files: YAML and command-line overrides to a typed Recipe, and a Recipe back to YAML."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from tunesmith.errors import InputError
from tunesmith.recipe import CorpusFile, Recipe
from tunesmith.recipe_keys import Choice
from tunesmith.recipe_problems import Origin, find_problems, refuse, show
from tunesmith.recipe_schema import recipe_schema
from tunesmith.yaml_text import MAX_BYTES, read_scalar, read_yaml, write_yaml

__all__ = [
    "Origin",
    "check_options",
    "defaults_taken",
    "dump_recipe",
    "leaves",
    "load_recipe",
    "parse_corpus",
    "parse_recipe",
    "recipe_schema",
    "resolve_paths",
    "run_name",
]

Model = TypeVar("Model", bound=BaseModel)

# Endings that make a word of a recipe a path even where no such file exists (yet, or by a typing error).
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gguf", ".yaml", ".jinja", ".gz")
ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # JSON may be a recipe too
NAMED = ("method", "objective")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Origin]:
    """Read a recipe file, with overrides as on the command line (`train.epochs=1`).

    Paths in it stay as written; `resolve_paths` makes them absolute. Raises InputError that lists
    every problem found, each with its line.
    """
    read = read_yaml(_read_text(path), path.name)
    if read.value is None:
        raise InputError(f"{path} is empty", "a recipe needs model, data, objective and method; see docs/recipes.md")
    if not isinstance(read.value, dict):
        raise InputError(f"{path} is not a recipe: it holds {show(read.value)}", "write keys, as in `model: ...`")
    raw = cast("dict[str, Any]", read.value)
    lines = dict(read.lines)
    seen: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        if key in seen:
            raise InputError(f"{key} is set twice on the command line: {seen[key]} and {override}", "keep one of them")
        seen[key] = override
        lines = {known: line for known, line in lines.items() if not known.startswith(f"{key}.")}
        _set(raw, key, value)
    given = leaves(raw)
    origin = Origin(path, lines, frozenset(seen), frozenset(given))
    return _validated(raw, Recipe, origin), origin


def parse_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping made in Python; raises InputError that lists every problem."""
    return _validated(dict(mapping), Recipe, Origin())


def parse_corpus(mapping: Mapping[str, Any]) -> CorpusFile:
    """What stands under `data.corpus`, from a mapping made in Python; raises InputError that lists every problem."""
    return _validated(dict(mapping), CorpusFile, Origin(), "corpus")


def check_options(choice: Choice, model: type[Model], where: str, origin: Origin | None = None) -> Model:
    """The options of a method or objective as `model`; `where` is the key they stand under ("method").

    Raises InputError that lists every problem, each with its line.
    """
    return _validated(choice.options, model, origin or Origin(), where)


def _validated(raw: dict[str, Any], model: type[Model], origin: Origin, where: str = "") -> Model:
    problems = find_problems(raw, model, where)
    if problems:
        raise refuse(problems, origin)
    try:
        return model.model_validate(raw)
    except ValidationError as error:  # find_problems looks through the same errors, so this is a fault of ours
        raise AssertionError(f"a problem that was not listed: {error}") from error


def _read_text(path: Path) -> str:
    if path.is_dir():
        run = " (the recipe of a run is recipe.yaml in it)" if (path / "recipe.yaml").exists() else ""
        raise InputError(f"{path} is a folder, not a recipe{run}", "give the recipe file")
    if path.suffix.lower() in ROWS and path.is_file():
        raise InputError(f"{path} holds rows and is no recipe", f"write a recipe that has data: {{train: {path.name}}}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _recipes_in(path.parent), n=1, cutoff=0.8)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise InputError(f"there is no file {path}", hint) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(content) > MAX_BYTES:
            raise InputError(f"{path.name} is larger than 1 MB", "give a recipe, which is a few lines") from error
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path.name}:{line}: not UTF-8 text", "save the file as UTF-8") from error


def _recipes_in(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))]
    except OSError:
        return []


# ---------------------------------------------------------------- overrides


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        raise InputError(f"{show(override)} is not an override", "write key=value, for example train.epochs=1")
    if not text:
        raise InputError(f"{override} gives {key} no value", f"write {key}=null to unset it")
    if text[0] in "[{\"'":
        return key, read_yaml(text, f"command line, {key}").value
    return key, read_scalar(text)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    here: Any = raw
    for depth, part in enumerate(above):
        inner = _step(here, part, key)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and depth == 0 and part in NAMED:
            inner = {"name": inner}
        elif isinstance(inner, str) and depth == 2 and above[:2] == ["data", "train"]:
            inner = {"path": inner}
        _put(here, part, inner)
        here = inner
    _step(here, last, key)
    _put(here, last, value)


def _step(here: Any, part: str, key: str) -> Any:
    """The value under `part`; raises InputError where `here` cannot have one."""
    if isinstance(here, dict):
        return cast("dict[str, Any]", here).get(part)
    if isinstance(here, list):
        items = cast("list[Any]", here)
        if part.isdecimal() and int(part) < len(items):
            return items[int(part)]
        raise InputError(
            f"{key}: the recipe's list has {len(items)} items and no item {part}", "items are counted from 0"
        )
    above = key.split(f".{part}")[0]
    raise InputError(f"{key} cannot be set: {above} is {show(here)} in the recipe", f"set {above} as a whole")


def _put(here: Any, part: str, value: Any) -> None:
    if isinstance(here, list):
        cast("list[Any]", here)[int(part)] = value
    else:
        here[part] = value


# ---------------------------------------------------------------- what was given, and back to text


def leaves(value: Any, above: str = "") -> dict[str, Any]:
    """Key path -> value for everything that is not itself a set of keys or a list of them."""
    pairs: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        pairs = [(str(key), inner) for key, inner in cast("dict[Any, Any]", value).items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in cast("list[Any]", value)):
        pairs = [(str(index), item) for index, item in enumerate(cast("list[Any]", value))]
    if not pairs:
        return {above: value} if above else {}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found.update(leaves(inner, f"{above}.{key}" if above else key))
    return found


def defaults_taken(recipe: Recipe, origin: Origin) -> dict[str, Any]:
    """Key path -> value for everything that the user did not write, in the recipe's order."""

    def written(path: str) -> bool:  # or short for it: `method: lora` gives method.name
        return path in origin.given or ("." in path and written(path.rpartition(".")[0]))

    return {path: value for path, value in leaves(recipe.model_dump(mode="json")).items() if not written(path)}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; it loads back to the same recipe."""
    plain = recipe.model_dump(mode="json")
    for key in NAMED:
        if set(plain[key]) == {"name"}:
            plain[key] = plain[key]["name"]
    return write_yaml(plain)


# ---------------------------------------------------------------- paths and names


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its relative paths made absolute, from `folder` (the recipe file's own).

    Hub ids and catalog names stay as they are: a path exists, ends like a data file, or begins with
    `.`, `/` or `~`.
    """

    def resolve(text: str) -> str:
        expanded = Path(text).expanduser() if text.startswith("~") else Path(text)
        looks = text.startswith((".", "/", "~")) or text.lower().endswith(SUFFIXES)
        place = Path(os.path.normpath(Path(os.path.abspath(folder)) / expanded))
        return str(place) if looks or place.exists() else text

    data = recipe.data
    train = data.train
    changed: dict[str, Any] = {
        "train": resolve(train)
        if isinstance(train, str)
        else [one.model_copy(update={"path": resolve(one.path)}) for one in train]
    }
    if isinstance(data.validation, str):
        changed["validation"] = resolve(data.validation)
    if data.test is not None:
        test = data.test
        changed["test"] = resolve(test) if isinstance(test, str) else {name: resolve(one) for name, one in test.items()}
    if data.corpus is not None:
        changed["corpus"] = data.corpus.model_copy(update={"path": resolve(data.corpus.path)})
    if data.template is not None and "{" not in data.template:
        changed["template"] = str(Path(os.path.normpath(Path(os.path.abspath(folder)) / data.template)))
    out = recipe.out
    if out is not None:
        out = Path(os.path.normpath(Path(os.path.abspath(folder)) / out.expanduser()))
    return recipe.model_copy(
        update={
            "model": resolve(recipe.model),
            "adapters": [*map(resolve, recipe.adapters)],
            "teacher": None if recipe.teacher is None else resolve(recipe.teacher),
            "data": data.model_copy(update=changed),
            "out": out,
        }
    )


def run_name(path: Path) -> str:
    """The default name of a run: the recipe file's, with only what is safe in the name of a folder."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.")
    return stem[:80] or "run"
