"""Lengths in tokens of real examples -> a JSON file that `run_*.py --rows mixture` draws from.

    python benchmarks/gpu/lengths.py FOLDER_OF_DATA_SETS OUT.json

Answers of hh_harmless_base (the chosen side) and abstracts with summaries of scitldr_abstract, in the tokens of
smollm2-135m-instruct. Only numbers are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.models.fetch import resolve
from tunesmith.models.load import load_tokenizer

EACH = 4000


def texts(folder: Path) -> Iterator[str]:
    for name in ("hh_harmless_base", "scitldr_abstract"):
        lines = (folder / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[:EACH]:
            yield "\n".join(strings(json.loads(line)))


def strings(record: dict[str, Any]) -> list[str]:
    """All text of a record but the rejected side of a comparison."""
    return [str(value) for key, value in record.items() if key not in ("rejected", "id", "split")]


def main() -> None:
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    found = [min(4096, len(ids)) for ids in tokenizer(list(texts(Path(sys.argv[1]))))["input_ids"]]
    Path(sys.argv[2]).write_text(json.dumps({"source": "hh_harmless_base, scitldr_abstract", "lengths": found}))
    print(f"{len(found)} examples, mean {sum(found) / len(found):.0f}, longest {max(found)}")


if __name__ == "__main__":
    main()
