"""Passages that queries are searched for in: read strictly, kept as rows on disk, found by position and by id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.ingest import Given, Progress, ingest
from tunesmith.data.rows import RowStore
from tunesmith.errors import InputError
from tunesmith.recipe import CorpusFile

SPLIT = "corpus"


class Corpus:
    """The passages of one source. `fingerprint` is the sha256 of all of them. It can be pickled."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self.fingerprint = store.fingerprint
        self._place: dict[str, int] = {}
        for place in range(len(store)):
            row = store.row(place)
            name = row.value.get("id")
            if name is not None and self._place.setdefault(name, place) != place:
                raise InputError(
                    f"{row.where}: {store.row(self._place[name]).where} has the id {name!r} too",
                    "give each passage an id of its own",
                )

    def __reduce__(self) -> tuple[type[Corpus], tuple[RowStore]]:
        return Corpus, (self._store,)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name, sha256 and rows of each file."""
        return self._store.sources

    def text(self, name: str) -> str:
        """The text of the passage with this id. InputError where there is none."""
        if name not in self._place:
            raise InputError(
                f"the corpus {self.sources[0]['name']} has no passage with the id {name!r}",
                "correct the id, or add the passage",
            )
        return str(self._store.row(self._place[name]).value["text"])

    def passages(self) -> Iterator[tuple[str, str]]:
        """What each passage is called, its id or else its text, and its text."""
        for place in range(len(self)):
            value = self._store.row(place).value
            yield value.get("id", value["text"]), value["text"]


def open_corpus(asked: CorpusFile, base: Path, cache: Path, tell: Progress) -> Corpus:
    """The corpus that a recipe names, whose relative path starts at `base`."""
    return Corpus(ingest(Given(SPLIT, asked.path, format="passage", columns=asked.columns), base, cache, tell))
