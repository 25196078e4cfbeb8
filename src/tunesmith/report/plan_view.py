"""The plan on screen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from tunesmith.plan import Plan


def show_plan(plan: Plan, console: Console) -> None:
    console.print(json.dumps(plan.to_json()["base"]), soft_wrap=True)
