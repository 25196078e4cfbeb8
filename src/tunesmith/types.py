"""The data that passes between the parts: rows, examples, batches, scores, losses and results.

What the parts must do with it stands in `protocols.py`.

Shape letters: B rows, T positions, S segments, U units (what a loss is summed over), N examples,
V vocabulary, D width. A name carries its shape where that helps (`loss_U`, `target_BT`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]
Coupling = Literal["token", "example", "group", "batch"]
AnswerKind = Literal["text", "label", "number", "passages", "tags", "choices"]
_KINDS: dict[str, AnswerKind] = {"predicted": "number", "rank": "passages", "words": "tags", "choices": "choices"}
GradientMode = Literal["plain", "per_example", "cached"]
WINDOW = "window"
Number: TypeAlias = SupportsFloat  # a float, a tensor of one value, or one that is still on its way


# ---------------------------------------------------------------- data, before it is a batch


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data source in its canonical form, and where it was read.

    `tags` are the columns that groups and clusters of an evaluation are told by, as text.
    """

    value: dict[str, Any]
    where: str
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Piece:
    """One segment of an example: its tokens, and how much each of them is to be produced.

    `weights_T[t] > 0` says that token t must be produced by the model; None says none of them. `labels_T`, in place
    of weights: the class of token t itself, -1 for a token that has none. `typed_from`: where two texts are one piece
    and the tokenizer tells them apart by token types, the position from which on these are 1; 0: nowhere.
    """

    input_ids_T: NDArray[np.int32]
    weights_T: NDArray[np.float32] | None = None
    role: str = "text"
    stream: str = "input"
    labels_T: NDArray[np.int32] | None = None
    typed_from: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """What an objective makes of one row: pieces, scalar columns, and what truncation took.

    Pieces of the role WINDOW depend on nothing of each other: they may run in different micro-batches.
    """

    pieces: tuple[Piece, ...]
    columns: Mapping[str, float | int] = field(default_factory=dict[str, "float | int"])
    cut: int = 0
    cut_trained: int = 0


# ---------------------------------------------------------------- batches


@dataclass(slots=True)
class Stream:
    """The tokens of one input of the model. Padding has segment -1, position 0 and type 0.

    `type_ids_BT`: token types, as BERT knows them; None where all are 0.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    type_ids_BT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one row of a stream that attends to itself only. `labelled`: its piece has labels, not weights.

    `typed_from`: as in `Piece`.
    """

    row: int
    start: int
    length: int
    example: int
    role: str = "text"
    stream: str = "input"
    weight: float = 1.0
    labelled: bool = False
    typed_from: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class Batch:
    """One micro-batch, the same layout for every objective.

    `target_BT[b, t]` is what position t predicts: the token behind it in its segment, or its label; where `weight_BT`
    is 0 there is no loss and no logits are computed. Both belong to the decoder stream if there
    is one. The other positions are the units, row by row: `unit_U` indexes [B * T], `example_U` is the
    example of each. `Segment.example` indexes `examples`, which holds positions in the data set;
    `columns[name]` has one entry for each of `examples`. `step`: the number of the training step that the batch belongs
    to, which what is drawn at random for it is keyed by; 0 outside training. `common`: how many tokens all segments of
    a packed row begin with, where it is worth running them once; None while they are on the host, to be looked at.
    """

    streams: dict[str, Stream]
    target_BT: Tensor
    weight_BT: Tensor
    unit_U: Tensor
    example_U: Tensor
    segments: list[Segment]
    examples: list[int]
    columns: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    extra: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    step: int = 0
    common: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all streams, padding not counted."""
        return sum(s.length for s in self.segments)


@dataclass(slots=True)
class Step:
    """One optimizer step: its micro-batches, and the source's state after it."""

    number: int
    batches: list[Batch]
    state: dict[str, Any]
    epoch: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(b.tokens for b in self.batches)

    @property
    def examples(self) -> int:
        return sum(len(b.examples) for b in self.batches)


# ---------------------------------------------------------------- what a policy returns


@dataclass(frozen=True, slots=True)
class Want:
    """What a forward must return; nothing else is computed.

    logprobs, entropy: one number for each unit (position whose weight is not 0).
    pooled: one vector for each segment of `pool_stream`. values: one number for each unit,
    from the head called "value". hidden: the last hidden states, whole. reduce: what it makes of the logits [R, V] of
    some units, which the slice tells: [R, K], joined over all units.
    """

    logprobs: bool = False
    entropy: bool = False
    pooled: bool = False
    values: bool = False
    hidden: bool = False
    reduce: Callable[[Tensor, slice], Tensor] | None = None


@dataclass(slots=True)
class Scores:
    """Results of one forward. U runs over positions with weight, row by row."""

    weight_U: Tensor | None = None
    example_U: Tensor | None = None
    logprob_U: Tensor | None = None
    entropy_U: Tensor | None = None
    value_U: Tensor | None = None
    pooled_SD: Tensor | None = None
    hidden_BTD: Tensor | None = None
    reduced_UK: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to sample: greedy at temperature 0. `batch_tokens` bounds prompt tokens run together.

    Of the most probable tokens only the first `top_k` may come (0: all), and of those only as many as `top_p` of
    the probability takes. `on_token` is called with each token of a lone prompt's answer as it comes, the end token
    left out; where it returns True the answer ends there.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    batch_tokens: int = 4096
    seed: int = 0
    on_token: Callable[[int], bool] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens that followed one prompt, end token excluded; `finished` if the model ended itself."""

    token_ids: list[int]
    finished: bool


# ---------------------------------------------------------------- losses and steps


@dataclass(slots=True)
class Part:
    """One part of a loss: per unit the loss, its weight, and the example it came from."""

    loss_U: Tensor
    weight_U: Tensor
    example_U: Tensor


@dataclass(slots=True)
class Terms:
    """The parts of a loss by name, and metrics as (sum, weight)."""

    parts: dict[str, Part]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict[str, "tuple[float, float]"])


class StepStats:
    """What one step measured. `loss` is the sum of all parts by their normalisers; to look at either is to wait."""

    def __init__(
        self, loss: Number, parts: Mapping[str, Number], metrics: dict[str, float], tokens: int, skipped: bool = False
    ) -> None:
        self._loss, self._parts = loss, parts
        self.metrics, self.tokens, self.skipped = metrics, tokens, skipped

    @property
    def loss(self) -> float:
        return float(self._loss)

    @property
    def parts(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._parts.items()}


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answered to one row, and what was expected.

    `output` is text or a label; with `multi_label` both it and `reference` are JSON lists of labels. `scores` holds
    numbers for the row (`nll` in nats summed over the trained tokens, `tokens`; or `nll` of the label and `tokens` 1;
    or `nll` of the decisions on all labels and their number); `probabilities` by label. `finished`: it ended itself,
    and was not cut off. `other_references`: what is as right as `reference`, where rows have several answers.
    `label_set`: labels of which one is right as often as was asked for (`evaluation.conformal`); None: not asked for.
    """

    output: str
    reference: str | None
    where: str
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    probabilities: Mapping[str, float] | None = None
    finished: bool = True
    multi_label: bool = False
    other_references: tuple[str, ...] = ()
    label_set: tuple[str, ...] | None = None

    @property
    def kind(self) -> AnswerKind:
        """What the answer is, by a score that only such have; else labels that were learned, or a text."""
        for score, kind in _KINDS.items():
            if score in self.scores:
                return kind
        return "label" if self.probabilities is not None or self.multi_label else "text"

    @property
    def references(self) -> tuple[str, ...]:
        """All answers that are right, `reference` first; none where there is none."""
        return () if self.reference is None else (self.reference, *self.other_references)

    @property
    def answered(self) -> list[str]:
        """The labels that were answered, if these are labels."""
        return json.loads(self.output) if self.multi_label else [self.output]

    @property
    def expected(self) -> list[str]:
        """The labels that were expected; none where there is no reference, or no label is right."""
        if self.reference is None:
            return []
        return json.loads(self.reference) if self.multi_label else [self.reference]


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How many of the training rows, of which there are `rows`, have each label."""

    of: Mapping[str, int]
    rows: int


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its 95% interval over n rows; a record of evaluation.json.

    Where the rows cannot carry an interval, its limits are NaN (null in the file) and `reason` says why. `signature`:
    how another library computed it, in that library's words.
    """

    model: str
    data: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    group: str = "all"
    reason: str | None = None
    signature: str | None = None
