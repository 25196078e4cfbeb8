"""What the audit found in the data, as sentences: each fine, or something to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.report.figures import in_rows

Json = Mapping[str, Any]
LABELS = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence; `fine` where there is nothing to look at."""

    fine: bool
    text: str


def findings(audit: Json) -> list[Finding]:
    """Of every split of a plan's audit."""
    return [*_leaks(audit), *_repeats(audit), *_cut(audit), *_labels(audit)]


def doubtful_labels(audit: Json) -> list[str]:
    """What of train cannot be right as it stands: the same text answered in two ways, one label spelled in two."""
    found: list[str] = []
    against = audit.get("contradictions")
    if against and against["rows"]:
        here, there = (file_name(place) for place in against["places"][0])
        found.append(
            f"{in_rows(against['rows'])} of train show the same as another and have a different answer, such as {here} "
            f"and {there}"
        )
    alike: dict[str, list[str]] = {}
    for label, count in (audit["train"].get("labels") or {}).items():
        alike.setdefault(" ".join(label.casefold().split()), []).append(f"{label!r} ({count:,})")
    for spelled in alike.values():
        if len(spelled) > 1:
            found.append(f"labels of train that differ in capitals or spaces alone are two: {', '.join(spelled)}")
    return found


def splits(audit: Json) -> dict[str, Json]:
    """Train, validation and every test set, by name."""
    held = {"validation": audit["validation"]} if audit["validation"] else {}
    return {"train": audit["train"], **held, **audit["tests"]}


def file_name(path: str) -> str:
    """The last part of a path, whichever way its slashes lean: folders of a machine say nothing to others."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _leaks(audit: Json) -> Iterator[Finding]:
    overlaps = {"validation": audit["shared_with_validation"], **audit["shared_with_tests"]}
    known = {name: overlap for name, overlap in overlaps.items() if overlap}
    shared = {name: overlap for name, overlap in known.items() if overlap["rows"]}
    for name, overlap in shared.items():
        there, here = (file_name(place) for place in overlap["places"][0])
        yield Finding(
            False,
            f"{in_rows(overlap['rows'])} of {overlap['of']:,} of {name} stand in train too, such as {there} = {here}; "
            f"train gave up its {in_rows(overlap['train_rows'])}",
        )
    apart = [name for name in known if name not in shared]
    if apart:
        yield Finding(True, f"no row of {' or '.join(apart)} stands in train")


def _repeats(audit: Json) -> Iterator[Finding]:
    count = audit["duplicates"]
    if count:
        yield Finding(False, f"{in_rows(count)} of train repeat an earlier one; they are kept")
    else:
        yield Finding(True, "no row of train repeats another")
    reasons = {"shared": "stand in a held-out set", "empty": "are empty", "masked": "have nothing to learn"}
    for reason, dropped in audit["dropped"].items():
        if dropped and reason != "shared":
            yield Finding(False, f"{in_rows(dropped)} of train were dropped: they {reasons.get(reason, reason)}")


def _cut(audit: Json) -> Iterator[Finding]:
    whole: list[str] = []
    for name, split in splits(audit).items():
        if split["truncated"]:
            answers = split["truncated_answers"]
            also = f", the answers of {answers:,} among them" if answers else ", none of their answers"
            yield Finding(False, f"{in_rows(split['truncated'])} of {name} were cut to train.sequence_length{also}")
        else:
            whole.append(name)
    if whole:
        yield Finding(True, f"no row of {', '.join(whole)} was cut")


def _labels(audit: Json) -> Iterator[Finding]:
    yield from (Finding(False, text) for text in doubtful_labels(audit))
    for name, missing in audit["unknown_labels"].items():
        listed = ", ".join(f"{label} ({count:,})" for label, count in list(missing.items())[:LABELS])
        yield Finding(False, f"labels of {name} that train lacks, so that no answer can be right: {listed}")
