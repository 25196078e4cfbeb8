"""`tunesmith methods`: every method with what it costs on a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.methods import METHODS


def table(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    assert main(["methods", "--json", *words]) == 0
    return {line["name"]: line for line in json.loads(capsys.readouterr().out)["methods"]}


def test_every_method_of_a_base_is_counted(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = table(capsys, "--model", str(tiny_llama))
    assert list(found) == list(METHODS)
    whole = found["full"]["total"]
    assert found["full"]["trainable"] == whole
    assert found["full"]["bytes"] == 16 * whole  # type: ignore[operator]
    assert found["head"]["trainable"] is None
    assert "needs `untie`" in str(found["head"]["why_not"])
    # Two layers of q, o (32 x 32), k, v (32 x 16), gate, up (32 x 64) and down (64 x 32), at rank 16.
    rows_and_columns = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert found["lora"]["trainable"] == 16 * rows_and_columns
    assert all(line["when"] for line in found.values())


def test_an_encoder_has_its_head(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = table(capsys, "--model", str(tiny_bert))
    assert found["head"]["trainable"] == 2 * 32 + 2


def test_without_a_base_it_is_a_decoder_of_8_billion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "of a decoder of 8B parameters" in text
    assert " 100%" in text
    assert all(name in text for name in METHODS)
