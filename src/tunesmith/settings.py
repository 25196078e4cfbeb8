"""The recipe's training keys with every default resolved, and why each default was taken."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from tunesmith.data.source import Batching, EasyFirst, count_steps
from tunesmith.engine import memory
from tunesmith.engine.precision import Speed, choose_device
from tunesmith.errors import ResourceError
from tunesmith.models.recompute import Again

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.facts import Facts

LENGTH_LIMIT = 2048  # tokens of an example where the recipe names none
MICRO_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}  # beyond these a larger micro-batch was not faster
MEMORY_SHARE = 0.7  # of what is free: the rest is for other processes and what the model leaves out
FP8_GAIN = 1.4  # of whole LoRA steps over bf16 on an H100: only the frozen products are in fp8
INT4_GAIN = 0.97  # likewise: weights are made anew in both passes (benchmarks/gpu/NOTES.md)
COMPILING_PAYS = 240.0  # seconds of training: compiling takes 20 to 90, and steps are 1.2 to 1.6 times as fast
EFFICIENCY = {"cpu": 0.7, "mps": 0.4, "cuda": 0.45}  # of the probed matrix-product rate, whole steps


@dataclass(frozen=True, slots=True)
class Default:
    """A key that the recipe left out, the value it got, and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Meaning:
    """What decides the trained numbers, beside data and base."""

    epochs: float | None
    max_steps: int | None
    batch_size: int | None
    batch_tokens: int | None
    sequence_length: int
    learning_rate: float
    head_learning_rate: float | None
    schedule: str
    warmup: float
    weight_decay: float
    optimizer: str
    clip: float | None
    dropout: float
    total_steps: int
    evaluate_every: int | None
    curriculum: dict[str, Any] | None
    early_stopping: dict[str, Any] | None
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what pieces it runs; kept by a resume, free to differ between runs.

    recompute: what the first `recomputed` layers run again in the backward; see `models.recompute`. trained: what the
    base's own weights are in where they train.
    """

    device: str
    threads: int
    workers: int
    precision: str
    packed: bool
    micro_batch_size: int | None
    micro_batch_tokens: int
    save_every: int
    compiled: bool = False
    recompute: Again = "none"
    recomputed: int = 0
    trained: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the run will cost: peak bytes of the training process, and seconds of training."""

    peak_memory_bytes: int
    free_memory_bytes: int
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training rows, each as often as its weight says, with `virtual` more tokens before each."""

    examples: float
    tokens: int
    trained: int
    virtual: int = 0

    @property
    def density(self) -> float:
        """The share of real tokens among the positions that run."""
        return self.tokens / max(1.0, self.tokens + self.virtual * self.examples)


def length_limit(facts: Facts, defaults: list[Default]) -> int:
    """Tokens at which an example is cut."""
    asked = facts.recipe.train.sequence_length
    if asked is not None:
        return asked
    context = facts.context_length or LENGTH_LIMIT
    limit = min(context, LENGTH_LIMIT)
    virtual = facts.method.virtual_tokens
    own = f" beside {virtual} virtual tokens" if virtual else ""
    why = (
        f"the model's context{own}"
        if limit == context
        else f"the lesser of {LENGTH_LIMIT} and the model's context of {context}{own}"
    )
    defaults.append(Default("train.sequence_length", limit, why))
    return limit


def resolve_meaning(
    facts: Facts,
    sequence_length: int,
    lengths_N: NDArray[np.int64],
    repeats_N: NDArray[np.float64],
    longest_answer: int,
    defaults: list[Default],
    easy_first: EasyFirst | None = None,
) -> Meaning:
    """Every training key with its value; what was filled in is added to `defaults`."""
    recipe = facts.recipe
    train = recipe.train

    def fill(key: str, given: Any, value: Any, why: str) -> Any:
        if given is None:
            defaults.append(Default(key, value, why))
        return value if given is None else given

    epochs = train.epochs
    if train.max_steps is None:
        epochs = fill("train.epochs", epochs, 20 if facts.caches_vectors else 3, "usual for this method")
    size = train.batch_size
    if train.batch_tokens is None:
        size = fill("train.batch_size", size, 64 if facts.caches_vectors else 16, "usual for this method")
    batching = Batching(epochs, train.max_steps, size, train.batch_tokens, None, 1 << 40)
    total = count_steps(lengths_N, repeats_N, batching, recipe.seed, easy_first)
    every = train.evaluate_every
    if recipe.data.validation is not None:
        every = fill("train.evaluate_every", every, max(1, math.ceil(total / 5)), "five times a run")
    answer = recipe.evaluate.max_new_tokens
    if facts.needs.writes:
        room = min(1024, 8 + math.ceil(1.5 * longest_answer))
        answer = fill("evaluate.max_new_tokens", answer, room, "half as long again as the longest trained answer")
    return Meaning(
        epochs=epochs,
        max_steps=train.max_steps,
        batch_size=size,
        batch_tokens=train.batch_tokens,
        sequence_length=sequence_length,
        learning_rate=fill(
            "train.learning_rate",
            train.learning_rate,
            facts.method.learning_rate,
            facts.method.learning_rate_source,
        ),
        head_learning_rate=train.head_learning_rate,
        schedule=train.schedule,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        optimizer=train.optimizer,
        clip=train.clip,
        dropout=fill("train.dropout", train.dropout, 0.0, "fastest; raise it if validation loss turns up"),
        total_steps=total,
        evaluate_every=every,
        curriculum=train.curriculum.model_dump() if train.curriculum else None,
        early_stopping=train.early_stopping.model_dump() if train.early_stopping else None,
        max_new_tokens=answer or 0,
        seed=recipe.seed,
    )


def resolve_placement(
    facts: Facts,
    meaning: Meaning,
    speed: Speed,
    trainable: int,
    longest: int,
    epoch: Epoch,
    defaults: list[Default],
    *,
    measured: bool = False,
) -> tuple[Placement, memory.Shape, int]:
    """Device, precision, micro-batch and recomputation: the fastest that fits into free memory.
    Returns the shape that memory was predicted from, and the predicted peak in bytes. `measured`: what fits will be
    measured (see `probing`), and all of it is taken to. Raises ResourceError where not even one example fits.
    """
    recipe, train = facts.recipe, facts.recipe.train
    device, precision = choose_device(recipe.place.device), _precision(facts, speed, defaults)
    trained, each_trained = _trained(facts, meaning, precision)
    shape = _shape(facts, trainable, each_trained, precision)
    free = memory.free_bytes(device)
    each = 4 if precision == "fp32" else 2
    static = memory.static_bytes(shape, device) + memory.primitive_bytes(device, precision, meaning.total_steps)
    static += 0 if facts.teacher is None else facts.teacher.parameters * each
    room = math.inf if measured else MEMORY_SHARE * free - static
    kept = math.ceil(memory.activation_bytes(shape, each, recompute=False) / epoch.density)
    again = math.ceil(memory.activation_bytes(shape, each, recompute=True) / epoch.density)
    recompute = bool(train.recompute)
    if train.recompute is None and facts.method.recomputes and not facts.method.frozen_backbone:
        recompute = room < kept * longest
        defaults.append(Default("train.recompute", recompute, "memory forces it" if recompute else "memory allows it"))
    per_token = (again if recompute else kept) if not facts.method.frozen_backbone else again // 2
    if room < per_token * longest:
        needed = static + per_token * longest
        raise ResourceError(
            f"the longest example ({longest} tokens) needs about {needed / memory.GIB:.1f} GiB, "
            f"and {MEMORY_SHARE * free / memory.GIB:.1f} GiB may be used on {device}",
            f"{less(facts)}, choose a smaller base, or free memory",
        )
    size, tokens, step_tokens = _micro_batch(facts, meaning, longest, room / per_token, free, epoch, defaults)
    save = train.save_every
    if save is None:
        save = max(1, math.ceil(meaning.total_steps / 10))
        defaults.append(Default("train.save_every", save, "ten times a run"))
    threads = recipe.place.threads or torch.get_num_threads()
    if recipe.place.threads is None:
        defaults.append(Default("place.threads", threads, "the cores this process may use"))
    placement = Placement(
        device=str(device),
        threads=threads,
        workers=recipe.place.workers,
        precision=precision,
        packed=facts.packed,
        micro_batch_size=size,
        micro_batch_tokens=tokens,
        save_every=save,
        recompute="whole" if recompute else "none",
        recomputed=facts.model.layers if recompute else 0,
        trained=trained,
    )
    return placement, shape, memory.process_bytes(device) + static + per_token * step_tokens


def _trained(facts: Facts, meaning: Meaning, precision: str) -> tuple[Literal["fp32", "bf16"], int]:
    """What the base's own weights train in, and bytes of a parameter that trains, with its gradient and moments."""
    if meaning.optimizer == "adamw":
        return "fp32", memory.ADAM_BYTES
    halved = precision in ("bf16", "fp8") and facts.method.reference == "snapshot"
    trained: Literal["fp32", "bf16"] = "bf16" if halved else "fp32"
    return trained, memory.ADAM_8BIT_BYTES[trained]


def _micro_batch(
    facts: Facts, meaning: Meaning, longest: int, room: float, free: int, epoch: Epoch, defaults: list[Default]
) -> tuple[int | None, int, int]:
    """Examples and tokens that a micro-batch may hold, and the tokens of the largest; `room` is for so many."""
    size = facts.recipe.train.micro_batch_size
    usual = int(epoch.density * MICRO_TOKENS[choose_device(facts.recipe.place.device).type])
    if facts.needs.coupling == "batch":  # in one micro-batch a step runs once, in several twice
        usual = max(usual, meaning.batch_tokens or _tokens_of_a_micro_batch(meaning, None, longest))
    if facts.needs.branches and size is None:
        defaults.append(Default("train.micro_batch_size", 1, "a row with all that may be answered"))
        return 1, 1, longest
    tokens = int(min(usual, max(longest, room)))
    if size is None:
        fits = f"fits into {free / memory.GIB:.1f} GiB free"
        defaults.append(Default("train.micro_batch_size", f"up to {tokens} tokens", fits))
    else:
        tokens = size * longest  # as many examples whatever their lengths, and a bound on passes without gradient
    return size, tokens, min(tokens, usual, _tokens_of_a_micro_batch(meaning, size, longest))


def predict(
    facts: Facts,
    meaning: Meaning,
    placement: Placement,
    shape: memory.Shape,
    speed: Speed,
    peak: int,
    epoch: Epoch,
) -> Prediction:
    """Tokens, seconds and memory of the training, from the probed speed."""
    share = epoch.trained / max(1, epoch.tokens)
    total = epoch.tokens if facts.caches_vectors else _tokens_of_a_run(meaning, epoch)
    step_tokens = epoch.tokens / max(1.0, epoch.examples) * (meaning.batch_size or 1)
    twice = facts.needs.coupling == "batch" and step_tokens > placement.micro_batch_tokens
    flop = memory.flop_per_token(shape, share, facts.method.frozen_backbone, bool(placement.recomputed) or twice)
    flop += 0.0 if facts.teacher is None else 2.0 * facts.teacher.parameters
    gain = {"fp8": FP8_GAIN, "int4": INT4_GAIN}.get(placement.precision, 1.0)
    rate = gain * (speed.fp32 if placement.precision == "fp32" else speed.bf16)
    device = placement.device.split(":")[0]
    seconds = total / epoch.density * flop / (rate * EFFICIENCY[device])
    return Prediction(peak, memory.free_bytes(torch.device(device)), seconds, total)


def with_compiling(facts: Facts, placement: Placement, prediction: Prediction, defaults: list[Default]) -> Placement:
    """Whether torch compiles the layers that no kernel serves: as asked, or where a run is long enough on CUDA."""
    asked = facts.recipe.place.compile
    if asked is None and facts.multiplies_otherwise:
        asked = True
        defaults.append(Default("place.compile", asked, f"what is multiplied in {placement.precision} must be cast"))
    if asked is None and placement.device.startswith("cuda") and not facts.method.frozen_backbone:
        asked = prediction.seconds > COMPILING_PAYS
        why = f"training takes about {prediction.seconds:.0f} s; above {COMPILING_PAYS:.0f} compiling pays"
        defaults.append(Default("place.compile", asked, why))
    return replace(placement, compiled=bool(asked))


def as_json(value: Meaning | Placement | Prediction | Default) -> dict[str, Any]:
    return asdict(value)


def recomputed(placement: Placement) -> str:
    """What runs again in the backward, in words; empty for nothing."""
    if not placement.recomputed:
        return ""
    half = "the feed-forward half of " if placement.recompute == "feed" else ""
    away = " from inputs in the host's memory" if placement.recompute == "away" else ""
    return f"{half}{placement.recomputed} layers{away}"


def _precision(facts: Facts, speed: Speed, defaults: list[Default]) -> str:
    if facts.recipe.precision != "auto":
        return facts.recipe.precision
    if not facts.model.autocasts:
        defaults.append(Default("precision", "fp32", f"{facts.model.model_type} models do not run in bf16"))
        return "fp32"
    rates = f"fp32 {speed.fp32 / 1e9:.0f}, bf16 {speed.bf16 / 1e9:.0f} GFLOP/s measured here"
    if speed.fp32 < speed.bf16 and speed.best == "fp32":
        rates += f"; whole steps gain from bf16 above {speed.worth:g} times"
    defaults.append(Default("precision", speed.best, rates))
    return speed.best


def less(facts: Facts) -> str:
    """How a step comes to need less memory."""
    by_8bit = facts.method.reference == "snapshot" and facts.recipe.train.optimizer == "adamw"
    state = "set train.optimizer to adamw_8bit, " if by_8bit else ""
    if facts.recipe.objective.options.get("long") == "windows":
        return f"{state}set objective.long to cut, take out the longest texts"
    return f"{state}lower train.sequence_length"


def _shape(facts: Facts, trainable: int, state: int, precision: str) -> memory.Shape:
    model = facts.model
    return memory.Shape(
        model.parameters,
        model.embedding_parameters,
        trainable,
        state,
        model.layers,
        model.width,
        model.intermediate,
        model.vocabulary,
        4 if precision == "fp32" else 2,
        model.linear_parameters if precision == "int4" else 0,
    )


def _tokens_of_a_run(meaning: Meaning, epoch: Epoch) -> int:
    if meaning.max_steps is None:
        return int(epoch.tokens * (meaning.epochs or 1.0))
    if meaning.batch_tokens is not None:
        return meaning.batch_tokens * meaning.total_steps
    return round(epoch.tokens / max(1.0, epoch.examples) * (meaning.batch_size or 1) * meaning.total_steps)


def _tokens_of_a_micro_batch(meaning: Meaning, size: int | None, longest: int) -> int:
    examples = size or meaning.batch_size
    return 1 << 40 if examples is None else examples * longest
