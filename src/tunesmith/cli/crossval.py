"""`tunesmith crossval`: a recipe judged on all of its training rows, by models that did not see them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.verb import Call, Verb, add_plugins, add_recipe


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--folds", metavar="K", type=int, default=5, help="parts of the training rows; 5 if left out")
    parser.add_argument("--by", metavar="COLUMN", help="a column whose equal values mark rows that stay in one part")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="the run's folder; runs/<recipe's name>-crossval if left out"
    )
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith.cross_validating import crossval
    from tunesmith.report.live import View

    call.repeats = True
    with View(sys.stderr if call.json else sys.stdout) as view:
        found = crossval(
            options.recipe,
            options.overrides,
            folds=options.folds,
            by=options.by,
            out=options.out,
            plugins=options.plugins,
            listen=call.following(view.listen),
        )
    if call.json:
        call.print_json(
            {
                "run": str(found.path),
                "folds": [str(path) for path in found.folds],
                "spread": found.spread,
                "records": found.result.records,
                "effects": found.result.effects,
            }
        )
        return 0
    from tunesmith.report.results import show_results, spread_table

    result = found.result
    show_results(result, view.console)
    view.console.print(spread_table(found.spread, len(found.folds)))
    return 0


VERB = Verb(
    "crossval", "judge a recipe on all its training rows, part by part, and train it on all of them", _add, _run
)
