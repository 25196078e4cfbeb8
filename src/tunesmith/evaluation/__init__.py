"""Metrics over rows, each with its interval, and the run that measures base and tuned alike.

`METRICS` finds a metric's class by its name; constructing it takes the label set (empty where there is none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tunesmith.registry import Registry

if TYPE_CHECKING:
    from tunesmith.evaluation.metrics import RowMetric

METRICS: Registry[Callable[[Sequence[str]], RowMetric]] = Registry("metric", __name__)
