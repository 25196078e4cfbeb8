"""report.html and the model card in a run's folder: written, renewed, and never a reason to lose the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from tunesmith import rundir
from tunesmith.report.markdown import run_markdown
from tunesmith.report.model_card import library_of, model_card
from tunesmith.report.run_page import run_page
from tunesmith.report.summary import Summary, summarise

REPORT = "report.html"
# The hub shows README.md and nothing else, so a folder that is uploaded as it is needs that name; MODEL_CARD.md is
# the one that people look for. Both have the same bytes.
CARDS = ("MODEL_CARD.md", "README.md")
FORMATS: Mapping[str, Callable[[Summary], str]] = {"html": run_page, "md": run_markdown}
_LOG = logging.getLogger(__name__)


def write_report(run: Path) -> Summary:
    """Writes the report of a run that has begun, and the card of one that is finished. The caller holds the run."""
    summary = summarise(run)
    if summary.finished:
        card = model_card(summary, library_of(run / "model", str(summary.plan["base"]["model_type"])))
        for name in CARDS:
            rundir.write_file(run / "model" / name, card.encode())
    rundir.write_file(run / REPORT, run_page(summary).encode())
    return summary


def merged_cards(run: Path, dtype: str) -> dict[str, bytes]:
    """The card of a finished run's model once its adapter is merged, by its files' names; none of another folder."""
    if not (run / "evaluation.json").is_file():
        return {}
    return dict.fromkeys(CARDS, model_card(summarise(run), "transformers", dtype).encode())


def is_current(run: Path) -> bool:
    """Whether the report is there and not older than what was measured; it is written last."""
    report, measured = run / REPORT, run / "evaluation.json"
    return report.is_file() and (not measured.is_file() or report.stat().st_mtime_ns >= measured.stat().st_mtime_ns)


def try_report(run: Path) -> None:
    """`write_report` at the end of a run, which is whole without it: a failure is told, not raised."""
    try:
        write_report(run)
    except Exception as error:  # whatever it is, the run is finished and its numbers stand
        cause = f"{type(error).__name__}: {error}"
        _LOG.warning("the run is whole, but its report could not be drawn (%s)", cause)
