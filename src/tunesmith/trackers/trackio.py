"""Trackio: a local project, or a Space or server named by its own variables (TRACKIO_SPACE_ID, ...)."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar

from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS


@TRACKERS.register("trackio")
class Trackio:
    """Points of each step, the recipe as the run's configuration, the report as an artifact."""

    package: ClassVar[str] = "trackio"
    module: ClassVar[str] = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        self._trackio: Any = importlib.import_module(self.module)
        project = os.environ.get("TRACKIO_PROJECT", "tunesmith")
        # A run is gone on with by its name, so the name must be this run's alone.
        self.key = run.key or f"{run.name}-{secrets.token_hex(3)}"
        self._run: Any = self._trackio.init(
            project=project,
            name=self.key,
            config=dict(run.params),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self.where = f"{self.key} in project {project} (trackio show --project {project})"

    def held(self, kind: str) -> int | None:
        return None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, outcome: Outcome) -> None:
        if outcome.records:
            self._run.log(outcome.numbers(), step=outcome.step)
        if outcome.files:
            artifact = self._trackio.Artifact(f"results-{self.key}", type="results")
            for file in outcome.files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._trackio.finish()  # and not at the end of the process once more
