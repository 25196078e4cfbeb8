"""A finished run as the verbs give it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.report import notebook, write
from tunesmith.rundir import RunDir


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its folder, and what its files of results hold; a table in notebooks.

    Those are evaluation.json, comparison.json, groups.json and decoding.json, the last two only where a recipe asks.
    `report` is the page to look at; None if it could not be drawn (`tunesmith report` says why).
    """

    path: Path
    records: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    groups: Sequence[Mapping[str, Any]] = ()
    decoding: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def record(
        self, metric: str, *, model: str = "tuned", data: str | None = None, group: str = "all"
    ) -> dict[str, Any]:
        """One record, with `value`, `low`, `high` and `n`; of the first data set that has it, where none is named.

        Raises InputError that names what was measured, where there is no such record.
        """
        for found in self.records:
            asked = (metric, model, group, data or found["data"])
            if asked == (found["metric"], found["model"], found["group"], found["data"]):
                return found
        known = sorted({f"{r['metric']} of {r['model']} on {r['data']}" for r in self.records if r["group"] == "all"})
        raise InputError(
            f"{self.path} has no {metric} of {model} on {data or 'any data'} ({group})",
            f"measured: {', '.join(known) or 'nothing'}",
        )

    @property
    def report(self) -> Path | None:
        return self.path / write.REPORT if write.is_current(self.path) else None

    def _repr_html_(self) -> str:
        return notebook.results_html(self.path, self.records, self.effects)


def result_of(run: RunDir, results: Mapping[str, Any]) -> Result:
    """Of a run whose results were read or measured."""
    return Result(
        run.path,
        list(results["records"]),
        list(results["effects"]),
        list(results["groups"]),
        dict(results["decoding"]),
    )
