"""What a step takes on a CUDA device, measured before weights load: the micro-batch and recomputation that fit fastest.

Two models of the base's shape with few layers and random weights go through the run's own policy, method, kernels,
objective and engine with the run's largest micro-batch; `engine.costs` reads any number of layers off the line through
them. What was measured stays in the cache, under all that it depends on.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith import rundir, session, settings, training
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
LOOKED_AT = 200_000  # training examples whose micro-batches are laid out to find the largest
ALIKE = 0.95  # micro-batches of this share of the largest take as long

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
    """The micro-batches of a run: how many make a step, and the examples of the largest and of one of mean size."""

    in_a_step: float
    largest: Indices
    usual: Indices


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
    most, mean = int(positions.argmax()), int(np.abs(positions - positions.mean()).argmin())
    alike = positions[mean] > ALIKE * positions[most]
    return Work(len(parts) / steps, parts[most], parts[most] if alike else parts[mean])


def _chosen(
    plan: Plan, assets: Assets, placement: Placement, work: Work, room: float, progress: Progress
) -> Choice | None:
    """The recomputation that fits fastest, of which no more is measured than is needed; what it takes on average."""
    total = assets.facts.model.layers
    few = numbers(assets.local, total)

    def line(again: Again, examples: Indices) -> Line | None:
        found: list[Cost] = []
        for count in dict.fromkeys(few):
            placed = replace(placement, recompute=again, recomputed=0 if again == "none" else count)
            probe = _Probe(plan, assets, placed, count, examples, 1 if work.in_a_step <= 1 else 2)
            if (cost := probe.cost(progress)) is None:
                return None
            found.append(cost)
        return Line(*few, found[0], found[-1])

    plain = line("none", work.largest)
    if plain is None:
        return None
    lines: dict[Again, Line] = {"none": plain}
    for again in _ways(assets, placement, plain):
        if again != "none" and (measured := line(again, work.largest)) is not None:
            lines[again] = measured
        choice = choose(lines, total, room, all_of=again if assets.facts.recipe.train.recompute else None)
        if choice is not None:
            usual = plain if work.usual is work.largest else line("none", work.usual) or plain
            return replace(choice, micro=choice.micro * usual.at("micro", total) / plain.at("micro", total))
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
    """One model of `count` layers, and a step of `batches` micro-batches of these examples."""

    def __init__(
        self, plan: Plan, assets: Assets, placement: Placement, count: int, examples: Indices, batches: int
    ) -> None:
        self._plan, self._assets = replace(plan, placement=placement), assets
        self._count, self._examples, self._batches = count, examples, batches

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
                [placement.precision, placement.packed, placement.compiled, placement.recompute, placement.trained],
                [self._count, self._batches, self._examples.tolist()],
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

        _make_workspaces(device)
        before = torch.cuda.memory_allocated(device)  # models measured before this one do not always go at once
        policy = session.build(plan, assets, base)
        engine, clip = training.engine_of(plan, assets, policy, []), Clip(plan.training.clip)
        batch = self._batch(policy)
        found = list(layers(policy.model).values())
        gauge = _Gauge(device, found[-1], before)
        costs: list[Cost] = []
        while len(costs) <= TIMED or (
            len(costs) <= TIMED_MOST and sum(cost.micro * self._batches for cost in costs[1:]) < TIMED_FOR
        ):
            gauge.begin()
            began = time.perf_counter()
            engine.forward_backward(assets.objective, policy, Step(1, [batch] * self._batches, {}))
            torch.cuda.synchronize(device)
            between = time.perf_counter()
            clip.before_step(engine, 1)
            engine.step()
            torch.cuda.synchronize(device)
            micro, behind = (between - began) / self._batches, time.perf_counter() - between
            costs.append(Cost(*gauge.ended(), micro, behind, all(hasattr(layer, "fast") for layer in found)))
        timed = costs[1:]
        loss, turn, rest = (max(getattr(cost, name) for cost in timed) for name in ("loss", "turn", "rest"))
        micro, step = (statistics.median(getattr(cost, name) for cost in timed) for name in ("micro", "step"))
        return Cost(loss, turn, rest, micro, step, timed[0].served)

    def _batch(self, policy: Policy) -> Batch:
        store, objective = self._assets.prepared.train, self._assets.objective
        examples = [store.example(int(index)) for index in self._examples]
        batch = collate(examples, range(len(examples)), packed=policy.packed, pad_id=policy.tokens.pad)
        return objective.annotate(policy, batch) if isinstance(objective, Annotator) else batch


def _make_workspaces(device: torch.device) -> None:
    """What cuBLAS allocates with its first product and keeps: else it would count as the first model's."""
    square = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    torch.mm(square, square)


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
