"""The recipe's data -> tokenised stores of every split, and the audit: read, checked, split, tokenised, cached."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from tunesmith.data import aside, audit
from tunesmith.data.audit import Audit, Leaks, SplitAudit
from tunesmith.data.checks import Keys, as_keys
from tunesmith.data.corpus import Corpus, open_corpus
from tunesmith.data.ingest import FOLD, Given, Memory, Progress, code_version, digest, given, ingest
from tunesmith.data.pool import Pool
from tunesmith.data.source import EasyFirst
from tunesmith.data.split import draw, folds, split
from tunesmith.data.store import TokenStore, Writer
from tunesmith.data.tokenise import tokenise
from tunesmith.errors import InputError
from tunesmith.protocols import Objective, Searches
from tunesmith.recipe import Data, Fold

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer


@dataclass(frozen=True, slots=True)
class Prepared:
    """The stores of a run.

    Train example i belongs to training set `sources[i]` and is seen `repeats[i]` times an epoch; `keys[i]` is of what
    its row shows the model, and `validation_keys` are those of the validation rows. `corpus`: what is searched, where
    one was given; `easy_first`: an order of train, likewise; `times`: how much more often rows of each class are seen
    where the recipe balances them.
    """

    train: TokenStore
    validation: TokenStore | None
    tests: dict[str, TokenStore]
    repeats: NDArray[np.float64]
    sources: NDArray[np.int32]
    keys: Keys
    validation_keys: Keys
    audit: Audit
    corpus: Corpus | None = None
    easy_first: EasyFirst | None = None
    times: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the store of a pool."""

    objective: Objective
    renderer: Renderer
    seed: int
    cache: Path
    workers: int
    tell: Progress

    def store(self, pool: Pool, name: str) -> TokenStore:
        path = self.cache / "tokens" / self._key(pool)

        def make(build: aside.Build) -> dict[str, Any]:
            writer = Writer(build)

            def advance(done: int) -> None:
                self.tell(f"tokenising {name}", done, len(pool))

            for example, line in tokenise(pool, self.objective, self.renderer, self.workers, advance):
                writer.append_line(example, line)
            return writer.finish()

        aside.open_or_build(path, make)
        return TokenStore(path)

    def _key(self, pool: Pool) -> str:
        """Covers all that a store depends on: rows, objective with what it learned, renderer, seed, code."""
        return digest(
            {
                "code": [code_version(), _source_of(self.objective), _source_of(self.renderer)],
                "rows": [store.fingerprint for store in pool.stores],
                "taken": hashlib.sha256(pool.source_N.tobytes() + pool.index_N.tobytes()).hexdigest(),
                "objective": [type(self.objective).__qualname__, self.objective.describe(), _state(self.objective)],
                "renderer": [self.renderer.fingerprint, getattr(self.renderer, "sequence_length", None)],
                "seed": self.seed,
            }
        )


def prepare(
    data: Data,
    base: Path,
    objective: Objective,
    renderer: Renderer,
    seed: int,
    cache: Path,
    workers: int = 1,
    memory: Memory | None = None,
    progress: Progress | None = None,
    tags: Sequence[str] = (),
    choosing_tags: Sequence[str] = (),
    training_tags: Sequence[str] = (),
) -> Prepared:
    """Stores for every split of `data`, whose relative paths start at `base`; `cache` keeps what was made before.

    `memory` holds rows by split, "train", "validation" or a test set's name, in place of paths.
    `progress` is called with what is being done, how many rows are, and of how many (None: unknown).
    `tags`, `choosing_tags` and `training_tags`: the columns that rows keep beside what is read of them (see `given`).
    Rows of train that are held out too are dropped. An objective that searches is given the corpus first.
    `objective.fit` sees the final train rows, once,
    before any example is made. InputError: bad data. RefusedError: data that would spoil the run and
    that `data.allow` does not name.
    """
    tell = progress or _silent
    corpus = open_corpus(data.corpus, base, cache, tell) if data.corpus is not None else None
    if corpus is not None and isinstance(objective, Searches):
        objective.search_in(corpus)
    sources = given(data, memory, tags, choosing_tags, training_tags)
    splits = _split(data, sources, base, objective, seed, cache, tell)
    objective.fit(splits.train.rows())
    maker = _Maker(objective, renderer, seed, cache, workers, tell)
    train, of_train, kept = _finished(maker, splits.train, "train", data.allow)
    held = {name: _finished(maker, pool, name, None) for name, pool in splits.held.items()}
    validation = held.pop("validation", None)
    leaks = splits.leaks
    found = Audit(
        train=of_train,
        validation=validation[1] if validation else None,
        tests={name: of_test for name, (_, of_test, _) in held.items()},
        duplicates=audit.count_duplicates(splits.train),
        dropped={"shared": leaks.dropped, "empty": of_train.empty, "masked": of_train.masked},
        shared_with_validation=leaks.with_validation,
        shared_with_tests=leaks.with_tests,
        unknown_labels=splits.unknown_labels,
        lengths=audit.histogram(train.lengths),
        shown=audit.median_example(train.lengths),
        corpus=None if corpus is None else corpus.sources,
        contradictions=audit.contradictions(splits.train),
    )
    source_N = splits.train.source_N[kept]
    weights = np.array([source.weight for source in splits.sets], dtype=np.float64)
    tests = {name: store for name, (store, _, _) in held.items()}
    held_out = validation[0] if validation else None
    keys, held_keys = splits.train.keys[kept], splits.held["validation"].keys if validation else as_keys(b"")
    return Prepared(train, held_out, tests, weights[source_N], source_N, keys, held_keys, found, corpus)


@dataclass(frozen=True, slots=True)
class _Splits:
    """Which rows each split has; `held` has "validation" and the test sets by name."""

    sets: list[Given]
    train: Pool
    held: dict[str, Pool]
    leaks: Leaks
    unknown_labels: dict[str, dict[str, int]]


def _split(
    data: Data,
    sources: tuple[list[Given], Given | None, dict[str, Given]],
    base: Path,
    objective: Objective,
    seed: int,
    cache: Path,
    tell: Progress,
) -> _Splits:
    """Reads every source, takes leaks out of train, then the limits, then a validation fraction."""
    sets, validation, tests = sources
    train = Pool.of([ingest(source, base, cache, tell) for source in sets])
    files = ({"validation": validation} if validation else {}) | tests
    held = {name: Pool.of([ingest(source, base, cache, tell)]) for name, source in files.items()}
    _check_kinds(train, held, objective)
    audit.check_enough(train, f"in {', '.join(source.path for source in sets)}")
    train, leaks = audit.remove_leaks(train, held, set(tests), data.allow)
    audit.check_enough(train, "that no held-out set has too")
    train = _limited(train, sets, seed)
    if data.fold is not None and data.fold.number:
        train, held[FOLD] = _without_fold(train, data.fold, seed)
    if isinstance(data.validation, float) and validation is None:
        kept, taken = split(train.keys, data.validation, seed, train.classes)
        if not len(taken):
            raise InputError(
                "no row of train can be held out: that takes two different rows of one class",
                "give more rows, or a validation file",
            )
        train, held = train.take(kept), {"validation": train.take(taken), **held}
    audit.check_enough(train, "left by data.validation and the limits of data.train")
    return _Splits(sets, train, held, leaks, audit.unknown_labels(train, held, data.allow))


def _check_kinds(train: Pool, held: Mapping[str, Pool], objective: Objective) -> None:
    """All sources hold rows of one kind, and the objective can learn from it."""
    first = train.stores[0]
    for name, store in [("train", s) for s in train.stores] + [(n, s) for n, p in held.items() for s in p.stores]:
        if (store.kind, store.stratifies) != (first.kind, first.stratifies):
            raise InputError(
                f"{store.sources[0]['name']} ({name}) has rows of {store.format!r}, "
                f"{first.sources[0]['name']} (train) of {first.format!r}",
                "give every split the same kind of rows; data.format and data.columns say how to read them",
            )
    formats = objective.needs.formats
    if formats and first.kind not in formats:
        raise InputError(
            f"the objective cannot learn from rows of {first.format!r} ({first.sources[0]['name']})",
            f"it reads {', '.join(sorted(formats))} rows; choose another objective, or map columns with data.columns",
        )


def _limited(train: Pool, sets: Sequence[Given], seed: int) -> Pool:
    """Of each training set at most its limit, drawn with the seed."""
    taken: list[NDArray[np.int64]] = []
    keys, classes = train.whole, train.classes
    for number, source in enumerate(sets):
        mine = np.flatnonzero(train.source_N == number)
        if source.limit is not None and len(mine):
            mine = mine[draw(source.limit, keys[mine], seed, None if classes is None else classes[mine])]
        taken.append(mine)
    return train.take(np.concatenate(taken))


def _without_fold(train: Pool, fold: Fold, seed: int) -> tuple[Pool, Pool]:
    """What is left of train, and the part that is taken. InputError where there are not so many parts."""
    if fold.number > fold.of:
        raise InputError(
            f"data.fold asks for part {fold.number} of {fold.of}", f"number goes from 1 to {fold.of}, which is `of`"
        )
    groups = None if fold.by is None else [str(row.tags[fold.by]) for row in train.rows()]
    part_N = folds(train.keys, fold.of, seed, train.classes, groups)
    if len(np.unique(part_N)) < fold.of:
        alike = "different rows" if fold.by is None else f"values of {fold.by!r} that share no row"
        raise InputError(
            f"data.fold divides train into {fold.of} parts, and there are only {len(np.unique(part_N))} {alike}",
            "ask for fewer parts, or give more rows",
        )
    return train.take(np.flatnonzero(part_N != fold.number - 1)), train.take(np.flatnonzero(part_N == fold.number - 1))


def _finished(
    maker: _Maker, pool: Pool, name: str, allow: Collection[str] | None
) -> tuple[TokenStore, SplitAudit, NDArray[np.int64]]:
    """The store, its audit, and which rows of the pool stand in it.

    Rows without a token are dropped. `allow` is given for train, where rows that teach nothing are
    refused or dropped too, and cut answers refused.
    """
    store = maker.store(pool, name)
    empty = store.lengths == 0
    masked = ~empty & (store.trained == 0) & maker.objective.needs.trains_tokens
    dropped = empty
    if allow is not None:
        audit.check_examples(store, np.flatnonzero(masked), allow)
        dropped = empty | masked
    kept = np.flatnonzero(~dropped)
    if not len(kept):
        raise InputError(f"no row of {name} has anything in it to use", "give rows with text")
    used = store if len(kept) == len(pool) else store.select(kept)
    return used, audit.split_audit(pool, used, int(masked.sum()), int(empty.sum())), kept


def _source_of(thing: object) -> str:
    """sha256 of the file that defines a thing's class, "" where there is none."""
    try:
        path = inspect.getsourcefile(type(thing))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except (OSError, TypeError):
        return ""


def _state(value: Any) -> Any:
    """Anything an objective may hold, as JSON that is the same in every process (a pickle's sets are not)."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Corpus):
        return value.fingerprint
    if isinstance(value, BaseModel):
        return _state(value.model_dump())
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return sorted(([repr(k), _state(v)] for k, v in entries.items()), key=lambda entry: entry[0])
    if isinstance(value, list | tuple):
        return [_state(v) for v in cast("Sequence[Any]", value)]
    if isinstance(value, set | frozenset):
        return sorted(repr(v) for v in cast("frozenset[Any]", value))
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__"):
        return [type(value).__qualname__, _state(vars(value))]
    return repr(value)


def _silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
