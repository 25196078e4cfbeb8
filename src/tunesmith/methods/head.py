"""Feature extraction: the backbone is frozen, only the fresh head trains."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy
from tunesmith.recipe import Strict
from tunesmith.types import MethodFacts


@METHODS.register("head")
class HeadOnly:
    """Trains a linear head on pooled vectors that the frozen base makes once per example."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        summary="the head alone, on cached vectors of the frozen base: seconds of training",
        kinds=frozenset({"encoder", "decoder"}),
        heads=frozenset({"pooled"}),
        reference="none",
        frozen_backbone=True,
        default_learning_rate=3e-3,
    )

    class Options(Strict):
        """The head method has no options."""

    def __init__(self, options: Any, dropout: float) -> None:
        self.options = options
        self._dropout = dropout

    def attach(self, policy: Policy) -> None:
        policy.model.requires_grad_(False)
        for head in policy.heads.values():
            assert isinstance(head, Head)
            head.requires_grad_(True)
            head.set_dropout(self._dropout)

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    @contextmanager
    def reference(self, policy: Policy) -> Generator[None]:
        """A fresh head has no base to go back to."""
        raise InputError(
            "a head trained from nothing has no base model to compare with", "compare with the majority class"
        )
        yield

    def export(self, policy: Policy, to: Path) -> None:
        """The backbone as a transformers folder; the caller writes the heads beside it."""
        policy.model.save_pretrained(to)

    def load(self, policy: Policy, source: Path) -> None:
        """Nothing beyond the heads was trained."""
        self.attach(policy)
