"""TensorBoard: event files in the run's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tunesmith.tracked import Outcome, TrackedRun
from tunesmith.trackers import TRACKERS


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Scalars of each step; recipe and results as text, and as hyperparameters."""

    package: ClassVar[str] = "tensorboard"
    module: ClassVar[str] = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.folder / "tensorboard"
        self.key = folder.name
        self.where = str(folder)
        self._from_step = run.from_step
        self._params = run.params
        # TensorBoard forgets what the files hold from this step on.
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if run.key is None else run.from_step + 1)
        if run.key is None:
            self._writer.add_text("recipe", _table([("key", "value"), *run.params.items()]), 0)
            self._writer.flush()

    def held(self, kind: str) -> int | None:
        return self._from_step

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what is written survives a kill

    def finish(self, outcome: Outcome) -> None:
        if outcome.records:
            self._results(outcome)
        self._writer.close()

    def _results(self, outcome: Outcome) -> None:
        from torch.utils.tensorboard.summary import hparams

        numbers = outcome.numbers()
        columns = ("data", "group", "model", "metric", "value", "low", "high", "n")
        rows = [tuple(record[column] for column in columns) for record in outcome.records]
        self._writer.add_text("evaluation", _table([columns, *rows]), outcome.step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, outcome.step)
        for summary in hparams(dict(self._params), numbers):
            self._writer.file_writer.add_summary(summary)


def _table(rows: list[tuple[Any, ...]]) -> str:
    """Markdown, the first row as its head."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
