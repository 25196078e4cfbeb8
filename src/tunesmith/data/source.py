"""Training data as optimizer steps: a seeded order for each epoch, and a cursor of three integers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.pack import collate
from tunesmith.errors import InputError
from tunesmith.protocols import Annotator
from tunesmith.types import WINDOW, Batch, Example, Piece, Step

if TYPE_CHECKING:
    from tunesmith.models.policy import Policy

COUNTED_EPOCHS = 10_000


class Examples(Protocol):
    """What a source needs of a store: tokens of each example, and the example itself."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def example(self, index: int) -> Example: ...


class ExampleList:
    """Examples in memory, as `Examples`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        counts = [sum(len(piece.input_ids_T) for piece in example.pieces) for example in examples]
        self.lengths: NDArray[np.int64] = np.asarray(counts, dtype=np.int64)

    def example(self, index: int) -> Example:
        return self._examples[index]


class Extended:
    """Examples with more pieces behind their own, as `Examples`."""

    def __init__(self, examples: Examples, pieces: Sequence[tuple[Piece, ...]]) -> None:
        self._examples, self._pieces = examples, pieces
        more = [sum(len(piece.input_ids_T) for piece in own) for own in pieces]
        self.lengths: NDArray[np.int64] = examples.lengths + np.asarray(more, dtype=np.int64)

    def example(self, index: int) -> Example:
        found = self._examples.example(index)
        return replace(found, pieces=(*found.pieces, *self._pieces[index]))


@dataclass(frozen=True, slots=True)
class Batching:
    """How many examples (or tokens) make a step, and how many run through the model at once.

    A micro-batch ends at `micro_batch_size` examples, or before it would exceed
    `micro_batch_tokens`; a single longer example runs alone.
    """

    epochs: float | None
    max_steps: int | None
    batch_size: int | None
    batch_tokens: int | None
    micro_batch_size: int | None
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True)
class EasyFirst:
    """The order of the first `epochs`: from the least hard example up (Bengio et al. 2009; for sequences by length
    Amodei et al. 2016, arXiv 1512.02595, section 3.3). Those equally hard are in a random order, as all are later.
    """

    hardness_N: NDArray[np.float64]
    epochs: int


def epoch_order(
    repeats_N: NDArray[np.float64], epoch: int, seed: int, easy_first: EasyFirst | None = None
) -> NDArray[np.int64]:
    """Examples of one epoch in order. An example of weight w comes floor or ceil of w times.

    Over k epochs it comes k * w times up to one, because its fraction starts at a phase of its own.
    """
    phase_N = np.random.Generator(np.random.Philox(key=[seed, 2**32])).random(len(repeats_N))
    times_N = np.floor(phase_N + repeats_N * (epoch + 1)) - np.floor(phase_N + repeats_N * epoch)
    order = np.repeat(np.arange(len(repeats_N)), times_N.astype(np.int64))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(order)
    if easy_first is None or epoch >= easy_first.epochs:
        return order
    return order[np.argsort(easy_first.hardness_N[order], kind="stable")]


def epoch_steps(
    lengths_N: NDArray[np.int64],
    repeats_N: NDArray[np.float64],
    batching: Batching,
    epoch: int,
    seed: int,
    easy_first: EasyFirst | None = None,
) -> list[NDArray[np.int64]]:
    """The examples of each step of one epoch; the last step may be smaller."""
    order = epoch_order(repeats_N, epoch, seed, easy_first)
    if batching.batch_tokens is None:
        size = batching.batch_size or 1
        return [order[i : i + size] for i in range(0, len(order), size)]
    return [order[a:b] for a, b in _spans(lengths_N[order], None, batching.batch_tokens)]


def count_steps(
    lengths_N: NDArray[np.int64],
    repeats_N: NDArray[np.float64],
    batching: Batching,
    seed: int,
    easy_first: EasyFirst | None = None,
) -> int:
    """Steps of the whole run, exactly. Raises InputError where no example would ever come, or for endless counting."""
    if not repeats_N.any():
        raise InputError("there is no training row of a weight above 0", "give rows to train on, or a higher weight")
    if batching.max_steps is not None:
        return batching.max_steps
    epochs = batching.epochs or 1.0
    # Whole weights in steps of so many examples: every epoch has as many, and one tells of all.
    alike = batching.batch_tokens is None and not np.any(repeats_N % 1)
    counted = 1 if alike else math.ceil(epochs)
    if counted > COUNTED_EPOCHS:
        raise InputError(
            f"{epochs:,.0f} epochs of weighted rows, or of steps by tokens, are too many to be counted",
            "set train.max_steps instead of train.epochs",
        )
    counts = [len(epoch_steps(lengths_N, repeats_N, batching, e, seed, easy_first)) for e in range(counted)]
    counts *= math.ceil(epochs) // counted
    partial = epochs - math.floor(epochs)
    if partial:
        counts[-1] = math.ceil(counts[-1] * partial - 1e-9)
    return sum(counts)


def _spans(lengths: NDArray[np.int64], size: int | None, tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive spans of at most `size` entries and `tokens` tokens (a longer entry stands alone)."""
    start, total = 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > start and (total + length > tokens or (size is not None and i - start >= size)):
            yield start, i
            start, total = i, 0
        total += length
    if start < len(lengths):
        yield start, len(lengths)


def micro_batches(
    lengths_N: NDArray[np.int64], chosen: NDArray[np.int64], batching: Batching
) -> list[NDArray[np.int64]]:
    """The examples of a step by what goes through the model at once."""
    spans = _spans(lengths_N[chosen], batching.micro_batch_size, batching.micro_batch_tokens)
    return [chosen[a:b] for a, b in spans]


def first_batches(
    examples: Examples, repeats_N: NDArray[np.float64], seed: int, tokens: int, *, packed: bool, pad_id: int
) -> Iterator[Batch]:
    """What a run in random order sees first, up to so many tokens (one example at least), laid out without padding."""
    order = epoch_order(repeats_N, 0, seed)
    count = int((np.cumsum(examples.lengths[order]) <= tokens).sum())
    chosen = ExampleList([examples.example(int(i)) for i in order[: max(1, count)]])
    return batches(chosen, tokens if packed else 1, packed=packed, pad_id=pad_id)


class DataSource:
    """Steps over tokenised examples, made ahead by `workers` threads and handed out in order.

    `columns` are added to every batch by example; with "pooled" among them (vectors of a frozen
    backbone) batches carry no tokens at all.
    """

    def __init__(
        self,
        examples: Examples,
        batching: Batching,
        *,
        seed: int,
        packed: bool,
        pad_id: int,
        repeats_N: NDArray[np.float64] | None = None,
        easy_first: EasyFirst | None = None,
        columns: Mapping[str, NDArray[np.generic]] | None = None,
        annotator: Annotator | None = None,
        workers: int = 1,
    ) -> None:
        self._examples = examples
        self._batching = batching
        self._seed = seed
        self._packed = packed
        self._pad_id = pad_id
        self._repeats_N = np.ones(len(examples.lengths)) if repeats_N is None else repeats_N
        self._easy_first = easy_first
        self._columns = dict(columns or {})
        self._annotator = annotator
        self._workers = workers
        self._at = {"step": 0, "epoch": 0, "position": 0}
        self.total_steps = count_steps(examples.lengths, self._repeats_N, batching, seed, easy_first)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the step whose state this was."""
        self._at = {key: int(state[key]) for key in self._at}

    def steps(self, policy: Policy) -> Iterator[Step]:
        ahead: deque[Future[Step]] = deque()
        plan = self._plan()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="data") as pool:
            try:
                while True:
                    while len(ahead) <= self._workers and (chosen := next(plan, None)) is not None:
                        ahead.append(pool.submit(self._make, *chosen))
                    if not ahead:
                        return
                    yield self._annotated(policy, ahead.popleft().result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self) -> Iterator[tuple[dict[str, int], float, NDArray[np.int64]]]:
        """For each step to come: the state after it, the epoch it ends in, and its examples."""
        number, epoch, position = self._at["step"], self._at["epoch"], self._at["position"]
        while number < self.total_steps:
            chosen = epoch_steps(
                self._examples.lengths, self._repeats_N, self._batching, epoch, self._seed, self._easy_first
            )
            for index in range(position, len(chosen)):
                number += 1
                yield (
                    {"step": number, "epoch": epoch, "position": index + 1},
                    epoch + (index + 1) / len(chosen),
                    chosen[index],
                )
                if number == self.total_steps:
                    return
            epoch, position = epoch + 1, 0

    def _make(self, state: dict[str, int], epoch: float, chosen: NDArray[np.int64]) -> Step:
        parts = micro_batches(self._examples.lengths, chosen, self._batching)
        made = [replace(batch, step=state["step"]) for part in parts for batch in self._batches(part.tolist())]
        return Step(state["step"], made, state, epoch)

    def _batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        examples = [self._examples.example(index) for index in indices]
        if "pooled" in self._columns:
            examples = [replace(example, pieces=()) for example in examples]
        columns = {name: column[list(indices)] for name, column in self._columns.items()}
        for part in _apart(examples, self._batching.micro_batch_tokens):
            yield collate(part, indices, packed=self._packed, pad_id=self._pad_id, columns=columns)

    def _annotated(self, policy: Policy, step: Step) -> Step:
        if self._annotator is not None:
            step.batches = [self._annotator.annotate(policy, batch) for batch in step.batches]
        return step


def batches(
    examples: Examples,
    tokens: int,
    *,
    packed: bool,
    pad_id: int,
    columns: Mapping[str, NDArray[np.generic]] | None = None,
) -> Iterator[Batch]:
    """Every example once, those of like length together (longest first), for passes without gradient."""
    order = np.lexsort((np.arange(len(examples.lengths)), -examples.lengths))
    for a, b in _spans(examples.lengths[order], None, tokens):
        indices = order[a:b].tolist()
        chosen = {name: column[indices] for name, column in (columns or {}).items()}
        for part in _apart([examples.example(i) for i in indices], tokens):
            yield collate(part, indices, packed=packed, pad_id=pad_id, columns=chosen)


def _apart(examples: Sequence[Example], tokens: int) -> Iterator[Sequence[Example]]:
    """The examples as they are; one alone whose windows are more than so many tokens, so many at a time."""
    pieces = examples[0].pieces if len(examples) == 1 else ()
    if len(pieces) < 2 or any(piece.role != WINDOW for piece in pieces):
        yield examples
        return
    for a, b in _spans(np.array([len(piece.input_ids_T) for piece in pieces]), None, tokens):
        yield [replace(examples[0], pieces=pieces[a:b])]
