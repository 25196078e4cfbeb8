"""`tunesmith export`: a run's model as a folder, or GGUF file, that other programs load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.cli.verb import Call, Verb, add_plugins, add_run


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--to", metavar="PATH", type=Path, required=True, help="a new folder, or a new file where it ends in .gguf"
    )
    parser.add_argument("--merge", action="store_true", help="the adapter becomes part of its base: one whole model")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "q8_0"),
        help="of a merged model's weights; q8_0 in GGUF only; fp32 if left out",
    )
    parser.add_argument("--data", metavar="F", type=Path, help="rows to check a merged model on; the run's if left out")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    from tunesmith import api

    asked = {key: getattr(options, key) for key in ("merge", "dtype", "data", "plugins")}
    done = api.export(options.path, options.to, **asked)
    check = done.check
    if call.json:
        found = {"path": str(done.path)}
        told = {} if check is None else {"rows": check.rows, "agreement": check.agreement, "largest": check.largest}
        call.print_json(found | told)
        return 0
    sys.stdout.write(f"exported to {done.path}\n")
    if check is not None:
        sys.stdout.write(
            f"checked on {check.rows} rows: {check.agreement:.1%} of the answers are equal to the run's, "
            f"log-probabilities differ by at most {check.largest:.2g} nats a token\n"
        )
    return 0


VERB = Verb(
    "export", "write a run's model, merged or not, as a folder or GGUF file that other programs load", _add, _run
)
