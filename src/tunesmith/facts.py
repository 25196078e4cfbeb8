"""What is known before weights load: the model's shape, the method's and objective's declarations, the hardware."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.compat import FP32_ONLY, values_unread
from tunesmith.data.pack import collate
from tunesmith.declared import MethodFacts, ObjectiveNeeds
from tunesmith.engine.precision import choose_device, is_served, probe, serves_fp8
from tunesmith.kernels.nf4 import served_linears
from tunesmith.models.cache import cache_dir
from tunesmith.models.fetch import LocalModel
from tunesmith.models.load import MetaModel, meta_model
from tunesmith.models.policy import Policy, Tokens
from tunesmith.trackers import TRACKERS
from tunesmith.types import Example, ModelKind, Piece, Want

if TYPE_CHECKING:
    from tunesmith.beneath import Beneath
    from tunesmith.engine.precision import Speed
    from tunesmith.protocols import Method, Objective
    from tunesmith.recipe import Recipe
    from tunesmith.teachers import Teacher

DEFAULT_POOLING: dict[ModelKind, str] = {"encoder": "mean", "decoder": "last", "encoder-decoder": "mean"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A base by its config alone. `packable`: its attention stays inside segments; `autocasts`: it runs in bf16.

    `linear_parameters` are those that int4 holds in 4 bits.
    `takes_keys`: keys and values can be put before those of its attention, by us and by other libraries.
    """

    name: str
    model_type: str
    kind: ModelKind
    parameters: int
    embedding_parameters: int
    layers: int
    width: int
    intermediate: int
    vocabulary: int
    context_length: int | None
    tied_embeddings: bool
    packable: bool
    pooling: str
    has_template: bool
    autocasts: bool = True
    linear_parameters: int = 0
    takes_keys: bool = True


@dataclass(frozen=True, slots=True)
class Previous:
    """The earlier run that this one goes on from."""

    method: dict[str, Any]
    objective: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the rules of compatibility may look at."""

    recipe: Recipe
    method_name: str
    method: MethodFacts
    objective_name: str
    needs: ObjectiveNeeds
    model: ModelFacts
    device: str
    device_served: bool
    bf16_served: bool
    fp8_served: bool
    previous: Previous | None = None
    beneath: tuple[Beneath, ...] = ()
    base_sha256: str = ""
    missing_trackers: tuple[tuple[str, str], ...] = ()  # name and package
    teacher: Teacher | None = None

    @property
    def caches_vectors(self) -> bool:
        """Whether each example goes through the backbone once, and training sees its vector alone."""
        return self.method.frozen_backbone and self.needs.head == "pooled" and self.needs.vectors == "text"

    @property
    def multiplies_otherwise(self) -> bool:
        """Whether layers that train are multiplied in the run's precision while they learn, and are held in another."""
        return self.recipe.precision in self.method.multiplies_in

    @property
    def context_length(self) -> int | None:
        """Tokens of a text that the model sees, beside the method's virtual ones; None where nothing sets a limit."""
        length = self.model.context_length
        return None if length is None else length - self.method.virtual_tokens

    @property
    def shares_beginnings(self) -> bool:
        """Whether what all texts of a micro-batch begin with runs once."""
        return self.packed and self.model.kind == "decoder"

    @property
    def runs_beginnings_once(self) -> bool:
        """Whether the beginning of an example that branches runs once: where that runs alone, nothing dropped out."""
        train = self.recipe.train
        return self.shares_beginnings and not train.dropout and (train.micro_batch_size or 1) == 1

    @property
    def packed(self) -> bool:
        return self.model.packable and self.method.packs

    def first_beneath(self, wrong: Callable[[Beneath], bool]) -> Beneath | None:
        """The first adapter that the trained one would stand on and cannot."""
        return next(filter(wrong, self.beneath), None)


def gather_model(
    local: LocalModel, needs: ObjectiveNeeds, has_template: bool, pooling: str | None = None
) -> tuple[ModelFacts, MetaModel]:
    """Facts of a base, from its config on the meta device; `pooling` is the one asked for, if any."""
    meta = meta_model(local, needs.head)
    text = meta.module.config.get_text_config()  # type: ignore[union-attr]
    intermediate = getattr(text, "intermediate_size", None) or 4 * meta.width
    usual = local.entry.pooling if local.entry is not None else None
    packable = is_packable(meta)
    facts = ModelFacts(
        name=local.name,
        model_type=meta.model_type,
        kind=meta.kind,
        parameters=meta.parameters,
        embedding_parameters=meta.embedding_parameters,
        layers=meta.layers,
        width=meta.width,
        intermediate=int(intermediate),  # type: ignore[arg-type]
        vocabulary=meta.vocab_size,
        context_length=meta.context_length,
        tied_embeddings=meta.tied_embeddings,
        packable=packable,
        pooling=pooling or usual or DEFAULT_POOLING[meta.kind],
        has_template=has_template,
        autocasts=meta.model_type not in FP32_ONLY,
        linear_parameters=sum(linear.weight.numel() for _, linear in served_linears(meta.module)),
        takes_keys=packable and "past_key_values" in inspect.signature(meta.module.forward).parameters,
    )
    return facts, meta


def is_packable(meta: MetaModel) -> bool:
    """Whether every layer of the model asks for segment bounds: one forward of shapes tells."""
    if meta.kind == "encoder-decoder":
        return False
    try:
        # Experts multiply in bf16 only where there are no values.
        return any(_layers_that_ask(meta, dtype) >= meta.layers for dtype in (torch.float32, torch.bfloat16))
    finally:
        meta.module.to(torch.float32)


def _layers_that_ask(meta: MetaModel, dtype: torch.dtype) -> int:
    """Attention calls of one forward that asked for bounds; 0 where there is no such forward."""
    import numpy as np

    piece = Piece(np.asarray([1, 2, 3], dtype=np.int32))
    try:
        policy = Policy(meta.module.to(dtype), meta.kind, Tokens((0,), 0), packed=True)
        batch = collate([Example((piece,)), Example((piece,))], [0, 1], packed=True, pad_id=0)
        for stream in batch.streams.values():
            stream.input_ids_BT = stream.input_ids_BT.to("meta")
            stream.position_ids_BT = stream.position_ids_BT.to("meta")
        batch.common = 0  # no values are there, of which two could be alike
        with torch.no_grad(), values_unread():
            policy.score(batch, Want(hidden=True))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return 0
    return policy.asked


def gather(
    recipe: Recipe,
    method: Method,
    objective: Objective,
    model: ModelFacts,
    previous: Previous | None,
    beneath: tuple[Beneath, ...],
    base_sha256: str,
    teacher: Teacher | None = None,
) -> tuple[Facts, Speed | None]:
    """The facts of a run, with the measured speed of its device (None where it is not served)."""
    served = is_served(recipe.place.device)
    speed = probe(choose_device(recipe.place.device), cache_dir()) if served else None
    facts = Facts(
        recipe=recipe,
        method_name=recipe.method.name,
        method=method.facts,
        objective_name=recipe.objective.name,
        needs=objective.needs,
        model=model,
        device=recipe.place.device,
        device_served=served,
        bf16_served=speed is not None and speed.bf16 > 0,
        fp8_served=served and serves_fp8(choose_device(recipe.place.device)),
        previous=previous,
        beneath=beneath,
        base_sha256=base_sha256,
        missing_trackers=tuple(_missing_trackers(recipe.report_to)),
        teacher=teacher,
    )
    return facts, speed


def _missing_trackers(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        tracker = TRACKERS.get(name)
        if find_spec(tracker.module) is None:
            yield name, tracker.package
