"""`tunesmith plan`: what a run would do, without doing it."""

from __future__ import annotations

import argparse
import sys

from tunesmith.cli.verb import Call, Verb, add_plugins, add_recipe


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api
    from tunesmith.report.live import View
    from tunesmith.report.plan_view import show_plan
    from tunesmith.report.screen import screen

    with View(sys.stderr) as view:
        planned = api.plan(options.recipe, options.overrides, plugins=options.plugins, listen=view.listen)
    if call.json:
        call.print_json(planned.to_json())
    else:
        show_plan(planned, screen(sys.stdout))
    return 0


VERB = Verb("plan", "show what a recipe would do: data, memory, time, every default and why", _add, _run)
