"""`tunesmith export`: a folder that others load; a merged model is the one that was measured, or does not leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import api, compat, exporting
from tunesmith.cli import main
from tunesmith.errors import InputError, RefusedError

ROWS: list[dict[str, Any]] = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(12)]
STARTS = [{"name": "lora", "init": init, "rank": 4} for init in ("pissa", "eva")]
METHODS = [*STARTS, "lora", "dora", "adalora", "vera", "ia3", "loha", "lokr", {"name": "oft", "block_size": 8}]


def run_of(tiny_llama: Path, to: Path, method: Any) -> Path:
    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": method,
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 4, "base": False, "metrics": ["loss"]},
    }
    return api.train(recipe, data={"train": ROWS[:8], "test": ROWS[8:]}, out=to).path


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny_llama, tmp_path_factory.mktemp("export") / "run", "lora")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m if isinstance(m, str) else m.get("init", m["name"]))
def test_a_merged_model_answers_as_the_run_does(method: Any, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = run_of(tiny_llama, tmp_path / "run", method)
    done = api.export(run, tmp_path / "merged", merge=True)
    assert done.check is not None
    assert done.check.rows == 4
    assert done.check.agreement == 1
    assert done.check.largest < 1e-4
    ours = api.load(run).policy.eval()
    ours.model.set_attn_implementation("sdpa")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = (api.predict(folder, ROWS[8:]) for folder in (run, tmp_path / "merged"))
    assert [p.output for p in before] == [p.output for p in after]


def test_a_merged_model_has_a_card_that_says_so(run: Path, tmp_path: Path) -> None:
    api.export(run, tmp_path / "merged", merge=True, dtype="fp16")
    card = (tmp_path / "merged" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    own = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "The adapter is merged into the base's weights, which are fp16 here: this folder is one whole model." in card
    assert "merged into the base" not in own
    assert "library_name: transformers" in card
    assert "base_model_relation: adapter" not in card
    assert "PeftModel" in own
    assert "PeftModel" not in card
    numbers = [line for line in own.splitlines() if line.startswith("| ")]
    assert numbers
    assert set(numbers) <= set(card.splitlines())
    licence = [line for line in own.splitlines() if line.startswith("license")]
    assert [line for line in card.splitlines() if line.startswith("license")] == licence
    # A folder that is no run has no numbers, and so no card.
    api.export(run, tmp_path / "copy")
    api.export(tmp_path / "copy", tmp_path / "again", merge=True, data=ROWS[8:])
    assert not (tmp_path / "again" / "MODEL_CARD.md").exists()


def test_an_adapter_is_copied_as_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "adapter")]) == 0
    assert str(tmp_path / "adapter") in capsys.readouterr().out
    for file in (run / "model").iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_merge_that_changes_the_answers_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.TOLERANCE, "bf16", 1e-9)
    with pytest.raises(RefusedError, match="nats a token"):
        api.export(run, tmp_path / "merged", merge=True, dtype="bf16")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setitem(exporting.TOLERANCE, "fp32", -1.0)
    with pytest.raises(RefusedError, match="nats a token") as refused:
        api.export(run, tmp_path / "merged", merge=True, dtype="fp32")
    assert refused.value.remedy == "export as a folder without --merge"  # and not what was just asked for
    assert api.export(run, tmp_path / "merged", merge=True, dtype="fp16").check is not None
    from safetensors.torch import load_file

    assert {w.dtype for w in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}


def test_what_cannot_be_exported_is_said(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        api.export(run, tmp_path / "taken")
    with pytest.raises(InputError, match="merge is not asked for"):
        api.export(run, tmp_path / "other", dtype="bf16")
    full = run_of(tiny_llama, tmp_path / "full", "full")
    with pytest.raises(InputError, match="no adapter"):
        api.export(full, tmp_path / "other", merge=True)
    bottleneck = run_of(tiny_llama, tmp_path / "bottleneck", "bottleneck")
    with pytest.raises(InputError, match="no adapter that could be merged") as refusal:
        api.export(bottleneck, tmp_path / "other", merge=True)
    assert "its folder is an adapter" in refusal.value.remedy
    assert api.export(bottleneck, tmp_path / "other").path == tmp_path / "other"
    assert api.predict(tmp_path / "other", ROWS[8:]) == api.predict(bottleneck, ROWS[8:])


KNOWS_GGUF = pytest.mark.skipif(bool(compat.gguf_remedy()), reason="transformers 5.17 knows no GGUF splits")


@KNOWS_GGUF
@pytest.mark.parametrize(("method", "dtype"), [("lora", None), ("full", "q8_0")])
def test_a_gguf_file_answers_as_the_run_does(
    method: str, dtype: str | None, nameable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(nameable, tmp_path / "run", method)
    to = tmp_path / "out" / "tiny.gguf"
    assert main(["export", str(run), "--to", str(to), "--json", *(["--dtype", dtype] if dtype else [])]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(to)
    assert told["rows"] == 4
    assert told["largest"] < (1e-4 if dtype is None else 0.1)
    assert [path.name for path in to.parent.iterdir()] == ["tiny.gguf"]
    recipe = {"model": str(to), "objective": "sft", "method": "lora", "train": {"max_steps": 1}}
    api.plan(recipe, data={"train": ROWS})  # what was written is a base for others


def test_a_gguf_file_takes_no_others_place(run: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "b.GGUF"
    file.write_bytes(b"mine")
    folder.mkdir()
    for to, cause in ((file, "is a file that exists already"), (folder, "is a folder, and a GGUF file is a file")):
        with pytest.raises(InputError, match=cause):
            api.export(run, to)
    assert file.read_bytes() == b"mine"


def test_no_gguf_is_made_that_could_not_be_read_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "gguf_splits", dict)
    with pytest.raises(InputError, match="cannot read back") as refusal:
        api.export(run, tmp_path / "out" / "tiny.gguf")
    assert "transformers 5.18" in refusal.value.remedy
    assert not (tmp_path / "out").exists()


@KNOWS_GGUF
def test_a_gguf_file_that_answers_otherwise_is_refused_and_leaves_nothing(
    nameable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(nameable, tmp_path / "run", "lora")
    monkeypatch.setitem(exporting.TOLERANCE, "q8_0", 1e-9)
    with pytest.raises(RefusedError, match="nats a token"):
        api.export(run, tmp_path / "out" / "tiny.gguf", dtype="q8_0")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="no folder has weights of q8_0"):
        api.export(run, tmp_path / "merged", merge=True, dtype="q8_0")


def test_no_gguf_is_made_of_a_classifier(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(4) for word in ("red", "blue")]
    recipe = {"model": str(tiny_bert), "objective": "classify", "method": "head", "train": {"max_steps": 1}}
    run = api.train(recipe, data={"train": rows}, out=tmp_path / "run").path
    with pytest.raises(InputError, match="writes no text, and a GGUF file here is of a language model"):
        api.export(run, tmp_path / "tiny.gguf")
