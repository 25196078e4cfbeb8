"""`tunesmith schema`: the recipe's JSON schema, for editors."""

from __future__ import annotations

import argparse

from tunesmith.cli.verb import Call, Verb, add_plugins


def _add(parser: argparse.ArgumentParser) -> None:
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api
    from tunesmith.methods import METHODS
    from tunesmith.objectives import OBJECTIVES
    from tunesmith.recipe_file import recipe_schema
    from tunesmith.trackers import TRACKERS

    api.load_plugins(options.plugins)
    methods = {name: METHODS.get(name).Options for name in METHODS}
    objectives = {name: OBJECTIVES.get(name).Options for name in OBJECTIVES}
    call.print_json(recipe_schema(methods, objectives, TRACKERS))
    return 0


VERB = Verb("schema", "print the JSON schema of a recipe, for editors", _add, _run)
