"""What methods and objectives declare of themselves, so that the plan can reason over it before weights load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.types import Coupling, GradientMode, ModelKind


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What the plan must know of a method; of an instance, as its options have it.

    `when`: in one line, when to choose the method. `reference`: how the base is had back: an adapter is switched
    off, changed weights are read from the base again, or not at all. `frozen_backbone`: nothing below the heads or
    the output projection trains.
    `moves_output`: the output projection trains and the embeddings do not, so a tied one must be untied, which
    `unties` does. `packs`, `recomputes`: segments may share a row, layers may run again in the backward.
    `tokens` are added to the vocabulary and their rows train. `frozen_in`: what else than bf16 the base may be in.
    `multiplies_in`: in what else than bf16 trained layers are multiplied while they learn.
    `virtual_tokens` stand before every text and count against the model's context. `feeds_attention`: keys and values
    of its own go into every layer's attention.
    `learning_rate_source` says where the default rate is from. `combines`: the ways in which several of its adapters
    become one. `stands_on`: methods whose adapters, frozen, can be in use beneath one of its own.
    """

    summary: str
    kinds: frozenset[ModelKind]
    heads: frozenset[str]
    reference: Literal["switch", "snapshot", "none"]
    learning_rate: float
    learning_rate_source: str
    when: str = ""
    frozen_backbone: bool = False
    mergeable: bool = False
    moves_output: bool = False
    unties: bool = False
    packs: bool = True
    recomputes: bool = True
    frozen_in: frozenset[str] = frozenset()
    multiplies_in: frozenset[str] = frozenset()
    tokens: tuple[str, ...] = ()
    virtual_tokens: int = 0
    feeds_attention: bool = False
    combines: frozenset[str] = frozenset()
    stands_on: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Combination:
    """How adapters become one: the way, what each counts, and what the way asks for.

    `density`: the share of entries that a pruning way keeps; `rank`: where a way cuts to one, the largest of the
    adapters' if None; `seed`: of what is drawn.
    """

    how: str
    weights: tuple[float, ...]
    density: float = 0.5
    rank: int | None = None
    seed: int = 17


@dataclass(frozen=True, slots=True)
class ObjectiveNeeds:
    """What an objective asks of data, model and engine.

    `formats` are kinds of canonical rows (messages, label, text); `vectors`: a pooled head reads one vector a row's
    text, one for each of its texts, one a token, or what two make; `trains_tokens`: a row without a trained token
    teaches nothing; `windows`: longer texts come in windows of train.sequence_length; `metrics` are measured unless the
    recipe names others. `baseline`: what the tuned model is compared with where the base has no trained head
    (`evaluation.baselines`). `fresh_head`: a head begins anew above the base's vectors; `searches`: answers are found
    in a corpus (`data.corpus`). `asks`: what a row to be read must have, all of one of these. `teacher`: it learns from
    another model. `generates`: with a language model's head, answers are written token by token. `branches`: the
    pieces of an example are a beginning and what may follow it, each alone. `negatives`: wrong passages that a row is
    given; `rereads`: of the passages that the base finds, those that are read again; both if the options do not say.
    """

    summary: str
    head: Literal["lm", "pooled"]
    formats: frozenset[str]
    kinds: frozenset[ModelKind]
    coupling: Coupling = "token"
    modes: frozenset[GradientMode] = frozenset({"plain", "per_example"})
    trains_tokens: bool = False
    windows: bool = False
    metrics: tuple[str, ...] = ()
    baseline: str | None = None
    vectors: Literal["text", "texts", "token", "pair"] = "text"
    fresh_head: bool = True
    searches: bool = False
    asks: tuple[tuple[str, ...], ...] = (("text",),)
    teacher: bool = False
    generates: bool = True
    branches: bool = False
    negatives: int = 0
    rereads: int = 0

    @property
    def writes(self) -> bool:
        """Whether the model's answers are generated text."""
        return self.head == "lm" and self.generates


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head to add to a backbone: fresh, always trained, always saved beside the adapter.

    `hidden`: width of a layer between vector and outputs; 0 for a linear head. `per_token`: it reads a token's vector,
    not that of a text. `vectors`: of how many of the base's width its input is made; 0 for a single number. `fitted`:
    it does not train, its weights are set before training begins.
    """

    name: str
    outputs: int
    labels: tuple[str, ...] = ()
    hidden: int = 0
    per_token: bool = False
    vectors: int = 1
    fitted: bool = False
