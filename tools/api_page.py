"""The made part of docs/api.md: the events of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NotRequired, get_origin, get_type_hints

from pages import code, table
from recipe_page import first_lines

from tunesmith import events as module
from tunesmith.planning import Plan


def events() -> str:
    """A row for each event: its keys (those in brackets may lack), and what it says."""
    rows: list[list[str]] = []
    for name, shape in module.EVENTS.items():
        kinds = get_type_hints(shape, localns={"Plan": Plan}, include_extras=True)
        keys = [f"[{key}]" if get_origin(kind) is NotRequired else key for key, kind in kinds.items()]
        rows.append([code(name), code(", ".join(keys)), first_lines(shape)])
    return table(["event", "data", "when"], rows)


def verbs() -> str:
    """The first line of each public name."""
    import tunesmith

    lines = {name: inspect.cleandoc(getattr(tunesmith, name).__doc__).splitlines()[0] for name in tunesmith.__all__}
    return table(["name", "is"], [[code(name), line] for name, line in lines.items()])


PARTS: Mapping[str, Callable[[], str]] = {"events": events, "verbs": verbs}
