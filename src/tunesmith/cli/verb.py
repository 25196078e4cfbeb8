"""What a verb is, and what a running one shares with `main`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError


@dataclass(slots=True)
class Call:
    """One invocation. `run`: the run that holds what was done so far, once there is one. `repeats`: the same command
    goes on with what it began.
    """

    json: bool = False
    debug: bool = False
    run: Path | None = None
    repeats: bool = False

    def print_json(self, value: Any) -> None:
        """The verb's result for a machine: the only thing that goes to stdout with --json."""
        sys.stdout.write(json_text(value, indent=2) + "\n")

    def following(self, listen: Callable[[str, Mapping[str, Any]], None]) -> Callable[[str, Mapping[str, Any]], None]:
        """The listener, with `run` kept as soon as the run has a folder."""

        def follow(event: str, data: Mapping[str, Any]) -> None:
            if event == "planned":
                self.run = Path(data["run"])
            listen(event, data)

        return follow


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for stdout; where stdout cannot hold every character, only ASCII."""
    ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False, default=str)


@dataclass(frozen=True, slots=True)
class Verb:
    """`add` declares the arguments; `run` takes what was parsed and returns the exit code."""

    name: str
    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Call], int]


def names(text: str) -> list[str]:
    """Words between commas, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("it names none")
    return found


def show_page(page: Path) -> None:
    """Asks the browser to show a page; says so where there is none to ask."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        sys.stderr.write("no browser could be started: open the file yourself\n")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """--plugin, which only the command line may give: a recipe that names code to run would be unsafe to share."""
    parser.add_argument(
        "--plugin",
        dest="plugins",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a Python file that registers metrics, methods or objectives; may be given several times",
    )


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """--corpus and --corpus-columns, for a model that finds passages."""
    parser.add_argument(
        "--corpus", metavar="F", type=Path, help="passages that are searched; those of the run's recipe if left out"
    )
    parser.add_argument(
        "--corpus-columns",
        metavar="NAME=COLUMN,...",
        type=_columns,
        help="what that file calls the columns `id` and `text`, as in id=doc_id,text=body; as in the run's recipe if "
        "left out",
    )


def corpus_of(options: argparse.Namespace) -> Path | dict[str, Any] | None:
    """What is to be searched, as the command line says it."""
    if options.corpus_columns is None:
        return options.corpus
    if options.corpus is None:
        raise InputError("--corpus-columns is given, and no file that it is of", "give the file with --corpus FILE")
    return {"path": str(options.corpus), "columns": options.corpus_columns}


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(usual.strip() and equals and own.strip() for usual, equals, own in pairs):
        raise argparse.ArgumentTypeError("it must be names and columns, as in id=doc_id,text=body")
    return {usual.strip(): own.strip() for usual, _, own in pairs}


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and the keys that are set on the command line."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe file (YAML)")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="keys set over the recipe's, such as train.epochs=1",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, the folder of a run."""
    parser.add_argument("path", metavar="RUN", type=Path, help="the run's folder, such as runs/tickets")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """RUN, one or several, each with a name if wanted."""
    parser.add_argument(
        "paths",
        metavar="[NAME=]RUN",
        nargs="+",
        help="a run's folder, such as runs/tickets, or an exported model's; it goes by its folder's name if not given",
    )
