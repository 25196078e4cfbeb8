"""`tunesmith resume`: a stopped run goes on, to the same bits."""

from __future__ import annotations

import argparse
import sys

from tunesmith.cli.train import show_result
from tunesmith.cli.verb import Call, Verb, add_plugins, add_run


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api
    from tunesmith.report.live import View

    call.run = options.path
    with View(sys.stderr if call.json else sys.stdout, with_plan=False) as view:
        result = api.resume(options.path, plugins=options.plugins, listen=view.listen)
    show_result(result, view, call)
    return 0


VERB = Verb("resume", "go on with a run that was stopped or killed", _add, _run)
