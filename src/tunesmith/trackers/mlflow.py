"""MLflow, configured by its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...)."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS

PATIENCE = 2.0  # seconds between two messages: one may take as long as a step
POINTS = 900  # in one message; MLflow takes 1,000
PARAM_LENGTH = 6000  # characters of a parameter that MLflow takes
# By default MLflow tries for minutes, in which a run would stand still. A user's own values stay.
HASTE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@TRACKERS.register("mlflow")
class MLflow:
    """Points sent together, the recipe as parameters, the report and the records as artifacts."""

    package: ClassVar[str] = "mlflow"
    module: ClassVar[str] = "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        for variable, value in HASTE.items():
            os.environ.setdefault(variable, value)
        entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = importlib.import_module(self.module).MlflowClient()
        self._metric: Any = entities.Metric
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        if run.key is None:
            experiment = _experiment(self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith"))
            self.key = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
            params = [entities.Param(name, str(value)[:PARAM_LENGTH]) for name, value in run.params.items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(self.key, params=params[start : start + 100])
        else:
            self.key = run.key
            self._client.update_run(self.key, status="RUNNING")
        self.where = f"run {self.key} at {self._client.tracking_uri}"

    def held(self, kind: str) -> int | None:
        """MLflow keeps both of two points of one step, so what is there must not come again."""
        history = self._client.get_metric_history(self.key, f"{kind}/loss")
        return max((point.step for point in history), default=0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(_allowed(name), value, now, step) for name, value in numbers.items()]
        if time.monotonic() - self._sent > PATIENCE or len(self._waiting) > POINTS - 100:
            self._send()

    def finish(self, outcome: Outcome) -> None:
        self.log(outcome.step, outcome.numbers())
        self._send()
        for file in outcome.files:
            self._client.log_artifact(self.key, str(file))
        self._client.set_terminated(self.key, STATES[outcome.state])

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self.key, metrics=self._waiting[:POINTS])
            self._waiting = self._waiting[POINTS:]
        self._sent = time.monotonic()


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found is not None else client.create_experiment(name))


def _allowed(name: str) -> str:
    """MLflow takes letters, digits and a few marks in a metric's name."""
    return re.sub(r"[^\w\-./ :]", "_", name)
