"""`tunesmith train`: a recipe becomes a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.verb import Call, Verb, add_plugins, add_recipe

if TYPE_CHECKING:
    from tunesmith.api import Result
    from tunesmith.report.live import View


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder; runs/<recipe's name> if left out")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api
    from tunesmith.report.live import View

    with View(sys.stderr if call.json else sys.stdout) as view:
        result = api.train(
            options.recipe,
            options.overrides,
            out=options.out,
            plugins=options.plugins,
            listen=call.following(view.listen),
        )
    show_result(result, view, call)
    return 0


def show_result(result: Result, view: View, call: Call) -> None:
    """A finished run, for a person or for a machine."""
    if call.json:
        from tunesmith.models.saved import folder_of

        call.print_json(
            {
                "run": str(result.path),
                "model": str(folder_of(result.path)),
                "report": None if result.report is None else str(result.report),
                "records": result.records,
                "effects": result.effects,
                "groups": list(result.groups),
                **({"decoding": dict(result.decoding)} if result.decoding else {}),
            }
        )
        return
    from tunesmith.report.results import show_results

    show_results(result, view.console)


VERB = Verb("train", "train what a recipe describes, and measure it against its base", _add, _run)
