"""The answers behind a run's numbers, a line a row: written when a set is measured, read to compare and to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith import rundir
from tunesmith.data.checks import row_keys
from tunesmith.errors import InputError
from tunesmith.types import Prediction, Row

FOLDER = "predictions"
MAJORITY = "majority"  # the one model whose probabilities are the same for every row: they are left out
DIGITS = 9  # of a stored probability: what a number of fp32 has


@dataclass(frozen=True, slots=True)
class Answered:
    """One row with what each model answered to it.

    `key` tells the row with its reference, `shown` what of it the models were shown (`data.checks.row_keys`);
    `copy` counts rows of one key.
    """

    key: str
    shown: str
    copy: int
    where: str
    input: str
    reference: str | None
    tags: Mapping[str, str]
    answers: Mapping[str, Prediction]


def write(run: Path, name: str, rows: Sequence[Row], found: Mapping[str, Sequence[Prediction]]) -> None:
    """The answers of each model to rows of the set `name`, beside their references."""
    lines: list[bytes] = []
    for index, row in enumerate(rows):
        shown, key = row_keys(row.value)
        line = {
            "key": key.hex(),
            "shown": shown.hex(),
            "where": row.where,
            "input": asked_text(row),
            "reference": (one := next(iter(found.values()))[index]).reference,
            **({"other_references": one.other_references} if one.other_references else {}),
            "tags": row.tags,
            "answers": {model: _written(model, predictions[index]) for model, predictions in found.items()},
        }
        lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    (run / FOLDER).mkdir(exist_ok=True)
    rundir.write_file(run / FOLDER / f"{name}.jsonl", b"".join(lines))


def read(run: Path, name: str) -> Iterator[Answered]:
    """The rows of the set `name` in their order; a damaged file is refused by name and line."""
    return read_file(run / FOLDER / f"{name}.jsonl")


def read_file(path: Path) -> Iterator[Answered]:
    """`read` of a set's file, which stands in its run's folder of answers."""
    run = path.parent.parent
    copies = Counter[str]()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = _read(orjson.loads(line), copies)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(
                    f"{path}:{number} is damaged: {why}",
                    f"measure the set again: `tunesmith evaluate {run} --data F`",
                ) from error
            yield found


def remove(run: Path, name: str) -> None:
    """Takes away what an earlier measurement of the set `name` kept: its numbers are no more."""
    (run / FOLDER / f"{name}.jsonl").unlink(missing_ok=True)


def kept(run: Path) -> list[str]:
    """The sets whose answers the run has kept, by name."""
    return sorted(path.stem for path in (run / FOLDER).glob("*.jsonl"))


def asked_text(row: Row) -> str:
    """What a person would call the row's question: the last user turn, or the text, or its words, or a question."""
    said = [m["content"] for m in row.value.get("messages", []) if m["role"] in ("user", "tool")]
    value = row.value
    both = [value[name] for name in ("text_a", "text_b", "question") if name in value]
    told = value.get("text") or value.get("query") or "\n".join(both) or " ".join(value.get("tokens", []))
    return str(said[-1] if said else told)


def _written(model: str, prediction: Prediction) -> dict[str, Any]:
    shares = prediction.probabilities if model != MAJORITY else None
    return {
        "output": prediction.output,
        "scores": prediction.scores,
        "probabilities": shares and {label: float(f"{share:.{DIGITS}g}") for label, share in shares.items()},
        "finished": prediction.finished,
        **({"multi_label": True} if prediction.multi_label else {}),
        **({} if prediction.label_set is None else {"label_set": list(prediction.label_set)}),
    }


def _read(line: dict[str, Any], copies: Counter[str]) -> Answered:
    key, where, reference = line["key"], line["where"], line["reference"]
    copies[key] += 1
    answers = {
        model: Prediction(
            a["output"],
            reference,
            where,
            a["scores"],
            a["probabilities"],
            a["finished"],
            a.get("multi_label", False),
            tuple(line.get("other_references", ())),
            tuple(a["label_set"]) if "label_set" in a else None,
        )
        for model, a in line["answers"].items()
    }
    return Answered(key, line["shown"], copies[key], where, line["input"], reference, line["tags"], answers)
