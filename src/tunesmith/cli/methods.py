"""`tunesmith methods`: what can be trained of a base, what it costs, and when to choose it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tunesmith.cli.verb import Call, Verb, add_plugins

if TYPE_CHECKING:
    from tunesmith.method_table import Line


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="a base as recipes name it; left out, a decoder of 8B parameters"
    )
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api
    from tunesmith.method_table import method_table

    api.load_plugins(options.plugins)
    base, lines = method_table(options.model)
    if call.json:
        call.print_json({"base": base, "methods": [_as_json(line) for line in lines]})
        return 0
    from rich import box
    from rich.table import Table

    from tunesmith.report.figures import gibibytes
    from tunesmith.report.screen import screen

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False)
    for heading in ("method", "trains", "memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    table.add_column("choose it for")
    for line in lines:
        share = "-" if line.trainable is None else f"{100 * line.trainable / line.total:.3g}%"
        held = "-" if line.bytes is None else gibibytes(line.bytes)
        table.add_row(line.name, share, held, line.why_not or line.facts.when or line.facts.summary)
    console = screen(sys.stdout)
    console.print(table)
    console.print(
        f"\nof {base}, with each method's defaults; memory: weights (frozen ones in bf16), gradients and Adam's "
        "moments, without activations. `tunesmith plan` has the whole cost of a recipe."
    )
    return 0


def _as_json(line: Line) -> dict[str, Any]:
    facts = {
        name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(line.facts).items()
    }
    return {
        "name": line.name,
        "trainable": line.trainable,
        "total": line.total,
        "bytes": line.bytes,
        "why_not": line.why_not,
        **facts,
    }


VERB = Verb("methods", "list what can be trained of a base, what it costs and when to choose it", _add, _run)
