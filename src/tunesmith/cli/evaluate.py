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
    parser.add_argument("--by", metavar="a,b", type=_columns, help="groups in place of the recipe's, or `none`")
    parser.add_argument(
        "--keep",
        metavar="N",
        type=_keep,
        help="answers to keep in the run, or `all`; the recipe's evaluate.keep if left out",
    )
    parser.add_argument(
        "--suite",
        metavar="lm-eval:TASK",
        help="in place of rows: a standard task of lm-evaluation-harness, where that and the task's data are installed",
    )
    parser.add_argument("--tasks", metavar="DIR", type=Path, help="with --suite: a folder of tasks; their code is run")
    parser.add_argument("--limit", metavar="N", type=_above_0, help="with --suite: the first rows of each task alone")
    parser.add_argument("--shots", metavar="N", type=_count, help="with --suite: examples before each question")
    parser.add_argument("--no-base", action="store_true", help="measure the tuned model alone")
    add_corpus(parser)
    add_plugins(parser)


def _columns(text: str) -> list[str]:
    return [] if text == "none" else names(text)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least {least}")
    return int(text)


def _above_0(text: str) -> int:
    return _count(text, 1)


def _keep(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it must be a number, or `all`")
    return int(text)


def _run(options: argparse.Namespace, call: Call) -> int:
    _check(options)
    from tunesmith import api, suites
    from tunesmith.report.live import View

    with View(sys.stderr if call.json else sys.stdout) as view:
        if options.suite is not None:
            result = suites.evaluate_suite(
                options.path,
                options.suite,
                tasks=options.tasks,
                limit=options.limit,
                shots=options.shots,
                base=not options.no_base,
                plugins=options.plugins,
                listen=view.listen,
            )
        else:
            result = api.evaluate(
                options.path,
                options.data,
                name=options.name,
                metrics=options.metrics,
                by=options.by,
                keep=options.keep,
                base=not options.no_base,
                corpus=corpus_of(options),
                plugins=options.plugins,
                listen=view.listen,
            )
    show_result(result, view, call)
    return 0


def _check(options: argparse.Namespace) -> None:
    """InputError for flags that are of something else than what is asked for."""
    given = [f"--{name}" for name in ("name", "metrics", "by", "keep", "corpus") if getattr(options, name) is not None]
    of_suite = [f"--{name}" for name in ("tasks", "limit", "shots") if getattr(options, name) is not None]
    if options.suite is None and of_suite:
        raise InputError(f"{' and '.join(of_suite)}: how to ask a standard task", "name it with --suite lm-eval:TASK")
    if options.suite is not None and (given or options.data is not None):
        flags = " and ".join([*given, *(["--data"] if options.data is not None else [])])
        raise InputError(f"{flags}: of rows of your own, and --suite has its own", "leave it out, or leave --suite out")
    if options.suite is None and options.data is None and (given or options.no_base):
        flags = " and ".join([*given, *(["--no-base"] if options.no_base else [])])
        raise InputError(f"{flags}: how to measure new rows, and there are none", "give the rows with --data FILE")


VERB = Verb("evaluate", "measure a run's model on more rows, beside its base", _add, _run)
