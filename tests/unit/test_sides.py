"""What an encoder-decoder is shown and must say, against the tokenizer of transformers and the model's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from tunesmith import api
from tunesmith.data import sides
from tunesmith.data.chat import Renderer
from tunesmith.errors import InputError
from tunesmith.objectives.sft import Sft
from tunesmith.types import Row

ASKED = {"role": "user", "content": "say it backwards: abc"}
ANSWER = {"role": "assistant", "content": "cba"}


def renderer_of(folder: Path, start: int, length: int | None = None) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(folder), None, length, start)


@pytest.fixture(scope="module")
def tiny_bart(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BART: its tokenizer frames a text, and its decoder begins with the token that ends one."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_t5)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", 1)]
    )
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    tokens = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": 1, "decoder_start_token_id": 1}
    random = {"init_std": 0.1, "forced_eos_token_id": None, "d_model": 32, "max_position_embeddings": 256}
    config = BartConfig(vocab_size=len(tokenizer), **random, **sizes, **tokens)
    folder = tmp_path_factory.mktemp("bart") / "model"
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_bart"])
def test_both_sides_are_as_the_tokenizer_closes_them(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = renderer_of(folder, 0)
    first, second = [ASKED, ANSWER], [{"role": "user", "content": "and d"}, {"role": "assistant", "content": "d"}]
    example = sides.example([*first, *second], None, renderer)
    texts = [piece for piece in example.pieces if piece.stream == "input"]
    said = [piece for piece in example.pieces if piece.stream == "decoder"]
    shown = "\n".join(m["content"] for m in [*first, second[0]])
    assert [t.input_ids_T.tolist() for t in texts] == [tokenizer(t).input_ids for t in (ASKED["content"], shown)]
    for piece, message in zip(said, (ANSWER, second[1]), strict=True):
        assert piece.input_ids_T.tolist() == [0, *tokenizer(message["content"]).input_ids]
        assert piece.weights_T is not None
        assert piece.weights_T.tolist() == [0.0, *[1.0] * (len(piece.input_ids_T) - 1)]
        assert sides.answer_of(piece.input_ids_T[1:-1].tolist(), renderer) == message["content"]


def test_an_answer_that_is_not_to_be_learned_is_only_shown(tiny_t5: Path) -> None:
    quiet = [ASKED, {**ANSWER, "train": False}, ASKED, ANSWER]
    example = sides.example(quiet, None, renderer_of(tiny_t5, 0))
    assert [piece.stream for piece in example.pieces] == ["input", "decoder"]


def test_what_is_cut_is_counted_on_each_side(tiny_t5: Path) -> None:
    long = {"role": "assistant", "content": "cba" * 10}
    example = sides.example([ASKED, long], None, renderer_of(tiny_t5, 0, length=10))
    assert [len(piece.input_ids_T) for piece in example.pieces] == [10, 11]
    asked, said = len(str(ASKED["content"])) - 9, 30 - 9
    assert (example.cut, example.cut_trained) == (asked + said, said)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"text": "plain"}, "asks nothing"),
        ({"messages": [ASKED, ANSWER], "tools": [{"type": "function"}]}, "tools need a chat template"),
        ({"messages": [ASKED, {**ANSWER, "tool_calls": [{}]}]}, "this answer calls a tool"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "a message without text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], cause: str, tiny_t5: Path) -> None:
    with pytest.raises(InputError, match=cause):
        Sft(None).example(Row(row, "row 1"), renderer_of(tiny_t5, 0))


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_bart"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tiny_model_learns_to_answer_and_transformers_says_the_same(
    family: str, method: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three questions learned in three ways of asking, and asked in a fourth; plain transformers says the same."""
    words = ("one", "two", "three")
    learned = [
        {"prompt": f"{i}{mark}", "completion": word} for i, word in enumerate(words, 1) for mark in ("?", "!", "??")
    ]
    rows = [{"prompt": f"{i}.", "completion": word} for i, word in enumerate(words, 1)]
    recipe = {
        "model": str(request.getfixturevalue(family)),
        "objective": "sft",
        "method": method,
        "train": {"max_steps": 80, "batch_size": 9, "learning_rate": 0.02 if method == "full" else 0.05},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 8},
    }
    result = api.train(recipe, data={"train": learned, "test": rows}, out=tmp_path / "run")
    value = {(r["model"], r["metric"]): r["value"] for r in result.records}
    assert value["tuned", "loss"] < (0.5 if method == "full" else value["base", "loss"] - 0.5)
    if method == "full":
        assert value["tuned", "exact_match"] == 1.0
    folder = tmp_path / "whole"
    api.export(result.path, folder, merge=method == "lora")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    losses: list[float] = []
    for row in rows:
        labels = tokenizer(row["completion"], return_tensors="pt").input_ids
        losses += [
            float(model(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels).loss.detach())
        ] * labels.numel()
    assert sum(losses) / len(losses) == pytest.approx(value["tuned", "loss"], rel=1e-3)
    said = model.generate(
        input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=8, do_sample=False
    )
    ours = [p.output for p in api.predict(result.path, rows, max_new_tokens=8)]
    assert tokenizer.batch_decode(said, skip_special_tokens=True) == ours
    code = (result.path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8").split("```python\n")[2].split("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(result.path / "model"))).replace('"..."', repr("1."))
    capsys.readouterr()
    exec(code.replace(f"path/to/{Path(recipe['model']).name}", recipe["model"]), {})
    assert capsys.readouterr().out.splitlines()[-1] == ours[0]


def test_a_config_without_a_start_is_refused(tiny_t5: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_t5, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
        config[name] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names no token that the decoder begins with"):
        api.plan(
            {"model": str(folder), "objective": "sft", "method": "full"},
            data={"train": [{"prompt": "a", "completion": "b"}]},
        )
