"""`tunesmith evaluate`: measure a run on more rows, or show what it has measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.train import show_result
from tunesmith.cli.verb import Call, Verb, add_plugins, add_run
from tunesmith.errors import InputError


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--data", metavar="F", type=Path, help="rows to measure on; left out, shows what was measured")
    parser.add_argument("--metrics", metavar="a,b", type=_names, help="metrics in place of the recipe's")
    parser.add_argument("--no-base", action="store_true", help="measure the tuned model alone")
    add_plugins(parser)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it names no metric")
    return names


def _run(options: argparse.Namespace, call: Call) -> int:
    if options.data is None and (options.metrics is not None or options.no_base):
        raise InputError("--metrics and --no-base say how to measure new rows", "give the rows with --data FILE")
    from tunesmith import api
    from tunesmith.report.live import View

    with View(sys.stderr if call.json else sys.stdout) as view:
        result = api.evaluate(
            options.path,
            options.data,
            metrics=options.metrics,
            base=not options.no_base,
            plugins=options.plugins,
            listen=view.listen,
        )
    show_result(result, view, call)
    return 0


VERB = Verb("evaluate", "measure a run's model on more rows, beside its base", _add, _run)
