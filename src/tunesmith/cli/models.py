"""`tunesmith models`: the bases that a recipe can name."""

from __future__ import annotations

import argparse
import sys

from tunesmith.cli.verb import Call, Verb


def _add(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith.models.fetch import list_models

    found = list_models()
    if call.json:
        call.print_json(found)
        return 0
    from rich import box
    from rich.table import Table

    from tunesmith.report.screen import screen

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for heading, justify in (("name", "left"), ("kind", "left"), ("size", "right"), ("context", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("licence", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for model in found:
        place = "here" if model["cached"] else str(model["where"]).partition(":")[0]
        context = f"{model['context'] // 1024}k" if model["context"] >= 1024 else str(model["context"])
        table.add_row(model["name"], model["kind"], _size(model["parameters"]), context, model["licence"], place)
    console = screen(sys.stdout)
    console.print(table)
    console.print("\nA recipe's `model` may also be any hub id, a folder or a .gguf file.")
    return 0


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f}M"


VERB = Verb("models", "list the bases that a recipe can name", _add, _run)
