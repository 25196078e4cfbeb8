"""What a step takes on a CUDA device, measured before weights load: the micro-batch and recomputation that fit fastest.

Two models of the base's shape with few layers and random weights go through the run's own policy, method, kernels,
objective and engine with the run's largest micro-batch; `engine.costs` reads any number of layers off the line through
them. What was measured stays in the cache, under all that it depends on.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith import compat, rundir, session, settings, training
from tunesmith.data.ingest import digest, source_version
from tunesmith.data.pack import collate
from tunesmith.data.source import Batching, epoch_steps, micro_batches
from tunesmith.engine import memory
from tunesmith.engine.costs import Choice, Cost, Line, choose
from tunesmith.engine.precision import device_name
from tunesmith.errors import ResourceError, TunesmithError
from tunesmith.gradients.clip import Clip
from tunesmith.models.cache import cache_dir
from tunesmith.models.few import few_layers, numbers
from tunesmith.models.layers import layers
from tunesmith.models.policy import Policy
from tunesmith.models.recompute import Again
from tunesmith.placing import is_measured
from tunesmith.planning import Assets, Plan, Progress, make_plan
from tunesmith.protocols import Annotator
from tunesmith.settings import Default, Placement
from tunesmith.types import Batch, Step

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe
    from tunesmith.recipe_file import Origin

log = logging.getLogger("tunesmith.plan")

SHARE = 0.94  # of free memory that a run may reserve: the rest is for libraries that allocate by themselves
RESERVED = 1.05  # bytes that the allocator reserves for each in use at the peak (PLANNER.md: 1.01 to 1.05, 1.10 once)
TIMED = 3  # steps at least, behind one that compiles and chooses kernels
TIMED_FOR, TIMED_MOST = 0.4, 30  # seconds, and steps: those of a few ms, bound by the host, vary by half
WHOLE = 1_500_000_000  # parameters of a base of which all layers are measured too, as they were chosen to run
ALIKE = 0.97  # micro-batches of this share of the largest keep about as much
LOOKED_AT = 200_000  # training examples whose micro-batches are laid out to find the largest

Indices = NDArray[np.int64]


def planned(recipe: Recipe, base: Path, origin: Origin, progress: Progress) -> tuple[Plan, Assets]:
    """As `make_plan`, with micro-batch, recomputation, memory and time as measured, where they can be.

    Raises ResourceError where not even one example fits with all layers running again.
    """
    plan, assets = make_plan(recipe, base, origin, progress=progress)
    if not is_measured(assets.facts, assets.objective):
        return plan, assets
    try:
        return _refined(plan, assets, progress), assets
    except TunesmithError:
        raise
    except Exception as error:  # a family whose code takes no fewer layers: what was done before there were probes
        log.warning("a step cannot be measured, and is predicted from shapes: %s: %s", type(error).__name__, error)
        return make_plan(recipe, base, origin, progress=progress, measures=False)


def _refined(plan: Plan, assets: Assets, progress: Progress) -> Plan:
    """The plan with what was measured."""
    asked = True if assets.facts.multiplies_otherwise else assets.facts.recipe.place.compile
    found = _fastest(plan, assets, replace(plan.placement, compiled=bool(asked)), progress)
    defaults: list[Default] = []
    placement = settings.with_compiling(assets.facts, found.placement, found.prediction, defaults)
    if placement.compiled and asked is None:
        most = replace(placement, micro_batch_tokens=plan.placement.micro_batch_tokens)
        found = _fastest(found, assets, most, progress)
    return replace(found, defaults=_with(found.defaults, defaults))


@dataclass(frozen=True, slots=True)
class Work:
    """The micro-batches of a run: how many make a step, and the examples of the largest and of some of mean size."""

    in_a_step: float
    largest: Indices
    usual: tuple[Indices, ...]


def _fastest(plan: Plan, assets: Assets, most: Placement, progress: Progress) -> Plan:
    """Of micro-batches of ever fewer tokens, the one whose steps take least; none smaller than need be."""
    free = memory.free_bytes(torch.device(most.device))
    best: tuple[float, Plan] | None = None
    for tokens in _sizes(most, assets):
        placement = replace(most, micro_batch_tokens=tokens, recompute="none", recomputed=0)
        work = _work(plan, assets, placement)
        choice = _chosen(plan, assets, placement, work, SHARE * free / RESERVED, progress)
        if choice is None:
            continue
        seconds = work.in_a_step * choice.micro + choice.step
        if best is None or seconds < best[0]:
            best = seconds, _told(plan, placement, choice, seconds, free)
        if choice.again == "none" or assets.facts.recipe.train.recompute:
            break
    if best is None:
        raise ResourceError(
            f"one example at a time does not fit into {free / memory.GIB:.1f} GiB free on {most.device}, as measured",
            f"{settings.less(assets.facts)}, choose a smaller base, or free memory",
        )
    return best[1]


def _sizes(most: Placement, assets: Assets) -> Iterator[int]:
    tokens = most.micro_batch_tokens
    yield tokens
    longest = int(assets.prepared.train.lengths.max(initial=1))
    while most.micro_batch_size is None and tokens > longest:
        tokens = max(longest, tokens // 2)
        yield tokens


def _told(plan: Plan, placement: Placement, choice: Choice, seconds: float, free: int) -> Plan:
    """The plan as chosen."""
    placed = replace(placement, recompute=choice.again, recomputed=choice.count)
    prediction = replace(
        plan.prediction,
        peak_memory_bytes=round(RESERVED * choice.peak),
        free_memory_bytes=free,
        seconds=seconds * plan.training.total_steps,
    )
    why = f"measured: fastest that fits into {free / memory.GIB:.1f} GiB free"
    defaults: list[Default] = []
    for key, value in (
        ("train.micro_batch_size", f"up to {placed.micro_batch_tokens} tokens"),
        ("train.recompute", settings.recomputed(placed) or False),
    ):
        if any(default.key == key for default in plan.defaults):
            defaults.append(Default(key, value, why))
    return replace(plan, placement=placed, prediction=prediction, defaults=_with(plan.defaults, defaults))


def _with(defaults: Sequence[Default], new: Sequence[Default]) -> list[Default]:
    """`defaults` with those of `new` in the place of those of the same key, or behind."""
    by_key = {default.key: default for default in new}
    kept = [by_key.pop(default.key, default) for default in defaults]
    return [*kept, *by_key.values()]


def _work(plan: Plan, assets: Assets, placement: Placement) -> Work:
    """The micro-batches of the first epochs."""
    prepared, asked = assets.prepared, plan.training
    batching = Batching(
        asked.epochs,
        asked.max_steps,
        asked.batch_size,
        asked.batch_tokens,
        placement.micro_batch_size,
        placement.micro_batch_tokens,
    )
    lengths_N = prepared.train.lengths
    parts: list[Indices] = []
    steps = epoch = 0
    while steps < asked.total_steps and sum(map(len, parts)) < LOOKED_AT:
        for chosen in epoch_steps(lengths_N, prepared.repeats, batching, epoch, asked.seed, prepared.easy_first):
            parts += micro_batches(lengths_N, chosen, batching)
            steps += 1
            if steps == asked.total_steps:
                break
        epoch += 1
    positions = np.asarray(
        [lengths_N[p].sum() if placement.packed else len(p) * lengths_N[p].max() for p in parts], dtype=np.int64
    )
    alike = np.flatnonzero(positions >= ALIKE * positions.max())  # of them the one whose scores may take most
    largest = max(alike.tolist(), key=lambda i: len(parts[i]) * int(lengths_N[parts[i]].max()) ** 2)
    nearest = np.argsort(np.abs(positions - positions.mean()), kind="stable")[: 2 * TIMED_MOST]
    return Work(len(parts) / steps, parts[largest], tuple(parts[i] for i in nearest.tolist()))


def _chosen(
    plan: Plan, assets: Assets, placement: Placement, work: Work, room: float, progress: Progress
) -> Choice | None:
    """The recomputation that fits fastest, of which no more is measured than is needed; what it takes on average."""
    total = assets.facts.model.layers
    few = numbers(assets.local, total)

    def cost(again: Again, count: int, recomputed: int) -> Cost | None:
        placed = replace(placement, recompute=again, recomputed=recomputed)
        return _Probe(plan, assets, placed, count, work).cost(progress)

    def line(again: Again) -> Line | None:
        found: list[Cost] = []
        for count in dict.fromkeys(few):
            if (measured := cost(again, count, 0 if again == "none" else count)) is None:
                return None
            found.append(measured)
        return Line(*few, found[0], found[-1])

    def whole(choice: Choice, plain: Line) -> Choice:
        """As measured where the base is so small that all of it can be; as read off the lines where it is not."""
        if assets.facts.model.parameters > WHOLE:
            return replace(choice, micro=choice.micro * plain.at("usual", total) / plain.at("micro", total))
        measured = cost(choice.again, total, choice.count)
        if measured is None:
            return replace(choice, peak=math.inf)
        return replace(choice, peak=measured.peak, micro=measured.usual, step=measured.step)

    plain = line("none")
    if plain is None:
        return None
    lines: dict[Again, Line] = {"none": plain}
    for again in _ways(assets, placement, plain):
        if again != "none" and (measured := line(again)) is not None:
            lines[again] = measured
        asked, line_room = again if assets.facts.recipe.train.recompute else None, room
        while (choice := choose(lines, total, line_room, all_of=asked)) is not None:
            found = whole(choice, plain)
            if found.peak <= room:
                return found
            told_too_little = found.peak - choice.peak  # by the line; all of what did not fit to be measured
            line_room = room - told_too_little if math.isfinite(told_too_little) else choice.peak * (1 - 1e-9)
    return None


def _ways(assets: Assets, placement: Placement, plain: Line) -> Iterator[Again]:
    """How layers may run again, in the order of what that costs."""
    asked = assets.facts.recipe.train.recompute
    if not asked:
        yield "none"
        if asked is not None or not assets.method.facts.recomputes:
            return
        if plain.of_few.served:
            yield "feed"
    yield "whole"
    model, each = assets.facts.model, 4 if placement.precision == "fp32" else 2
    inputs = 2 * model.layers * _pinned(each * model.width * placement.micro_batch_tokens)  # and smaller ones, kept
    room = settings.MEMORY_SHARE * memory.free_bytes(torch.device("cpu"))
    if inputs + _pinned(each * model.embedding_parameters) < room:
        yield "away"


def _pinned(size: int) -> int:
    """Bytes that torch takes of the host's memory for so many: a power of two, which it keeps."""
    return 1 << max(0, size - 1).bit_length()


class _Probe:
    """One model of `count` layers, and its steps on this work, of two micro-batches where a step has several."""

    def __init__(self, plan: Plan, assets: Assets, placement: Placement, count: int, work: Work) -> None:
        self._plan, self._assets = replace(plan, placement=placement), assets
        self._count, self._work, self._batches = count, work, 1 if work.in_a_step <= 1 else 2

    def cost(self, progress: Progress) -> Cost | None:
        """As the cache has it, or measured; None where it does not fit."""
        path = cache_dir() / "steps" / f"{self._key()}.json"
        try:
            return Cost(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            pass
        progress(f"measuring a step of {self._count} layers", 0, None)
        device = torch.device(self._plan.placement.device)
        try:
            found = self._measured(device)
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_json(path, asdict(found), shared=True)
        return found

    def _key(self) -> str:
        plan, placement = self._plan, self._plan.placement
        device = torch.device(placement.device)
        return digest(
            [
                device_name(device),
                torch.__version__,
                source_version(Path(__file__).parent),
                self._assets.local.sha256,
                {name: plan.meaning[name] for name in ("tokenizer", "renderer", "objective", "method", "data")},
                [plan.training.dropout, plan.training.optimizer, plan.training.clip],
                [placement.precision, placement.packed, placement.compiled, placement.trained],
                [placement.recompute, placement.recomputed],
                [self._count, self._batches, [part.tolist() for part in (self._work.largest, *self._work.usual)]],
            ]
        )

    def _measured(self, device: torch.device) -> Cost:
        plan, placement = self._plan, self._plan.placement
        # A method of its own, which goes with the model that it holds: what is attached here is not what a run trains.
        method = type(self._assets.method)(self._assets.method.options, plan.training.dropout)
        assets = replace(self._assets, method=method, previous=None)
        dtype, in_nf4 = session.loaded_in(assets.method, placement), placement.precision == "int4"

        def base(head: Any) -> nn.Module:
            return few_layers(assets.local, head, dtype, self._count, device, in_nf4=in_nf4)

        compat.free_workspaces()  # so that each model is measured with those of its own products, as a run has them
        before = torch.cuda.memory_allocated(device)  # models measured before this one do not always go at once
        policy = session.build(plan, assets, base)
        engine, clip = training.engine_of(plan, assets, policy, []), Clip(plan.training.clip)
        found = list(layers(policy.model).values())
        gauge = _Gauge(device, found[-1], before)
        served = all(hasattr(layer, "fast") for layer in found)

        def cost(batches: list[Batch]) -> Cost:
            gauge.begin()
            began = time.perf_counter()
            engine.forward_backward(assets.objective, policy, Step(1, batches, {}))
            torch.cuda.synchronize(device)
            between = time.perf_counter()
            clip.before_step(engine, 1)
            engine.step()
            torch.cuda.synchronize(device)
            micro, behind = (between - began) / len(batches), time.perf_counter() - between
            return Cost(*gauge.ended(), micro, behind, served)

        largest = [self._batch(policy, self._work.largest)] * self._batches
        cost(largest)  # compiles, and chooses kernels
        costs = _timed(cost, itertools.repeat(largest))
        usual = [self._batch(policy, examples) for examples in self._work.usual]
        parts = [usual[at : at + self._batches] for at in range(0, len(usual), self._batches)]
        first = _timed(cost, parts)
        loss, turn, rest = (max(getattr(each, name) for each in (*costs, *first)) for name in ("loss", "turn", "rest"))
        micro, step = (statistics.median(getattr(each, name) for each in costs) for name in ("micro", "step"))
        return Cost(loss, turn, rest, micro, step, served, statistics.median(each.micro for each in first))

    def _batch(self, policy: Policy, indices: Indices) -> Batch:
        store, objective = self._assets.prepared.train, self._assets.objective
        examples = [store.example(int(index)) for index in indices]
        batch = collate(examples, range(len(examples)), packed=policy.packed, pad_id=policy.tokens.pad)
        return objective.annotate(policy, batch) if isinstance(objective, Annotator) else batch


def _timed(cost: Callable[[list[Batch]], Cost], steps: Iterable[list[Batch]]) -> list[Cost]:
    """What steps take: of few where they are long, of more where they are short."""
    found: list[Cost] = []
    for batches in steps:
        found.append(cost(batches))
        seconds = sum(each.micro * len(batches) for each in found)
        if len(found) == TIMED_MOST or (len(found) >= TIMED and seconds >= TIMED_FOR):
            break
    return found


class _Gauge:
    """The most memory in use: until the topmost layer's result has its gradient, until its input has, from then on;
    all without what was in use `before`.
    """

    def __init__(self, device: torch.device, top: nn.Module, before: int = 0) -> None:
        self._device, self._most, self._before = device, [0, 0], before
        top.register_forward_pre_hook(self._given, with_kwargs=True)
        top.register_forward_hook(self._returned)

    def begin(self) -> None:
        self._most = [0, 0]
        torch.cuda.reset_peak_memory_stats(self._device)

    def ended(self) -> tuple[int, int, int]:
        rest = torch.cuda.max_memory_allocated(self._device)
        loss, turn, rest = (most - self._before for most in (self._most[0] or rest, self._most[1] or rest, rest))
        return loss, turn, rest

    def _given(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._watch(given[0] if given else named["hidden_states"], 1)

    def _returned(self, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        self._watch(returned if isinstance(returned, Tensor) else returned[0], 0)

    def _watch(self, hidden: Tensor, part: int) -> None:
        def reached(gradient: Tensor) -> None:
            self._most[part] = max(self._most[part], torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)

        if torch.is_grad_enabled() and hidden.requires_grad:
            hidden.register_hook(reached)
