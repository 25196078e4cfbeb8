"""docs/metrics.md: every metric with its definition, source, library, range and use."""

from __future__ import annotations

from typing import Any

from pages import code, page, table
from recipe_page import builtin, first_lines

from tunesmith.evaluation import METRICS

INTRODUCTION = """
These names stand in `evaluate.metrics`, `train.early_stopping.metric` and behind `tunesmith evaluate --metrics`. A
recipe that names none gets those of its objective ([recipes](recipes.md#objectives)), of which a metric that not all
rows can have (of JSON, of probabilities) is left out where they cannot. Each comes with its 95% interval, the number of
rows and a paired test of the difference ([statistics](statistics.md)); where rows cannot carry these the program says
why. *Computed by*: the library that does it, or tunesmith's own code and the library that tests hold it to.
"""


def make() -> str:
    """The whole page."""
    rows: list[list[str]] = []
    for name in builtin(METRICS):
        metric: Any = METRICS.get(name)
        low, high = (f"{bound:g}".replace("inf", "∞") for bound in metric.bounds)
        span = f"{low} to {high}, {'higher' if metric.higher_is_better else 'lower'} is better"
        about = metric.about
        rows.append([code(name), first_lines(metric), about.source, about.library, span, about.use])
    return page("Metrics", INTRODUCTION, table(["metric", "is", "source", "computed by", "range", "use it for"], rows))
