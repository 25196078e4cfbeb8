"""A run's model, or an exported one, loaded to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import session
from tunesmith.data.given import PathLike, Rows, check_kinds, to_answer
from tunesmith.engine.precision import choose_device
from tunesmith.models.policy import Policy
from tunesmith.models.saved import folder_of
from tunesmith.protocols import Method, Objective
from tunesmith.types import Prediction, SampleSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run's model, ready to answer."""

    policy: Policy
    objective: Objective
    method: Method
    renderer: Any
    card: dict[str, Any]

    def predict(self, rows: PathLike | Rows, max_new_tokens: int | None = None) -> list[Prediction]:
        """Answers to rows of a file or in memory, in their order; labels and answers in them are optional."""
        spec = SampleSpec(max_new_tokens or int(self.card["max_new_tokens"]))
        asked = to_answer(rows, self.card.get("columns", {}))
        check_kinds(asked, self.objective.needs, asking=True)
        return self.objective.predict(self.policy, asked, self.renderer, spec)


def load(path: PathLike, device: str = "auto") -> Loaded:
    """The model of a run (or an exported model folder), ready to predict.

    Raises InputError where there is none (yet), RefusedError where its base has other bytes than at training.
    """
    return Loaded(*session.load(folder_of(Path(path)), str(choose_device(device))))
