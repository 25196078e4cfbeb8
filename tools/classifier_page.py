"""The tables of docs/classifiers.md, from what benchmarks/classifiers.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import code, table

MEASURED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "classifiers.json"
Json = Mapping[str, Any]


def rare() -> str:
    """A line for each way of training on rare labels."""
    found = _measured("rare")
    rows: list[Sequence[str]] = []
    for line in found["lines"]:
        by_name = {record["metric"]: record for record in line["metrics"]}
        effect = next(iter(line["effects"]), None)
        gain = "" if effect is None else f"{effect['difference']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"
        p = "" if effect is None else _p(effect["p"])
        recalls = [f"{line['recall'][name]:.1%}" for name in ("rare", "other")]
        rows.append([code(line["way"]), _limits(by_name["macro_f1"]), gain, p, *recalls])
    headings = ["training", "macro-F1", "paired difference", "p", "recall of rare labels", "of the others"]
    few, many = found["rare"]
    return (
        f"{found['train']:,} training rows of 77 labels, of which 38 have {few} to {many} rows each; "
        f"{found['lines'][0]['n']:,} test rows, 40 of each label.\n\n{table(headings, rows)}\n\n{_where(found)}"
    )


def calibrated() -> str:
    """A line for each way of training with each way of scaling."""
    found = _measured("calibrated")
    rows: list[Sequence[str]] = []
    for line in found["lines"]:
        if line["coverage"] is None:
            both = _by_model(line["records"])
            told = [f"{both['uncalibrated'][m]['value']:.4f} → {_limits(both['tuned'][m], 4)}" for m in ("ece",)]
            told += [f"{both['uncalibrated'][m]['value']:.4f} → {both['tuned'][m]['value']:.4f}" for m in OTHERS]
            rows.append([code(line["trained"]), code(line["scaling"]), *told])
    headings = ["training", "scaling", "ECE", "adaptive ECE", "Brier", "loss", "accuracy"]
    return f"{table(headings, rows)}\n\n{_where(found)}"


def conformal() -> str:
    """A line for each coverage that was asked for."""
    found = _measured("calibrated")
    rows: list[Sequence[str]] = []
    for line in found["lines"]:
        if line["coverage"] is not None:
            own = _by_model(line["records"])["tuned"]
            size = own["conformal_set_size"]["value"]
            rows.append([f"{line['coverage']:g}", _limits(own["conformal_coverage"], 4), f"{size:.2f}"])
    return table(["asked for", "rows whose label is in their set", "labels in a set"], rows)


OTHERS = ("adaptive_ece", "brier", "loss", "accuracy")
PARTS: Mapping[str, Callable[[], str]] = {"rare": rare, "calibrated": calibrated, "conformal": conformal}


def _measured(name: str) -> Json:
    return json.loads(MEASURED.read_text(encoding="utf-8"))[name]


def _by_model(records: Sequence[Json]) -> dict[str, dict[str, Json]]:
    found: dict[str, dict[str, Json]] = {}
    for record in records:
        found.setdefault(record["model"], {})[record["metric"]] = record
    return found


def _limits(record: Json, digits: int = 3) -> str:
    return f"{record['value']:.{digits}f} [{record['low']:.{digits}f}, {record['high']:.{digits}f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _where(found: Json) -> str:
    told: Iterator[str] = (f"{name} {value}" for name, value in found["machine"].items() if name != "date")
    return f"Measured on {found['machine']['date']} ({', '.join(told)}, one thread)."
