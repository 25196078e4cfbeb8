"""Named things (methods, objectives, metrics, ...) that recipes refer to, found by import of their package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Generic, TypeVar

from tunesmith.errors import InputError
from tunesmith.yaml_text import read_yaml

OTHER_NAMES = "other_names.yaml"  # beside the modules of a package, where it has one
T = TypeVar("T")
Item = TypeVar("Item")


class Registry(Generic[T]):
    """Maps a recipe's word to the thing that it names.

    Every module of `package` is imported on first use, so adding a variant is one new file that
    calls `register`.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self._package = package
        self._items: dict[str, T] = {}
        self._numbered: dict[str, Callable[[int], T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator that files the decorated class or function under `name`."""

        def add(item: Item) -> Item:
            if name in self._items and self._items[name] is not item:
                raise InputError(f"{self.what} {name!r} is registered twice", "rename one of them")
            self._items[name] = item  # type: ignore[assignment]
            return item

        return add

    def register_numbered(self, stem: str) -> Callable[[Callable[[int], T]], Callable[[int], T]]:
        """Decorator of a function that makes the item for a number: `stem` with a whole number above 0 behind it."""

        def add(make: Callable[[int], T]) -> Callable[[int], T]:
            self._numbered[stem] = make
            return make

        return add

    def get(self, name: str, place: str = "") -> T:
        """The item called `name`; an unknown name is refused with its place ("recipe.yaml:4: ") and the nearest."""
        self._load()
        if name in self._items:
            return self._items[name]
        if (made := self._made(name)) is not None:
            return made
        near = difflib.get_close_matches(name, self._items, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if (here := self._called_here(name)) is not None:
            hint = f"write `{here}`; "
        known = f"known: {', '.join(sorted(self._items))}; what a file of yours registers, with --plugin FILE"
        raise InputError(f"{place}unknown {self.what} {name!r}", hint + known)

    def _called_here(self, name: str) -> str | None:
        """What a recipe writes for a name that the field has for an item or its options."""
        table = files(self._package).joinpath(OTHER_NAMES)
        if not table.is_file():
            return None
        known: dict[str, str] = read_yaml(table.read_text(encoding="utf-8"), OTHER_NAMES).value
        return known.get(name.lower().replace("-", "_"))

    def _made(self, name: str) -> T | None:
        stem = name.rstrip("0123456789")
        number = name[len(stem) :]
        return self._numbered[stem](int(number)) if stem in self._numbered and number[:1] not in ("", "0") else None

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._items or self._made(name) is not None

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
        except BaseException:
            self._loaded = False  # else the next call would answer from what loaded before the failure
            raise
