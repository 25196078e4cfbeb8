"""What a method, an objective, a source, an engine and a gradient rule must do: the contracts between the parts.

The data that they pass to each other stands in `types.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from tunesmith.declared import Combination, HeadSpec, MethodFacts, ObjectiveNeeds
from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.types import (
    Batch,
    Example,
    GradientMode,
    LabelCounts,
    Number,
    Piece,
    Prediction,
    Row,
    SampleSpec,
    Step,
    StepStats,
    Terms,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from tunesmith.data.chat import Renderer
    from tunesmith.data.corpus import Corpus
    from tunesmith.data.store import TokenStore
    from tunesmith.models.policy import Policy


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state a checkpoint holds: tensors, and what fits in JSON."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Method(Protocol):
    """Which parameters train. `Options` is the pydantic model of the recipe's keys."""

    facts: MethodFacts
    Options: ClassVar[type[Any]]

    options: Any

    def __init__(self, options: Any, dropout: float) -> None: ...
    def attach(self, policy: Policy) -> None:
        """Make exactly the method's parameters (and fresh heads) trainable, in place."""
        ...

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        """What trains, as torch's optimizers take it; `times` in a group multiplies the run's learning rate."""
        ...

    def reference(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside, the policy is the base again, exactly."""
        ...

    def export(self, policy: Policy, to: Path) -> None:
        """Write what was trained as a folder that PEFT or transformers loads as it is."""
        ...

    def load(self, policy: Policy, source: Path) -> None:
        """Attach what `export` wrote, for inference or to go on from it."""
        ...


@runtime_checkable
class Mergeable(Protocol):
    """A method whose adapter can become part of the base's weights."""

    def merge(self, policy: Policy) -> None:
        """The policy's model is then a plain one of transformers; there is no way back."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A method whose start may depend on what the base makes of training examples."""

    def fit(self, policy: Policy, batches: Iterable[Batch]) -> None:
        """Called once, after `attach`, with a few batches that hold no padding; the base's outputs stay as they are."""
        ...


@runtime_checkable
class Stacked(Protocol):
    """A method whose adapter can stand on saved ones, of the methods that its facts name."""

    def stand_on(self, policy: Policy, folders: Sequence[Path]) -> None:
        """Puts them into use beneath its own, which is attached, from the base up; they are frozen from then on."""
        ...


@runtime_checkable
class Combinable(Protocol):
    """A method whose adapters add up to one of the same method, in the ways that its facts name."""

    @classmethod
    def combine(cls, folders: Sequence[Path], combination: Combination, to: Path) -> Any:
        """Writes into `to` what `load` takes; returns the options that it has. InputError where it cannot be."""
        ...


@runtime_checkable
class Ruled(Protocol):
    """A method with gradient rules of its own: which layers move yet, how ranks are spent."""

    def rules(self, policy: Policy, total_steps: int) -> list[GradientRule]: ...


@runtime_checkable
class Unread(Protocol):
    """An objective whose answers are of a kind that can be given without reading: what a baseline says."""

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """An answer for each row; None where the training rows' labels are needed and not known."""
        ...


@runtime_checkable
class Grounded(Protocol):
    """An objective that measures what the base's own vectors come to before anything is learned."""

    def ground(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> None:
        """Sets what heads begin from, and the one that `untuned` answers by; of training rows, the policy is the base.

        Called once, before the first step of a run that does not go on from another.
        """
        ...

    def untuned(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """What the tuned model is compared with: an answer for each row, by a policy that is the base."""
        ...


class Objective(Protocol):
    """Which loss, on which batch, and how the trained thing is used."""

    needs: ClassVar[ObjectiveNeeds]
    Options: ClassVar[type[Any]]

    options: Any

    def __init__(self, options: Any) -> None: ...
    def fit(self, rows: Iterable[Row]) -> None:
        """Learn from the training rows what examples need (the label set); called once, first.

        Behind `adopt` only where a head of an earlier run goes on, whose unit stays.
        """
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
class Draws(Protocol):
    """An objective whose model writes answers, of which several can be drawn."""

    def draw(
        self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec, count: int
    ) -> list[list[str]]:
        """`count` answers to each row, drawn as `spec` says."""
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
class Searches(Protocol):
    """An objective whose model finds passages: those of a corpus, and those that rows hold themselves."""

    def search_in(self, corpus: Corpus) -> None:
        """Called before any row is looked at, where there is a corpus."""
        ...


@runtime_checkable
class Mines(Protocol):
    """An objective that adds pieces to training examples, chosen by the vectors of the model as it starts."""

    mines: int

    def mine(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> NDArray[np.int32]:
        """[N, mines] positions of what is added to each row's example, -1 for nothing; not called where `mines` is 0.

        The policy is that of the run before its first step.
        """
        ...

    def added(self, mined_NK: NDArray[np.int32], rows: Sequence[Row], renderer: Renderer) -> list[tuple[Piece, ...]]:
        """The pieces at these positions, for each row."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """An objective whose answers are the model's vectors alone, so that others can use these as they are."""

    def prompts(self) -> dict[str, str]:
        """What stands before each kind of text, by the name that sentence-transformers has for it."""
        ...


@runtime_checkable
class Converses(Protocol):
    """An objective whose model answers conversations, so that it can be chatted with.

    `system` is the system message that all of training had, None where there was none or several.
    """

    system: str | None

    def prompt(self, row: Row, renderer: Renderer) -> list[int]:
        """The tokens that the answer to the row's messages follows, as training saw them."""
        ...


@runtime_checkable
class Annotator(Protocol):
    """An objective that makes of a batch what is trained on: by passes without gradient (reference, old policy), or
    by what it draws (`Batch.step`).

    The source calls it once for each batch, before it is on the device, and trains on what it returns; so does
    validation.
    """

    def annotate(self, policy: Policy, batch: Batch) -> Batch: ...


@runtime_checkable
class Taught(Protocol):
    """An objective that learns from another model, the recipe's `teacher`."""

    def learn_from(self, teacher: Policy, student: Policy, examples: TokenStore, tokens: int, cache: Path) -> None:
        """Called once, before training: `tokens` of the training examples may run at once; `cache` keeps files."""
        ...


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
    runs_ahead: bool  # `step` returns while the device is still at it

    def forward_backward(self, objective: Objective, policy: Policy, step: Step) -> StepStats: ...
    def hold(self, bad: Tensor) -> None:
        """The next `step` moves nothing if this truth value of the device is true; it is not waited for."""
        ...

    def scale(self, factor: Tensor) -> None:
        """The next `step` takes all gradients `factor` times (one float32 of the device)."""
        ...

    def step(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class GradientRule(Protocol):
    """What may touch gradients between backward and the optimizer's step.

    A rule of mode "per_example" also has `example(gradients) -> gradients`, called by the engine
    with each example's own gradient before they are summed.
    """

    mode: ClassVar[GradientMode]

    def before_step(self, engine: Engine, number: int) -> Mapping[str, Number]:
        """Returns what is worth a column in metrics.jsonl, such as the gradient's norm; nobody looks at it at once."""
        ...

    def after_step(self, engine: Engine, number: int) -> None:
        """The step is on its way; what `hold` stopped is told by whoever looks at its numbers."""
        ...

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Tracker(Protocol):
    """Where the numbers of a run go besides its folder; made when the run begins, and when it goes on.

    `module` is what it imports and `package` what pip calls that. `key` finds the run there again; `where` tells a
    person. Anything may raise: the run goes on without the tracker, and says so.
    """

    package: ClassVar[str]
    module: ClassVar[str]

    key: str
    where: str

    def __init__(self, run: TrackedRun) -> None: ...
    def held(self, kind: str) -> int | None:
        """The last step whose points of a kind ("train", "validation") are there; None if it cannot tell."""
        ...

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of one step, named "train/loss" and so on. Steps come in their order, and may come twice."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """The last word: everything is sent before it returns."""
        ...
