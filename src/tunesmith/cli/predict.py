"""`tunesmith predict`: a run's answers to the rows of a file, one JSON line each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.verb import Call, Verb, add_corpus, add_plugins, add_run, corpus_of, json_text
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.types import Prediction

TOP = 5  # labels whose probability is shown


def _add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--input", metavar="F", type=Path, required=True, help="rows to answer; they need no references"
    )
    parser.add_argument("--output", metavar="F", type=Path, help="where the lines go; stdout if left out")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, help="longest answer; the run's own if left out"
    )
    parser.add_argument(
        "--rows",
        action="store_true",
        help="write the rows with the answers in place of their own, to train another model on; "
        "an answer that was cut off is left out",
    )
    add_corpus(parser)
    add_plugins(parser)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError("it must be a whole number of at least 1")
    return number


def _run(options: argparse.Namespace, call: Call) -> int:
    output: Path | None = options.output
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder {output.absolute().parent} for --output", "make it, or give another path")
    if output is not None and output.is_dir():
        raise InputError(f"--output {output} is a folder", "give the path of a file")
    if output is not None and output.exists() and Path(options.input).exists() and output.samefile(options.input):
        raise InputError(f"--output {output} is the file of the rows, which the answers would replace", "give another")
    from tunesmith import rundir

    answers, cut_off = (_rows if options.rows else _answers)(options)
    if cut_off:
        sys.stderr.write(f"{len(cut_off)} answers were cut off, and their rows left out: {', '.join(cut_off[:5])}\n")
    if output is not None:
        lines = [json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers]
        rundir.write_file(output, "".join(lines).encode())
    if call.json:
        found = {"run": str(options.path), "rows": len(answers)} | ({"left_out": cut_off} if options.rows else {})
        call.print_json(found | ({"predictions": answers} if output is None else {"output": str(output)}))
    elif output is not None:
        sys.stdout.write(f"{len(answers):,} answers in {output}\n")
    else:
        sys.stdout.writelines(json_text(answer) + "\n" for answer in answers)
    return 0


def _rows(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    from tunesmith import api
    from tunesmith.plugins import load_plugins

    load_plugins(options.plugins)
    return api.load(options.path, corpus=corpus_of(options)).answered(options.input, options.max_new_tokens)


def _answers(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    from tunesmith import api

    predictions = api.predict(
        options.path,
        options.input,
        max_new_tokens=options.max_new_tokens,
        corpus=corpus_of(options),
        plugins=options.plugins,
    )
    return [_answer(prediction) for prediction in predictions], []


def _answer(prediction: Prediction) -> dict[str, Any]:
    found: dict[str, Any] = {
        "where": prediction.where,
        "output": prediction.output,
        "reference": prediction.reference,
    }
    if prediction.probabilities is not None:
        found["probabilities"] = _top(prediction.probabilities)
    if prediction.label_set is not None:
        found["label_set"] = list(prediction.label_set)
    if "score" in prediction.scores:
        found["score"] = prediction.scores["score"]
    if not prediction.finished:
        found["finished"] = False
    return found


def _top(probabilities: Mapping[str, float]) -> dict[str, float]:
    """The most probable labels, the first first."""
    return dict(sorted(probabilities.items(), key=lambda pair: -pair[1])[:TOP])


VERB = Verb("predict", "answer the rows of a file with a run's model", _add, _run)
