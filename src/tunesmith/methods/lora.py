"""LoRA: a low-rank update beside each linear layer (Hu et al. 2021, arXiv 2106.09685), through PEFT."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.models.policy import Policy
from tunesmith.recipe import Positive, Strict
from tunesmith.types import MethodFacts


@METHODS.register("lora")
class Lora:
    """h = W x + (alpha / rank) B A x with W frozen (equation 3); B starts at 0."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        summary="low-rank updates of the linear layers: about 1% of the parameters, switchable, mergeable",
        kinds=frozenset({"decoder", "encoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        default_learning_rate=2e-4,
    )

    class Options(Strict):
        """rank: width of the update; alpha: its scale (2 x rank); targets: layers by name, or all-linear."""

        rank: Positive = 16
        alpha: Annotated[float, Field(gt=0)] | None = None
        targets: Literal["all-linear"] | list[str] = "all-linear"

    def __init__(self, options: Any, dropout: float) -> None:
        self.options: Lora.Options = options
        self._dropout = dropout
        self._peft: Any = None

    def attach(self, policy: Policy) -> None:
        from peft import LoraConfig, get_peft_model

        options = self.options
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha if options.alpha is not None else 2 * options.rank,  # type: ignore[arg-type]
            lora_dropout=self._dropout,
            target_modules=options.targets,
            task_type="CAUSAL_LM" if policy.model.get_output_embeddings() is not None else "FEATURE_EXTRACTION",
        )
        try:
            self._peft = get_peft_model(policy.model, config)
        except ValueError as error:
            raise InputError(
                f"method.targets {options.targets!r} name no layer of {type(policy.model).__name__}: {error}",
                f"use all-linear, or some of: {', '.join(_linear_names(policy.model))}",
            ) from error

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    @contextmanager
    def reference(self, policy: Policy) -> Generator[None]:
        with self._peft.disable_adapter():
            yield

    def export(self, policy: Policy, to: Path) -> None:
        """A folder for `peft.PeftModel.from_pretrained`, its bytes the same whichever process writes it."""
        for config in self._peft.peft_config.values():
            if isinstance(config.target_modules, set):  # in an order that each process draws anew
                config.target_modules = sorted(config.target_modules)
        self._peft.save_pretrained(to, save_embedding_layers=False)
        (to / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is MODEL_CARD.md

    def load(self, policy: Policy, source: Path) -> None:
        from peft import PeftModel

        self._peft = PeftModel.from_pretrained(policy.model, str(source), is_trainable=True)


def _linear_names(model: Any) -> list[str]:
    from torch import nn

    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
