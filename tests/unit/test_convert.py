"""A GGUF file written from a known model comes back as that model; a damaged one does not come back at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith import compat
from tunesmith.errors import InputError, RefusedError
from tunesmith.models import convert
from tunesmith.models.cache import cache_dir
from tunesmith.models.fetch import resolve
from tunesmith.models.load import load_backbone, load_tokenizer

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HEADS, KV_HEADS, WIDTH = 4, 2, 32


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source() -> Any:
    """The model that the GGUF files are written from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "Ġ1"]


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q and k in llama.cpp's order: rotary pairs side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model: Any, path: Path, pre: str = "smollm", eos: int = 2) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = interleaved(weight, HEADS)
        if "k_proj" in name:
            weight = interleaved(weight, KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(source: Any, tmp_path: Path) -> Path:
    return write(source, tmp_path / "tiny.gguf")


def test_the_model_comes_back_exactly(file: Path, source: Any) -> None:
    stages: list[str] = []
    local = resolve(str(file), lambda stage, done, total: stages.append(stage))
    assert "convert" in stages
    assert local.name == str(file)
    assert local.source == f"the file {file}, dequantised to fp32"
    assert local.folder.parent == cache_dir() / "models"
    model = load_backbone(local, "fp32", "lm")
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, source(ids).logits)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_tokenizer_comes_with_its_template_and_its_end_of_turn(file: Path) -> None:
    local = resolve(str(file))
    tokenizer = load_tokenizer(local)
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((local.folder / name).read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, 2, 2)
    assert tokenizer("hi").input_ids == tokenizer.convert_tokens_to_ids(["h", "i"])
    assert tokenizer.decode(tokenizer("a  é 1").input_ids) == "a  é 1"


def test_single_digits_are_split_before_spaces_are_joined(file: Path, source: Any, tmp_path: Path) -> None:
    """The rule `smollm`: two spaces before a digit are one token, and no token holds a digit and a space."""
    smol = load_tokenizer(resolve(str(file)))
    assert smol.convert_ids_to_tokens(smol("a  1").input_ids) == ["a", "ĠĠ", "1"]
    plain = load_tokenizer(resolve(str(write(source, tmp_path / "plain.gguf", pre="gpt-2"))))
    assert plain.convert_ids_to_tokens(plain("a  1").input_ids) == ["a", "Ġ", "Ġ1"]


def test_the_same_bytes_each_time(file: Path, tmp_path: Path) -> None:
    first = convert.convert_gguf(file, tmp_path / "a")
    second = convert.convert_gguf(file, tmp_path / "b")
    assert first == second
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_file_is_converted_once_wherever_it_lies(file: Path, tmp_path: Path) -> None:
    local = resolve(str(file))
    file.rename(tmp_path / "moved.gguf")
    stages: list[str] = []
    moved = resolve(str(tmp_path / "moved.gguf"), lambda stage, done, total: stages.append(stage))
    assert moved.folder == local.folder
    assert "convert" not in stages


def test_an_unknown_split_is_refused(source: Any, tmp_path: Path) -> None:
    path = write(source, tmp_path / "odd.gguf", pre="a-rule-of-tomorrow")
    with pytest.raises(InputError, match="by the rule 'a-rule-of-tomorrow'"):
        resolve(str(path))
    assert not list((cache_dir() / "models").iterdir())


def keep(path: Path, fraction: float) -> None:
    os.truncate(path, int(path.stat().st_size * fraction))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda p: os.truncate(p, p.stat().st_size - 40), "is truncated"),
        (lambda p: keep(p, 0.5), "is truncated"),
        (lambda p: keep(p, 0.02), "is truncated"),
        (lambda p: os.truncate(p, 12), "is truncated"),
        (lambda p: os.truncate(p, 0), "is not a GGUF file"),
        (lambda p: p.write_bytes(b"\x80\x04" + bytes(200)), "is not a GGUF file"),
        (lambda p: p.write_bytes(b"GGUF" + b"\xff" * 200), "is truncated or damaged"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], object], cause: str, file: Path) -> None:
    damage(file)
    with pytest.raises(RefusedError, match=cause) as caught:
        resolve(str(file))
    assert "fetch the .gguf file again" in caught.value.remedy


def test_the_files_own_tokens_count_where_transformers_takes_others(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 takes the token that begins a text for the one that ends it."""
    made = convert._tokenizer  # pyright: ignore[reportPrivateUsage]

    def mistaken(source: Path, fields: dict[str, Any]) -> Any:
        tokenizer = made(source, fields)
        tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    monkeypatch.setattr(convert, "_tokenizer", mistaken)
    tokenizer = load_tokenizer(resolve(str(file)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_tokenizer_that_transformers_cannot_make_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise TypeError("failed to extract enum PyMerges")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    with pytest.raises(InputError, match=r"cannot convert the tokenizer of tiny\.gguf: failed to extract"):
        resolve(str(file))


def test_a_rule_to_split_text_that_a_newer_transformers_knows_is_said_so(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "gguf_splits", dict)
    with pytest.raises(InputError, match="splits text by the rule 'qwen2'") as refusal:
        resolve(str(write(source, tmp_path / "other.gguf", pre="qwen2")))
    assert refusal.value.remedy.startswith("install transformers 5.18 or newer")


@pytest.mark.skipif(not compat.gguf_splits(), reason="transformers 5.17 knows no GGUF splits")
def test_known_splits_are_found_in_transformers() -> None:
    assert {"llama-bpe", "qwen2"} <= compat.gguf_splits().keys()
    assert not compat.gguf_splits().keys() & compat.GGUF_SINGLE_DIGITS


@pytest.mark.slow
def test_the_real_bases(model_cache: Path) -> None:
    smol, minilm = resolve("smollm2-135m-instruct"), resolve("all-minilm-l6-v2")
    assert smol.entry is not None
    assert smol.entry.package is not None
    assert smol.sha256 == smol.entry.package.folder_sha256
    tokenizer, model = load_tokenizer(smol), load_backbone(smol, "fp32", "lm")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id

    encoder, words = load_backbone(minilm, "fp32", "pooled"), load_tokenizer(minilm)
    texts = ["The cat sits outside", "A cat is sitting outdoors", "Interest rates rose"]
    vectors = [encoder(**words(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in texts]
    near, far = (torch.cosine_similarity(vectors[0], other, dim=0) for other in vectors[1:])
    assert near > 0.8 > 0.2 > far
