"""`tunesmith evaluate`: measure a run on more rows, or show what it has measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

from tunesmith.cli.train import show_result
from tunesmith.cli.verb import Call, Verb, add_corpus, add_plugins, add_run, corpus_of, names
from tunesmith.errors import InputError


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--data", metavar="F", type=Path, help="rows to measure on; left out, shows what was measured")
    parser.add_argument("--name", metavar="NAME", help="of these rows in the results; the file's own if left out")
    parser.add_argument("--metrics", metavar="a,b", type=names, help="metrics in place of the recipe's")
    parser.add_argument(
        "--keep",
        metavar="N",
        type=_keep,
        help="answers to keep in the run, or `all`; the recipe's evaluate.keep if left out",
    )
    parser.add_argument("--no-base", action="store_true", help="measure the tuned model alone")
    add_corpus(parser)
    add_plugins(parser)


def _keep(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it must be a number, or `all`")
    return int(text)


def _run(options: argparse.Namespace, call: Call) -> int:
    given = [f"--{name}" for name in ("name", "metrics", "keep", "corpus") if getattr(options, name) is not None]
    if options.data is None and (given or options.no_base):
        flags = " and ".join([*given, *(["--no-base"] if options.no_base else [])])
        raise InputError(f"{flags}: how to measure new rows, and there are none", "give the rows with --data FILE")
    from tunesmith import api
    from tunesmith.report.live import View

    with View(sys.stderr if call.json else sys.stdout) as view:
        result = api.evaluate(
            options.path,
            options.data,
            name=options.name,
            metrics=options.metrics,
            keep=options.keep,
            base=not options.no_base,
            corpus=corpus_of(options),
            plugins=options.plugins,
            listen=view.listen,
        )
    show_result(result, view, call)
    return 0


VERB = Verb("evaluate", "measure a run's model on more rows, beside its base", _add, _run)
