"""`tunesmith report`: the report of a run, made again, opened, or as Markdown."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.verb import Call, Verb, add_plugins, add_run, show_page
from tunesmith.errors import InputError


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument(
        "--format",
        choices=("html", "md"),
        default="html",
        help="html: RUN/report.html; md: Markdown, in brief, on stdout",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write it to this file instead")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    if options.open and options.format != "html":
        raise InputError("--open shows a page, and --format md makes none", "leave one of them out")
    from tunesmith import api

    made = api.report(options.path, format=options.format, out=options.out, plugins=options.plugins)
    if call.json:
        key = "path" if isinstance(made, Path) else "text"
        call.print_json({"run": str(options.path), "format": options.format, key: str(made)})
    else:
        sys.stdout.write(f"{made}\n" if isinstance(made, Path) else made)
    if options.open and isinstance(made, Path):
        show_page(made)
    return 0


VERB = Verb("report", "make a run's report again, and show it", _add, _run)
