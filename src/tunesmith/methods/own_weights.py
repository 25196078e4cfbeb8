"""What methods that train the base's own weights share: the base is had back from its files, the result is a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.compat import quiet_transformers
from tunesmith.models.layers import whole_state
from tunesmith.models.policy import Policy


class OwnWeights(ABC):
    """`chosen` names the parameters that train; heads always do."""

    def __init__(self, options: Any, dropout: float) -> None:
        del dropout  # the base's own layers have it already
        self.options = options

    @abstractmethod
    def chosen(self, policy: Policy) -> set[str]:
        """Names of the model's parameters that train. InputError where the options fit none."""

    def attach(self, policy: Policy) -> None:
        names = self.chosen(policy)
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name in names)
        policy.heads.requires_grad_(True)

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    @contextmanager
    def reference(self, policy: Policy) -> Generator[None]:
        """The base's weights are read from its files and stand in for the trained ones."""
        original = policy.weights(None)
        trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        kept = {name: p.data for name, p in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = original[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = kept[name]

    def export(self, policy: Policy, to: Path) -> None:
        """The whole model as a transformers folder; the caller writes heads beside it."""
        with quiet_transformers():
            policy.model.save_pretrained(to, state_dict=whole_state(policy.model))

    def load(self, policy: Policy, source: Path) -> None:
        self.attach(policy)
        policy.model.load_state_dict(policy.weights(source))
