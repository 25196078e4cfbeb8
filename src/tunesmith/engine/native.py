"""The engine for one device: forward and backward, accumulation, optimizer and schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.data import pack
from tunesmith.engine.adamw_8bit import AdamW8bit
from tunesmith.engine.schedule import multiplier, warmup_steps
from tunesmith.errors import RefusedError, ResourceError
from tunesmith.kernels.transfer import Arriving
from tunesmith.models.policy import Policy
from tunesmith.protocols import Coupled, GradientRule, Objective
from tunesmith.types import Batch, GradientMode, Step, StepStats, Terms

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Optimization:
    """How parameters move: by which optimizer of `OPTIMIZERS`, under a schedule."""

    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    total_steps: int
    optimizer: str = "adamw"


def _adamw(groups: Groups, weight_decay: float, seed: int, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in float32 (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda"))


def _adamw_8bit(groups: Groups, weight_decay: float, seed: int, device: torch.device) -> torch.optim.Optimizer:
    return AdamW8bit(groups, weight_decay=weight_decay, seed=seed)


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit}


class PerExample(Protocol):
    """A gradient rule that must see each example's own gradient (privacy)."""

    def example(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]: ...


class NativeEngine:
    """Runs a policy on one device. Gradients are sums over the step divided by its normalisers.

    mode "plain": one backward a micro-batch. "per_example": one an example, shown to the rules of
    that mode before it is added. "cached": for objectives whose loss couples the whole step, two
    passes with cached gradients (arXiv 2101.06983).
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[dict[str, Any]],
        optimization: Optimization,
        *,
        seed: int,
        mode: GradientMode = "plain",
        rules: Iterable[GradientRule] = (),
        ahead: bool = True,
    ) -> None:
        self.policy = policy
        self.device = policy.device
        self.runs_ahead = ahead and self.device.type == "cuda"
        self.trainable: dict[str, nn.Parameter] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self._optimization = optimization
        self._warmup = warmup_steps(optimization.warmup, optimization.total_steps)
        self._seed = seed
        self._mode: GradientMode = mode
        self._example_rules = [cast(PerExample, rule) for rule in rules if rule.mode == "per_example"]
        rated = [{"lr": optimization.learning_rate * group.get("times", 1.0), **group} for group in groups]
        make = OPTIMIZERS[optimization.optimizer]
        self._optimizer = make(rated, optimization.weight_decay, seed, self.device)
        self._holds = isinstance(self._optimizer, AdamW8bit) or bool(self._optimizer.defaults["fused"])
        for group in self._optimizer.param_groups:
            group["base_lr"] = group["lr"]
        self._held: Tensor | None = None
        self._scale: Tensor | None = None
        self._training = False
        self._largest: int | None = None  # examples a micro-batch may hold, once memory has run out

    @property
    def learning_rate(self) -> float:
        """The first group's rate at the current step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def forward_backward(self, objective: Objective, policy: Policy, step: Step) -> StepStats:
        """Leaves the step's gradient in `.grad` of the trainable parameters; the device may still be at it.

        To look at a loss that is not finite raises RefusedError; `step` will have moved nothing then.
        """
        factor = multiplier(self._optimization.schedule, step.number, self._optimization.total_steps, self._warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        normalisers = objective.normalisers(step)
        if not any(normalisers.values()):
            return StepStats(0.0, dict.fromkeys(normalisers, 0.0), {}, step.tokens, skipped=True)
        self._train(policy)
        run = {"plain": self._plain, "per_example": self._per_example, "cached": self._cached}[self._mode]
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            seed_step(self._seed, step.number)
            try:
                sums = run(objective, policy, self._placed(step), normalisers)
                break
            except torch.OutOfMemoryError as error:
                self._halve(step, error)
        self.hold(~sums.loss.isfinite())
        parts = {name: Arriving(part) for name, part in sums.parts.items()}
        return StepStats(Arriving(sums.loss, partial(_not_finite, step.number)), parts, sums.means, step.tokens)

    def hold(self, bad: Tensor) -> None:
        """The next `step` moves nothing if `bad` (a truth value, of the device) is true; it is not waited for."""
        self._held = bad if self._held is None else self._held | bad

    def scale(self, factor: Tensor) -> None:
        """The next `step` takes all gradients `factor` times: on CUDA as it reads them, elsewhere they are now."""
        if self.device.type == "cuda":
            self._scale = factor if self._scale is None else self._scale * factor
        elif float(factor) != 1.0:
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            cast(Any, torch)._foreach_mul_(gradients, float(factor))  # as torch's own clipping

    def _train(self, policy: Policy) -> None:
        """Training mode; a walk over thousands of modules that is spared where the last step left them in it."""
        if not (self._training and policy.training):
            policy.train()
            self._training = True

    def step(self) -> None:
        """Moves the parameters along the gradient that `forward_backward` left, unless something holds it.

        On CUDA nothing is waited for.
        """
        held, scale = self._held, self._scale
        self._held = self._scale = None
        if self._holds:
            optimizer: Any = self._optimizer  # told as by gradient scalers
            optimizer.found_inf = None if held is None else held.float()
            optimizer.grad_scale = None if scale is None else 1 / scale
            optimizer.step()
        elif held is None or not held:
            self._optimizer.step()

    def state(self) -> dict[str, Any]:
        """Trainable parameters and buffers by name, and the optimizer's moments."""
        moments: dict[str, dict[str, Any]] = {}
        for name, parameter in self.trainable.items():
            if parameter in self._optimizer.state:
                moments[name] = dict(self._optimizer.state[parameter])
        heads = {f"heads.{n}": b for n, b in self.policy.heads.named_buffers()}
        return {"parameters": {n: p.data for n, p in self.trainable.items()} | heads, "moments": moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        buffers = {f"heads.{n}": b for n, b in self.policy.heads.named_buffers()}
        with torch.no_grad():
            for name, value in state["parameters"].items():
                (buffers[name] if name in buffers else self.trainable[name]).copy_(value)
        self._optimizer.state.clear()  # a state from before the first step has no moments
        for name, moment in state["moments"].items():
            parameter = self.trainable[name]
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device if key != "step" else value.device, copy=True)
                for key, value in moment.items()
            }

    def _plain(self, objective: Objective, policy: Policy, step: Step, normalisers: Mapping[str, float]) -> _Sums:
        sums = _Sums()
        for batch in step.batches:
            _differentiate(sums.add(objective.terms(policy, batch), normalisers))
        return sums

    def _per_example(self, objective: Objective, policy: Policy, step: Step, normalisers: Mapping[str, float]) -> _Sums:
        sums = _Sums()
        total: dict[str, Tensor] = {}
        for batch in step.batches:
            for single in self._split(batch, 1):
                _differentiate(sums.add(objective.terms(policy, pack.place(single, self.device)), normalisers))
                own = {n: p.grad for n, p in self.trainable.items() if p.grad is not None}
                for rule in self._example_rules:
                    own = rule.example(own)
                for name, gradient in own.items():
                    total[name] = total[name] + gradient if name in total else gradient
                self._optimizer.zero_grad(set_to_none=True)
        for name, gradient in total.items():
            self.trainable[name].grad = gradient
        return sums

    def _cached(self, objective: Objective, policy: Policy, step: Step, normalisers: Mapping[str, float]) -> _Sums:
        if len(step.batches) == 1:  # the gradient is whole after one pass
            return self._plain(objective, policy, step, normalisers)
        coupled = cast(Coupled, objective)
        with torch.no_grad():
            embedded: list[Tensor] = []
            for index, batch in enumerate(step.batches):
                seed_step(self._seed, step.number, index)  # the second pass must drop out the same units
                embedded.append(coupled.embed(policy, batch))
        sums = _Sums()
        joined_SD = torch.cat(embedded).requires_grad_()
        _differentiate(sums.add(coupled.couple(joined_SD, step), normalisers))
        assert joined_SD.grad is not None
        for index, (batch, gradient) in enumerate(
            zip(step.batches, joined_SD.grad.split([len(e) for e in embedded]), strict=True)
        ):
            seed_step(self._seed, step.number, index)
            _differentiate(coupled.embed(policy, batch), gradient)
        return sums

    def _placed(self, step: Step) -> Step:
        batches = step.batches
        if self._largest is not None:
            batches = [part for batch in batches for part in self._split(batch, self._largest)]
        return Step(step.number, [pack.place(batch, self.device) for batch in batches], step.state, step.epoch)

    def _split(self, batch: Batch, size: int) -> list[Batch]:
        order = list(range(len(batch.examples)))
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        if len(groups) == 1:
            return [batch]
        return pack.split(batch, groups, packed=self.policy.packed, pad_id=self.policy.tokens.pad)

    def _halve(self, step: Step, error: torch.OutOfMemoryError) -> None:
        """Same step, same gradient, smaller micro-batches; one example that does not fit ends the run."""
        largest = self._largest or max(len(batch.examples) for batch in step.batches)
        if largest == 1:
            longest = max(part.tokens for batch in step.batches for part in self._split(batch, 1))
            raise ResourceError(
                f"step {step.number}: one example of up to {longest} tokens does not fit in memory",
                "lower train.sequence_length or choose a smaller model",
            ) from error
        self._largest = max(1, largest // 2)
        torch.cuda.empty_cache()


class _Sums:
    """What the micro-batches of one step add up to; left on the device until the last backward is under way."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.shares: list[tuple[str, Tensor]] = []
        self.metrics: dict[str, tuple[float, float]] = {}

    def add(self, terms: Terms, normalisers: Mapping[str, float]) -> Tensor:
        """The differentiable share of this micro-batch in the step's loss."""
        shares: list[Tensor] = []
        for name, part in terms.parts.items():
            if normalisers[name]:
                share = (part.loss_U * part.weight_U).sum() / normalisers[name]
                shares.append(share)
                self.shares.append((name, share.detach()))
        for name, (value, weight) in terms.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + value, before[1] + weight)
        loss = torch.stack(shares).sum()
        self.losses.append(loss.detach())
        return loss

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).sum()

    @property
    def parts(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, share in self.shares:
            found[name] = found[name] + share if name in found else share
        return found

    @property
    def means(self) -> dict[str, float]:
        return {name: value / weight for name, (value, weight) in self.metrics.items() if weight}


def _not_finite(number: int, loss: float) -> RefusedError:
    return RefusedError(
        f"step {number}: the loss is {loss}, not a finite number",
        "lower train.learning_rate, use precision=fp32, or look at the rows of this step; "
        "the last checkpoint is from before it",
    )


def _differentiate(output: Tensor, gradient: Tensor | None = None) -> None:
    """The one place where gradients are made. An output nothing trainable led to adds none."""
    if output.requires_grad:
        output.backward(gradient)


def seed_step(seed: int, step: int, part: int = 0) -> None:
    """Seeds torch's generators from (seed, step, part): nothing random needs saving between steps."""
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
