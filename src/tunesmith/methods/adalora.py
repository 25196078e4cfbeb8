"""AdaLoRA: ranks spent where they matter (Zhang et al. 2023, arXiv 2303.10512), through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import LowRankOptions, PeftAdapter, has_transposed_linears, task_type
from tunesmith.models.policy import Policy
from tunesmith.protocols import Engine, GradientRule
from tunesmith.recipe_keys import Positive
from tunesmith.types import GradientMode

if TYPE_CHECKING:
    from peft import AdaLoraConfig

WARMUP, SETTLE = 0.1, 0.3  # shares of the run before ranks begin to fall, and after they have fallen
ORTHOGONAL = 0.5  # weight of the penalty on P P' - I and Q' Q - I (equation 4)


@METHODS.register("adalora")
class AdaLora(PeftAdapter):
    """h = W x + P diag(l) Q x with entries of l pruned by importance, from rank 1.5 times `rank` down to it."""

    facts: MethodFacts = MethodFacts(
        summary="LoRA whose ranks fall where they matter least while it trains",
        when="a small budget of parameters and more steps than usual: ranks go to the layers that need them",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=1e-3,
        learning_rate_source="within the rates that Zhang et al. 2023 use",
        stands_on=frozenset({"adalora"}),
    )

    class Options(LowRankOptions):
        """`rank` is the mean rank at the end."""

        start_rank: Positive | None = Field(None, description="rank of every layer at the start; half as much again")

        @model_validator(mode="after")
        def _falls(self) -> AdaLora.Options:
            if self.start_rank is not None and self.start_rank <= self.rank:
                raise ValueError(f"start_rank is {self.start_rank}, and ranks fall from there to {self.rank}; raise it")
            return self

    options: Options

    def config(self, policy: Policy) -> AdaLoraConfig:
        from peft import AdaLoraConfig

        start = self.options.start_rank or (3 * self.options.rank + 1) // 2
        return AdaLoraConfig(
            init_r=start,
            target_r=self.options.rank,
            total_step=2,  # `rules` learns the run's
            lora_alpha=self.options.scale,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.options.targets,
            fan_in_fan_out=has_transposed_linears(policy),
            task_type=task_type(policy),  # type: ignore[arg-type]
        )

    def rules(self, policy: Policy, total_steps: int) -> list[GradientRule]:
        return [_Allocation(self._peft.base_model, total_steps)]


class _Allocation:
    """Adds the penalty's gradient before the step, and prunes by importance after it."""

    mode: ClassVar[GradientMode] = "plain"

    def __init__(self, adapted: Any, total_steps: int) -> None:
        config = adapted.peft_config[adapted.trainable_adapter_name]
        config.total_step = total_steps
        config.tinit, config.tfinal = int(WARMUP * total_steps), int(SETTLE * total_steps)
        config.deltaT = max(1, (total_steps - config.tinit - config.tfinal) // 20)
        self._adapted, self._allocator, self._total_steps = adapted, adapted.rankallocator, total_steps
        self._allocator.peft_config = config
        self._allocator.set_total_step(total_steps)

    def before_step(self, engine: Engine, number: int) -> dict[str, float]:
        """The penalty is the mean of |A A' - I| and |B' B - I| (Frobenius); its value is the column `orthogonality`."""
        factors = [(n, p) for n, p in engine.trainable.items() if ".lora_A." in n or ".lora_B." in n]
        total = 0.0
        for name, parameter in factors:
            if parameter.grad is None:
                continue
            rows_RD = parameter.data if ".lora_A." in name else parameter.data.T
            apart_RR = rows_RD @ rows_RD.T - torch.eye(len(rows_RD), device=parameter.device)
            size = float(torch.linalg.matrix_norm(apart_RR))
            total += size / len(factors)
            gradient_RD = 2 * ORTHOGONAL / (max(size, 1e-12) * len(factors)) * (apart_RR @ rows_RD)
            parameter.grad.add_(gradient_RD if ".lora_A." in name else gradient_RD.T)
        return {"orthogonality": total}

    def after_step(self, engine: Engine, number: int) -> None:
        if self._total_steps > 1:  # a lone step has no importance to prune by
            self._adapted.update_and_allocate(number)

    def state(self) -> dict[str, Any]:
        found = {kind: dict(getattr(self._allocator, kind)) for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {**found, "ranks": self._config().rank_pattern or {}}

    def restore(self, state: Mapping[str, Any]) -> None:
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            setattr(self._allocator, kind, dict(state.get(kind, {})))
        self._config().rank_pattern = dict(state.get("ranks", {}))

    def _config(self) -> Any:
        return self._adapted.peft_config[self._adapted.trainable_adapter_name]
