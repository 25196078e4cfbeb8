"""docs/errors.md: every refusal with its cause, its remedy and its exit code, by area."""

from __future__ import annotations

import re

from error_sites import Site, find, substitutions
from pages import page, table

# The first pattern that a file's name matches gives its area; what matches none comes last.
AREAS: tuple[tuple[str, str], ...] = (
    ("The command line", r"cli/"),
    ("Recipes", r"(recipe|yaml_text|registry|plugins)"),
    ("What fits together", r"rule_table\.py"),
    ("Data", r"data/(?!chat|turns|template|align)"),
    ("Conversations and their templates", r"data/"),
    ("Base models", r"models/"),
    ("Methods and objectives", r"(methods|objectives)/"),
    ("Planning", r"(planning|settings)\.py"),
    ("Training", r"(engine/native|gradients|monitor|kernels|losses|tracking|trackers)"),
    ("Runs and their folders", r"(rundir|session|training|api|engine|loop)"),
    ("Measuring", r"(evaluation/|measuring|comparing|report)"),
    ("Chat", r"chatting"),
    ("Export", r"exporting"),
)
OTHER = "Everything else"
MARKUP = r"[*<\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
CODES = (
    ("0", "done"),
    ("2", "your input is wrong: a recipe, a data file, an argument, a folder"),
    ("3", "refused for safety: unsafe files, data that would spoil the run, numbers that are not finite"),
    ("4", "out of a resource: disk, memory, a device, a network, a lock that another process holds"),
    ("75", "stopped; the run is saved and can be resumed"),
    ("130, 143", "interrupted, or ended by SIGTERM, where there was nothing to resume"),
    ("1", "a fault of tunesmith itself"),
)
INTRODUCTION = """
Whatever a user can cause ends in one line of cause and one of remedy (several problems of a recipe: a line each). With
`--json` both stand in an object on stdout; a traceback is shown with `--debug` only. In Python the same is raised as
`tunesmith.errors.TunesmithError`, with `cause`, `remedy` and `exit_code`.

‹words› stand for what an error fills in. A test raises each of these errors; a run of all tests fails where none does.
"""


def area_of(site: Site) -> str:
    return next((title for title, pattern in AREAS if re.match(pattern, site.file)), OTHER)


def make() -> str:
    """The whole page."""
    by_area: dict[str, list[list[str]]] = {title: [] for title, _ in (*AREAS, (OTHER, ""))}
    for site in find():
        row = [_escaped(site.cause), _escaped(site.remedy), site.exit_code]
        if site.says_something and row not in by_area[area_of(site)]:
            by_area[area_of(site)].append(row)
    parts = [
        f"## {title}\n\n{table(['cause', 'remedy', 'exit code'], rows)}" for title, rows in by_area.items() if rows
    ]
    other_ways = [[_escaped(why), _escaped(how)] for why, how in substitutions()]
    instead = "These end nothing: the plan says what it does in their place."
    return page(
        "Errors",
        INTRODUCTION,
        table(["exit code", "means"], CODES),
        *parts,
        f"## What is done in another way\n\n{instead}\n\n{table(['why', 'what is done'], other_ways)}",
    )


def _escaped(text: str) -> str:
    """Text of a terminal as text of a page: nothing in it is markup but code in ticks."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(MARKUP, r"\\\g<0>", piece) for piece in pieces)
