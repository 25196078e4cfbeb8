"""`tunesmith combine`: adapters of one base become one adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.verb import Call, Verb, add_plugins, add_runs


def _add(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="where the folder goes; it must be free")
    parser.add_argument("--weights", metavar="W", type=float, nargs="+", help="one for each adapter; equal if left out")
    parser.add_argument(
        "--how",
        metavar="WAY",
        help="cat, the exact weighted sum (the default); linear, svd, magnitude_prune, ties, dare_linear or dare_ties; "
        "the last four with _svd on the updates and not on their factors",
    )
    parser.add_argument("--density", metavar="D", type=float, help="share of entries that stay; 0.5 if left out")
    parser.add_argument("--rank", metavar="R", type=int, help="of a way that ends in svd; the largest of the adapters'")
    parser.add_argument("--seed", metavar="N", type=int, help="of what DARE draws; 17 if left out")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api, combining
    from tunesmith.adapter_folders import by_name, saved
    from tunesmith.adapters import describe

    api.load_plugins(options.plugins)
    adapters = saved(by_name(options.paths))
    read = (options.weights, options.how, options.density, options.rank, options.seed)
    asked = combining.combination(adapters, *read)
    combining.combine(adapters, asked, options.to)
    (made,) = saved({options.to.absolute().name: options.to})
    if call.json:
        call.print_json({**describe(made), "combined": made.card["combined"]})
        return 0
    parts = " + ".join(f"{weight:g} {one.name}" for one, weight in zip(adapters, asked.weights, strict=True))
    sys.stdout.write(f"{parts} by {asked.how}: {options.to}\n")
    return 0


VERB = Verb("combine", "make one adapter of several that stand on one base", _add, _run)
