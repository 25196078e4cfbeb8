"""The contracts between data, policies, methods, objectives, engines and gradient rules.

Shape letters: B rows, T positions, S segments, U units (what a loss is summed over), N examples,
V vocabulary, D width. A name carries its shape where that helps (`loss_U`, `target_BT`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tunesmith.data.chat import Renderer
    from tunesmith.models.policy import Policy

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]
Coupling = Literal["token", "example", "group", "batch"]
GradientMode = Literal["plain", "per_example", "cached"]


# ---------------------------------------------------------------- data, before it is a batch


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data source in its canonical form, and where it was read."""

    value: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One segment of an example: its tokens, and how much each of them is to be produced.

    `weights_T[t] > 0` says that token t must be produced by the model; None says none of them.
    """

    input_ids_T: NDArray[np.int32]
    weights_T: NDArray[np.float32] | None = None
    role: str = "text"
    stream: str = "input"


@dataclass(frozen=True, slots=True)
class Example:
    """What an objective makes of one row: pieces, scalar columns, and what truncation took."""

    pieces: tuple[Piece, ...]
    columns: Mapping[str, float | int] = field(default_factory=dict[str, "float | int"])
    cut: int = 0
    cut_trained: int = 0


# ---------------------------------------------------------------- batches


@dataclass(slots=True)
class Stream:
    """The tokens of one input of the model. Padding has segment -1 and position 0."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one row of a stream that attends to itself only."""

    row: int
    start: int
    length: int
    example: int
    role: str = "text"
    stream: str = "input"
    weight: float = 1.0

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class Batch:
    """One micro-batch, the same layout for every objective.

    `target_BT[b, t]` is what position t predicts, shifted inside its segment; where `weight_BT`
    is 0 there is no loss and no logits are computed. Both belong to the decoder stream if there
    is one. `Segment.example` indexes `examples`, which holds positions in the data set;
    `columns[name]` has one entry for each of `examples`.
    """

    streams: dict[str, Stream]
    target_BT: Tensor
    weight_BT: Tensor
    segments: list[Segment]
    examples: list[int]
    columns: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    extra: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])

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
    from the head called "value". hidden: the last hidden states, whole.
    """

    logprobs: bool = False
    entropy: bool = False
    pooled: bool = False
    values: bool = False
    hidden: bool = False


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


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to sample: greedy at temperature 0. `batch_tokens` bounds prompt tokens run together."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    batch_tokens: int = 4096
    seed: int = 0


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


@dataclass(slots=True)
class StepStats:
    """What one step measured. `loss` is the sum of all parts, each divided by its normaliser."""

    loss: float
    parts: dict[str, float]
    metrics: dict[str, float]
    tokens: int
    skipped: bool = False


# ---------------------------------------------------------------- facts that the plan reasons over


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What the plan must know of a method. `reference`: how the base is had back."""

    summary: str
    kinds: frozenset[ModelKind]
    heads: frozenset[str]
    reference: Literal["switch", "snapshot", "none"]
    frozen_backbone: bool = False
    mergeable: bool = False
    default_learning_rate: float = 1e-4


@dataclass(frozen=True, slots=True)
class ObjectiveNeeds:
    """What an objective asks of data, model and engine.

    `formats` are kinds of canonical rows (messages, label, text); `trains_tokens`: a row without a
    trained token teaches nothing; `metrics` are measured unless the recipe names others.
    """

    summary: str
    head: Literal["lm", "pooled"]
    formats: frozenset[str]
    kinds: frozenset[ModelKind]
    coupling: Coupling = "token"
    modes: frozenset[GradientMode] = frozenset({"plain", "per_example"})
    trains_tokens: bool = False
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head to add to a backbone: fresh, always trained, always saved beside the adapter."""

    name: str
    outputs: int
    labels: tuple[str, ...] = ()


# ---------------------------------------------------------------- protocols


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state a checkpoint holds: tensors, and what fits in JSON."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Method(Protocol):
    """Which parameters train. `Options` is the pydantic model of the recipe's keys."""

    facts: ClassVar[MethodFacts]
    Options: ClassVar[type[Any]]

    options: Any

    def __init__(self, options: Any, dropout: float) -> None: ...
    def attach(self, policy: Policy) -> None:
        """Make exactly the method's parameters (and fresh heads) trainable, in place."""
        ...

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]: ...
    def reference(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside, the policy is the base again, exactly."""
        ...

    def export(self, policy: Policy, to: Path) -> None:
        """Write what was trained as a folder that PEFT or transformers loads as it is."""
        ...

    def load(self, policy: Policy, source: Path) -> None:
        """Attach what `export` wrote, for inference or to go on from it."""
        ...


class Objective(Protocol):
    """Which loss, on which batch, and how the trained thing is used."""

    needs: ClassVar[ObjectiveNeeds]
    Options: ClassVar[type[Any]]

    def __init__(self, options: Any) -> None: ...
    def fit(self, rows: Iterable[Row]) -> None:
        """Learn from the training rows what examples need (the label set); called once, first."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `fit` learned, as JSON, kept in the run; `adopt` takes it back."""
        ...

    def adopt(self, description: Mapping[str, Any]) -> None: ...
    def heads(self) -> list[HeadSpec]: ...
    def example(self, row: Row, renderer: Renderer) -> Example: ...
    def normalisers(self, step: Step) -> dict[str, float]:
        """One per part of the loss, over the whole step, known before any forward."""
        ...

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        """Exactly one forward with gradient."""
        ...

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """Answers to rows, in their order; `spec` says how to sample where answers are sampled."""
        ...


@runtime_checkable
class Coupled(Protocol):
    """An objective of coupling "batch": its loss needs the vectors of all micro-batches at once.

    The engine embeds each micro-batch without gradient, takes the gradient of `couple` to the
    vectors, then embeds again with gradient (cached gradients: Gao et al. 2021, arXiv 2101.06983).
    """

    def embed(self, policy: Policy, batch: Batch) -> Tensor: ...
    def couple(self, embeddings_SD: Tensor, step: Step) -> Terms: ...


@runtime_checkable
class Annotator(Protocol):
    """An objective with passes that take no gradient (reference, teacher, old policy).

    The source calls it once for each batch and trains on what it returns.
    """

    def annotate(self, policy: Policy, batch: Batch) -> Batch: ...


class Source(Protocol):
    """Where steps come from: data, a replay mix, or rollouts."""

    total_steps: int

    def steps(self, policy: Policy) -> Iterator[Step]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Engine(Protocol):
    """Placement, gradients, the optimizer, and what of them a checkpoint holds.

    Gradients are sums divided by the step's normalisers. `trainable` names the parameters in a
    fixed order.
    """

    device: torch.device
    trainable: dict[str, nn.Parameter]

    def forward_backward(self, objective: Objective, policy: Policy, step: Step) -> StepStats: ...
    def step(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class GradientRule(Protocol):
    """What may touch gradients between backward and the optimizer's step.

    A rule of mode "per_example" also has `example(gradients) -> gradients`, called by the engine
    with each example's own gradient before they are summed.
    """

    mode: ClassVar[GradientMode]

    def before_step(self, engine: Engine, number: int) -> dict[str, float]:
        """Returns what is worth a column in metrics.jsonl, such as the gradient's norm."""
        ...

    def after_step(self, engine: Engine, number: int) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answered to one row, and what was expected.

    `output` is text or a label; `scores` holds numbers for the row (`nll` in nats summed over the
    trained tokens, `tokens`; or `nll` of the label and `tokens` 1); `probabilities` by label.
    """

    output: str
    reference: str | None
    where: str
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    probabilities: Mapping[str, float] | None = None
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its 95% interval over n rows; a record of evaluation.json."""

    model: str
    data: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    group: str = "all"
