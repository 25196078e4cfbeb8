"""Weights & Biases, configured by its own variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, ...)."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS

COLUMNS = ("data", "group", "model", "metric", "value", "low", "high", "n")


@TRACKERS.register("wandb")
class WandB:
    """A row for each step, results as the summary and a table, the report as an artifact.

    W&B sends and writes what it was given every 15 seconds, so a kill takes the last of them along. A run that goes
    on asks the server what it has. Offline it is written anew as a whole, in place of files that were not sent yet.
    """

    package: ClassVar[str] = "wandb"
    module: ClassVar[str] = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        self._wandb: Any = importlib.import_module(self.module)
        self.key = run.key or secrets.token_hex(4)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tunesmith"),
            id=self.key,
            name=run.name,
            dir=str(run.folder),
            resume="allow",
            reinit="create_new",  # a run that the user has begun for something else stays theirs
            config=dict(run.params),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        folder = Path(self._run.dir).parent
        self.where = self._run.url or f"{folder} (offline: `wandb sync {folder}` sends it)"
        before = [path for path in folder.parent.glob(f"offline-run-*-{self.key}") if path != folder]
        sent = [path for path in before if any(path.glob("*.synced"))]
        self._held = None if sent else max(int(self._run.step) - 1, 0)
        if not self._run.url:
            for path in set(before) - set(sent):
                shutil.rmtree(path)

    def held(self, kind: str) -> int | None:
        return self._held

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, outcome: Outcome) -> None:
        if outcome.records:
            rows = [[record[column] for column in COLUMNS] for record in outcome.records]
            table = self._wandb.Table(columns=list(COLUMNS), data=rows)
            self._run.log({"evaluation": table}, step=outcome.step)
            self._run.summary.update(outcome.numbers())
        if outcome.files:
            artifact = self._wandb.Artifact(f"results-{self.key}", type="results")
            for file in outcome.files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if outcome.state == "finished" else 1)
