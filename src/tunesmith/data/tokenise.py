"""Rows -> examples, in this process or in several; the examples and their order are the same."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

from tunesmith import errors
from tunesmith.data.pool import Pool
from tunesmith.protocols import Objective
from tunesmith.types import Example

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

CHUNK = 256
PARALLEL_ROWS = 20_000  # starting a worker costs seconds of imports, as much as tokenising some thousands of rows

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Failure:
    """A TunesmithError on its way out of a worker: exceptions with two arguments do not survive pickling."""

    kind: str
    cause: str
    remedy: str


class _Worker:
    """What a worker process holds between chunks."""

    work: tuple[Pool, Objective, Renderer] | None = None


def tokenise(
    pool: Pool, objective: Objective, renderer: Renderer, workers: int, advance: Advance
) -> Iterator[tuple[Example, bytes]]:
    """Each row's example and its line, in the pool's order. `advance` is told how many are done.

    ResourceError: a worker died, for want of memory as a rule.
    """
    if workers < 2 or len(pool) <= PARALLEL_ROWS:
        for start in range(0, len(pool), CHUNK):
            stop = min(start + CHUNK, len(pool))
            for i in range(start, stop):
                yield _example(pool, i, objective, renderer), pool.line(i)
            advance(stop)
        return
    try:
        yield from _in_workers(pool, objective, renderer, workers, advance)
    except BrokenProcessPool:
        raise errors.ResourceError(
            "a process that tokenises was killed, likely for want of memory", "set place.workers lower"
        ) from None


def _in_workers(
    pool: Pool, objective: Objective, renderer: Renderer, workers: int, advance: Advance
) -> Iterator[tuple[Example, bytes]]:
    starts = iter(range(0, len(pool), CHUNK))
    # A fork would copy locks that threads of torch and tokenizers hold.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (pool, objective, renderer)) as processes:
        ahead: deque[tuple[int, Future[list[Example] | _Failure]]] = deque()
        try:
            while True:
                # Only so far ahead of the writer: results that wait are memory.
                while len(ahead) < 3 * workers and (start := next(starts, None)) is not None:
                    ahead.append((start, processes.submit(_chunk, start, min(start + CHUNK, len(pool)))))
                if not ahead:
                    return
                start, future = ahead.popleft()
                examples = future.result()
                if isinstance(examples, _Failure):
                    raise getattr(errors, examples.kind)(examples.cause, examples.remedy)
                for i, example in enumerate(examples, start):
                    yield example, pool.line(i)
                advance(start + len(examples))
        finally:
            processes.shutdown(cancel_futures=True)


def _example(pool: Pool, i: int, objective: Objective, renderer: Renderer) -> Example:
    """The example of row i; what is wrong with it is said with its place."""
    row = pool.row(i)
    with errors.placed(row.where):
        return objective.example(row, renderer)


def _start(pool: Pool, objective: Objective, renderer: Renderer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _Worker.work = (pool, objective, renderer)


def _chunk(start: int, stop: int) -> list[Example] | _Failure:
    assert _Worker.work is not None
    pool, objective, renderer = _Worker.work
    try:
        return [_example(pool, i, objective, renderer) for i in range(start, stop)]
    except errors.TunesmithError as error:
        kind = type(error).__name__ if hasattr(errors, type(error).__name__) else "TunesmithError"
        return _Failure(kind, error.cause, error.remedy)
