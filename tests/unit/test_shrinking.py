"""Fewer layers of a base: which they are, what the folder holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import InputError, RefusedError
from tunesmith.models.fetch import resolve
from tunesmith.shrinking import shrink


@pytest.fixture(scope="module")
def deep(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, with a tokenizer."""
    import shutil

    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers = 7
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_llama / name).is_file():
            shutil.copyfile(tiny_llama / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("asked", "chosen"), [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), ([1, 5], [1, 5])]
)
def test_the_folder_computes_what_those_layers_compute(
    asked: int | list[int], chosen: list[int], deep: Path, tmp_path: Path
) -> None:
    made = shrink(str(deep), asked, tmp_path / "small")
    assert list(made.layers) == chosen
    whole: Any = AutoModelForCausalLM.from_pretrained(deep)
    small = AutoModelForCausalLM.from_pretrained(made.path)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in chosen)
    ids = torch.arange(4, 24)[None]
    assert torch.equal(whole(ids, use_cache=False).logits, small(ids, use_cache=False).logits)
    assert made.parameters == sum(p.numel() for p in small.parameters())
    assert json.loads((made.path / "shrunk.json").read_text())["layers"] == chosen
    assert (made.path / "tokenizer.json").read_bytes() == (deep / "tokenizer.json").read_bytes()


def test_an_encoder_and_kinds_of_layers_by_place(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    made = shrink(str(tiny_bert), 1, tmp_path / "bert")
    assert AutoModel.from_pretrained(made.path).config.num_hidden_layers == 1
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    config = Gemma3TextConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=4, layer_types=kinds, pad_token_id=0
    )
    folder = tmp_path / "gemma"
    Gemma3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    small = shrink(str(folder), [1, 2], tmp_path / "small").path
    assert json.loads((small / "config.json").read_text())["layer_types"] == kinds[1:3]


def test_the_licence_of_the_base_goes_along(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    source = replace(resolve(str(tiny_llama)), licence="apache-2.0")
    monkeypatch.setattr("tunesmith.shrinking.resolve", lambda name: source if name == "named" else resolve(name))
    assert resolve(str(shrink("named", 1, tmp_path / "small").path)).licence == "apache-2.0"
    assert resolve(str(tiny_llama)).licence is None


def test_what_makes_no_smaller_model_is_refused(tiny_llama: Path, tiny_t5: Path, tmp_path: Path) -> None:
    for layers, cause in ((2, "2 of 2 layers"), (0, "0 of 2"), ([0, 0], "no smaller model"), ([1, 0], "no smaller")):
        with pytest.raises(InputError, match=cause):
            shrink(str(tiny_llama), layers, tmp_path / "small")
    with pytest.raises(InputError, match="a stack of layers on each side"):
        shrink(str(tiny_t5), 1, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_adapter_has_no_layers_and_a_whole_run_has(tiny_llama: Path, tmp_path: Path) -> None:
    asked = {"model": str(tiny_llama), "objective": "sft", "train": {"max_steps": 1}, "precision": "fp32"}
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(4)]
    for method in ("lora", "full"):
        api.train(asked | {"method": method}, data={"train": rows}, out=tmp_path / method)
    with pytest.raises(InputError, match="is an adapter by lora"):
        shrink(str(tmp_path / "lora"), 1, tmp_path / "small")
    made = shrink(str(tmp_path / "full"), 1, tmp_path / "small")
    assert AutoModelForCausalLM.from_pretrained(made.path).config.num_hidden_layers == 1


def test_a_folder_that_computes_something_else_is_refused(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlike(config: Any, count: int, chosen: list[int]) -> None:
        config.num_hidden_layers = len(chosen)
        config.rms_norm_eps = 10.0

    monkeypatch.setattr("tunesmith.shrinking._describe", unlike)
    with pytest.raises(RefusedError, match="computes something else"):
        shrink(str(deep), 2, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_base_that_is_not_one_stack_is_refused(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.shrinking.stacks", lambda model: {})
    with pytest.raises(InputError, match="is not one stack of 7 layers"):
        shrink(str(deep), 2, tmp_path / "small")


@pytest.mark.parametrize("layers", ["two", "0,,4", "-1"])
def test_layers_are_numbers(layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shrink", "smollm2-135m-instruct", "--layers", layers, "--to", "small"]) == 2
    assert "numbers with commas between them" in capsys.readouterr().err
