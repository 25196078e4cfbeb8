"""`tunesmith shrink`: a smaller model from some of a base's layers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.verb import Call, Verb


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a base as recipes name it, or a run whose model is whole")
    parser.add_argument(
        "--layers",
        metavar="N",
        type=_layers,
        required=True,
        help="how many, evenly spread; or which: 0,4,8",
    )
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="where the folder goes; it must be free")


def _layers(text: str) -> int | list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError("it must be a number, or numbers with commas between them")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith.shrinking import shrink

    made = shrink(options.model, options.layers, options.to)
    if call.json:
        call.print_json({"path": str(made.path), "layers": list(made.layers), "parameters": made.parameters})
        return 0
    sys.stdout.write(
        f"{made.path}: layers {', '.join(map(str, made.layers))} of {options.model}, {made.parameters:,} parameters\n"
        f"train it with `model: {made.path}`; `objective: distill` learns from a `teacher`\n"
    )
    return 0


VERB = Verb("shrink", "make a smaller model of some of a base's layers, to distil into", _add, _run)
