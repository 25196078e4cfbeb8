"""What was found in the data: counted, shown before training, and refused where it would spoil the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.checks import contradicting, duplicates, shared
from tunesmith.data.pool import Pool
from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError, RefusedError

LEAK_LIMIT = 0.01
ONE_ANSWER = ("label", "score", "tags", "pair", "choices")  # kinds of which a row that is right makes others wrong
_PLACES = 5

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows of a held-out set that stand in train as well, and `places` (held out, train) of the first."""

    rows: int
    of: int
    train_rows: int
    places: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Contradictions:
    """Rows of train that show the same as another and have a different answer, and two `places` of the first ones."""

    rows: int
    places: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` examples have from `edges[i]` up to, not with, `edges[i + 1]` tokens."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class SplitAudit:
    """One split. `files`: name, sha256, rows; `rows` are used by this split, `examples` stand in its store."""

    files: list[dict[str, Any]]
    formats: list[str]
    rows: int
    examples: int
    tokens: int
    trained: int
    truncated: int
    truncated_answers: int
    masked: int
    empty: int
    labels: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Audit:
    """All splits, and what concerns train alone.

    `dropped`: rows taken out of train by reason (shared, empty, masked). `unknown_labels`: by held-out
    set, labels that train lacks with their rows. `shown`: the train example of median length. `corpus`: name, sha256
    and passages (`rows`) of each file that is searched; None where no corpus was given. `contradictions`: None where
    rows may have several right answers.
    """

    train: SplitAudit
    validation: SplitAudit | None
    tests: dict[str, SplitAudit]
    duplicates: int
    dropped: dict[str, int]
    shared_with_validation: Overlap | None
    shared_with_tests: dict[str, Overlap]
    unknown_labels: dict[str, dict[str, int]]
    lengths: Histogram
    shown: int
    corpus: list[dict[str, Any]] | None = None
    contradictions: Contradictions | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(slots=True)
class Leaks:
    """What leak removal found on its way."""

    with_validation: Overlap | None = None
    with_tests: dict[str, Overlap] = field(default_factory=dict[str, Overlap])
    dropped: int = 0


def remove_leaks(
    train: Pool, held: Mapping[str, Pool], tests: Collection[str], allow: Collection[str]
) -> tuple[Pool, Leaks]:
    """Train without the rows that stand in `held` ("validation" and tests by name) too.

    RefusedError: over LEAK_LIMIT of a test set stands in train, unless allowed.
    """
    leaks, leaking = Leaks(), np.zeros(len(train), dtype=bool)
    keys = train.keys
    for name, pool in held.items():
        overlap, at = _overlap(train, keys, pool)
        leaking[at] = True
        if name not in tests:
            leaks.with_validation = overlap
            continue
        leaks.with_tests[name] = overlap
        if overlap.rows > LEAK_LIMIT * overlap.of and "leaks" not in allow:
            there, here = overlap.places[0]
            raise RefusedError(
                f"{overlap.rows} of {overlap.of} rows of {name} stand in train too, such as {there} = {here}",
                "take them out of the test set, or set data.allow: [leaks] to drop them from train and go on",
            )
    leaks.dropped = int(leaking.sum())
    return train.without(np.flatnonzero(leaking)), leaks


def _overlap(train: Pool, keys: Any, held: Pool) -> tuple[Overlap, Indices]:
    theirs = held.keys
    at, in_held = shared(keys, theirs), shared(theirs, keys)
    places: list[tuple[str, str]] = []
    for i in in_held[:_PLACES]:
        first = int(at[np.flatnonzero(keys[at] == theirs[i])[0]])
        places.append((held.row(int(i)).where, train.row(first).where))
    return Overlap(len(in_held), len(held), len(at), places), at


def unknown_labels(train: Pool, held: Mapping[str, Pool], allow: Collection[str]) -> dict[str, dict[str, int]]:
    """Labels of held-out sets that train lacks. RefusedError unless allowed."""
    if not train.labelled:
        return {}
    known = train.label_counts()
    found = {
        name: missing
        for name, pool in held.items()
        if (missing := {label: n for label, n in pool.label_counts().items() if label not in known})
    }
    if found and "unknown_labels" not in allow:
        name, missing = next(iter(found.items()))
        labels = ", ".join(map(repr, list(missing)[:_PLACES])) + (", ..." if len(missing) > _PLACES else "")
        spelled = {label.casefold(): label for label in known}
        alike = next(((label, spelled[label.casefold()]) for label in missing if label.casefold() in spelled), None)
        hint = f"write {alike[0]!r} as train does, {alike[1]!r}; or " if alike else ""
        raise RefusedError(
            f"{sum(missing.values())} rows of {name} have labels that train lacks: {labels}",
            f"{hint}add rows of these labels to train, or set data.allow: [unknown_labels]",
        )
    return found


def check_enough(train: Pool, what: str) -> None:
    """InputError: a train split of fewer than two rows, or of a single class."""
    if len(train) < 2:
        raise InputError(f"train has {'one row' if len(train) else 'no row'} {what}", "give more training rows")
    classes = train.classes
    if classes is not None and len(np.unique(classes)) < 2:
        only = next(iter(train.label_counts()))
        raise InputError(
            f"all {len(train)} rows of train have the label {only!r} {what}", "give rows of two classes or more"
        )


def check_examples(store: TokenStore, masked: Indices, allow: Collection[str]) -> None:
    """RefusedError: train examples without anything to learn, or whose answers were cut; unless allowed."""
    if len(masked) and "masked" not in allow:
        raise RefusedError(
            f"{len(masked)} of {len(store)} rows of train have nothing to learn: {_places(store, masked)}",
            "mend the rows (an answer must come last, within train.sequence_length), or set data.allow: [masked] "
            "to drop them",
        )
    cut = np.flatnonzero(store.cut_trained > 0)
    if len(cut) and "truncated" not in allow:
        longest = int((store.lengths + store.cut)[cut].max())
        raise RefusedError(
            f"the answers of {len(cut)} of {len(store)} rows of train are cut: {_places(store, cut)}",
            f"set train.sequence_length to {longest} or more, shorten the rows, or set data.allow: [truncated]",
        )


def split_audit(pool: Pool, store: TokenStore, masked: int, empty: int) -> SplitAudit:
    """`store` holds those of the pool's rows that are used."""
    return SplitAudit(
        files=[entry for s in pool.stores for entry in s.sources],
        formats=[s.format for s in pool.stores],
        rows=len(pool),
        examples=len(store),
        tokens=int(store.lengths.sum()),
        trained=int(store.trained.sum()),
        truncated=int(np.count_nonzero(store.cut)),
        truncated_answers=int(np.count_nonzero(store.cut_trained)),
        masked=masked,
        empty=empty,
        labels=pool.label_counts() if pool.labelled else None,
    )


def count_duplicates(train: Pool) -> int:
    """Rows that repeat an earlier one, answer and all."""
    return len(duplicates(train.whole))


def contradictions(train: Pool) -> Contradictions | None:
    """What no model can learn: the same shown with different answers."""
    if train.stores[0].kind not in ONE_ANSWER:
        return None
    whole_N = train.whole
    groups = sorted(contradicting(train.keys, whole_N), key=lambda group: int(group[0]))
    places: list[tuple[str, str]] = []
    for group in groups[:_PLACES]:
        other = group[np.flatnonzero(whole_N[group] != whole_N[group[0]])[0]]
        places.append((train.row(int(group[0])).where, train.row(int(other)).where))
    return Contradictions(sum(len(group) for group in groups), places)


def histogram(lengths: Indices) -> Histogram:
    """Of token counts, in bins that double."""
    edges = [0, 16]
    while edges[-1] <= lengths.max(initial=0):
        edges.append(2 * edges[-1])
    return Histogram(edges, [int(n) for n in np.histogram(lengths, edges)[0]])


def median_example(lengths: Indices) -> int:
    """The position of the example whose length is the (lower) median."""
    return int(np.argsort(lengths, kind="stable")[(len(lengths) - 1) // 2])


def _places(store: TokenStore, at: Sequence[int] | Indices) -> str:
    named = ", ".join(store.row(int(i)).where for i in at[:_PLACES])
    return named + (", ..." if len(at) > _PLACES else "")
