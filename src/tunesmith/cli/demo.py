"""`tunesmith demo`: one complete run on data that comes along."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.train import show_result
from tunesmith.cli.verb import Call, Verb


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the intent alone, by a head on a small encoder")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder; a new one under runs/ if left out")


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith.demo import run_demo
    from tunesmith.report.live import View

    with View(sys.stderr if call.json else sys.stdout) as view:
        result = run_demo(options.quick, options.out, call.following(view.listen))
    show_result(result, view, call)
    return 0


VERB = Verb("demo", "fine-tune a small model here and now, and see what it learned", _add, _run)
