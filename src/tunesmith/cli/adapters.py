"""`tunesmith adapters`: what the adapters of runs are, and whether they stand on one base."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tunesmith.cli.verb import Call, Verb, add_plugins, add_runs


def _add(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import adapter_folders, api
    from tunesmith.adapters import describe

    api.load_plugins(options.plugins)
    found = adapter_folders.saved(adapter_folders.by_name(options.paths))
    described = [describe(one) for one in found]
    clash = adapter_folders.clash(found)
    if call.json:
        call.print_json({"adapters": described, "one_base": clash is None, "clash": clash and str(clash)})
        return 0
    from rich import box
    from rich.table import Table

    from tunesmith.report.figures import large
    from tunesmith.report.screen import screen

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for heading in ("name", "method", "rank", "parameters", "size", "objective", "base", "measured"):
        table.add_column(heading, justify="right" if heading in ("rank", "parameters", "size") else "left")
    for one in described:
        table.add_row(
            one["name"],
            " on ".join([one["method"], *reversed(one["beneath"])]),
            str(one["rank"] or ""),
            large(one["parameters"]),
            _size(one["bytes"]),
            one["objective"],
            f"{one['base']} {one['base_sha256'][:8]}",
            _measured(one["metric"]),
        )
    console = screen(sys.stdout)
    console.print(table)
    if len(described) > 1:
        can = "they share one base: `tunesmith chat` and `tunesmith combine` take them together"
        console.print(f"\n{can if clash is None else f'not together: {clash}'}", soft_wrap=True)
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 10**5 else f"{count / 1e3:,.1f} kB"


def _measured(record: dict[str, Any] | None) -> str:
    from tunesmith.report.figures import figure

    if record is None:
        return "nothing"
    low, high = figure(record["low"]), figure(record["high"])
    return f"{record['metric']} {figure(record['value'])} [{low}, {high}] on {record['data']}"


VERB = Verb("adapters", "list adapters, and say whether they stand on one base", _add, _run)
