"""A GGUF file read back by transformers is the model and the tokenizer that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith import compat
from tunesmith.errors import InputError
from tunesmith.models.convert import convert_gguf
from tunesmith.models.fetch import resolve
from tunesmith.models.gguf_write import write_gguf
from tunesmith.models.load import load_tokenizer

pytestmark = pytest.mark.skipif(not compat.gguf_splits(), reason="transformers 5.17 knows no GGUF splits")

TEXTS = ["A fox, 2024 and  the wörld\n\n don't", "<|end|>日本 x<|end|>", " leads", "tab\tand 12,345.6"]
CORPUS = ["the fox and the hound found 2024 hounds", "don't lead the world, they said; they read"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def byte_level(split: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    steps: dict[str, list[Any]] = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(compat.gguf_splits()["qwen2"]), "isolated")],
    }
    backend = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "qwen2")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps[split], whole]) if steps[split] else whole
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return named(backend)


def sentencepiece(spaces: str = "everywhere") -> Any:
    """As Llama 2's: pieces joined in the order of the vocabulary, bytes where there is no piece.

    A space is put before each stretch of text, or before the first alone.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL))
    found = json.loads(learned.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *(t for t in found["vocab"] if t not in SPECIAL)]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in found["merges"]]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if spaces == "everywhere":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return named(backend)


def named(backend: Any) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def model_of(kind: str, size: int, **more: Any) -> Any:
    import transformers as t

    shape = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "head_dim": 16,
    }
    config = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config}[kind]
    torch.manual_seed(3)
    model = t.AutoModelForCausalLM.from_config(config(**{**shape, **more})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def logits(model: Any, size: int) -> torch.Tensor:
    ids = torch.arange(3, 43)[None] % size
    with torch.no_grad():
        return model(ids).logits[0]


def back_of(file: Path, to: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    convert_gguf(file, to)
    return AutoModelForCausalLM.from_pretrained(to).eval(), load_tokenizer(resolve(str(to)))


CASES = [
    pytest.param("llama", byte_level, "smollm", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("llama", byte_level, "gpt-2", {}, id="llama"),
    pytest.param("qwen2", byte_level, "qwen2", {}, id="qwen2"),
    pytest.param("qwen3", byte_level, "qwen2", {"head_dim": 128}, id="qwen3"),
    pytest.param("qwen3", byte_level, "qwen2", {"head_dim": 32}, id="qwen3-other-width"),
    pytest.param("mistral", sentencepiece, None, {"sliding_window": None}, id="mistral-sentencepiece"),
    pytest.param("llama", sentencepiece, None, {"head_dim": 32}, id="llama-sentencepiece-other-width"),
]


@pytest.mark.parametrize(("kind", "tokenizer_of", "split", "more"), CASES)
def test_what_is_read_back_is_what_was_written(
    kind: str, tokenizer_of: Any, split: str | None, more: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(split) if split else tokenizer_of()
    size = len(tokenizer) + 5  # a matrix larger than the vocabulary, as many models have
    model = model_of(kind, size, **more)
    write_gguf(model, tokenizer, "{{ messages }}", [3], tmp_path / "m.gguf", "fp32")
    back, read = back_of(tmp_path / "m.gguf", tmp_path / "back")
    torch.testing.assert_close(logits(back, size), logits(model, size), rtol=0, atol=0)
    assert [read(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert read.chat_template == "{{ messages }}"
    assert (read.eos_token, read.bos_token) == ("</s>", "<s>")


def test_a_space_at_the_beginning_alone_is_read_as_what_the_model_is_used_for(tmp_path: Path) -> None:
    """llama.cpp puts one before every stretch of text or before none: a conversation has none, plain text only one."""
    tokenizer = sentencepiece("first")
    model = model_of("llama", len(tokenizer))
    for template, texts in (("{{ messages }}", [TEXTS[1], "<|end|> the fox"]), (None, [TEXTS[0], TEXTS[3]])):
        file = tmp_path / f"{template is None}.gguf"
        write_gguf(model, tokenizer, template, [3], file, "fp32")
        _, read = back_of(file, file.with_suffix(""))
        assert [read(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize(("dtype", "apart"), [("bf16", 2**-8), ("fp16", 2**-11), ("q8_0", 1 / 254 + 2**-11)])
def test_matrices_are_rounded_as_the_dtype_says(dtype: str, apart: float, tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    model = model_of("llama", len(tokenizer))
    write_gguf(model, tokenizer, None, [], tmp_path / "m.gguf", dtype)
    back, _ = back_of(tmp_path / "m.gguf", tmp_path / "back")
    for (name, ours), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        if ours.ndim == 1:
            assert torch.equal(ours, theirs)
            continue
        largest = ours.reshape(-1, 32).abs().amax(-1, keepdim=True) if dtype == "q8_0" else ours.reshape(-1, 32).abs()
        error = (ours - theirs).reshape(-1, 32).abs()
        assert (error <= apart * 1.01 * largest + 1e-7).all(), name
        assert error.max() > 0
    assert (tmp_path / "m.gguf").stat().st_size < 4 * sum(p.numel() for p in model.parameters())


def test_llama_31s_slowed_frequencies_are_written_as_factors(tmp_path: Path) -> None:
    """The factors as the Llama 3.1 release defines them, written out by hand."""
    from gguf import GGUFReader

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    tokenizer = byte_level("gpt-2")
    write_gguf(
        model_of("llama", len(tokenizer), rope_parameters=rope), tokenizer, None, [], tmp_path / "m.gguf", "fp32"
    )
    (found,) = [t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
    expected = []
    for i in range(0, 16, 2):
        turn = 2 * np.pi * 5e5 ** (i / 16)  # tokens of a whole turn
        smooth = (64 / turn - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if turn < 64 / 4 else 8.0 if turn > 64 / 1 else between)
    np.testing.assert_allclose(found.data, expected, rtol=1e-5)
    assert len(set(expected)) > 2


def test_what_gguf_cannot_say_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    import transformers as t
    from tokenizers import pre_tokenizers

    tokenizer, to = byte_level("gpt-2"), tmp_path / "m.gguf"

    def refused(model: Any, with_tokenizer: Any, why: str) -> None:
        with pytest.raises(InputError, match=why):
            write_gguf(model, with_tokenizer, None, [], to, "fp32")

    size = len(tokenizer)
    refused(model_of("mistral", size, sliding_window=16), tokenizer, "attends to the last 16 tokens")
    refused(
        model_of("llama", size, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        tokenizer,
        "scaled by linear",
    )
    refused(model_of("llama", size, attention_bias=True), tokenizer, "no attention_bias set")
    refused(model_of("qwen2", size, hidden_act="gelu"), tokenizer, "no gelu in its layers")
    falcon = t.FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=size)
    refused(t.AutoModelForCausalLM.from_config(falcon), tokenizer, "no GGUF is written of a falcon")
    llama = model_of("llama", 300)
    refused(llama, load_tokenizer(resolve(str(tiny_llama))), "with a tokenizer that joins nothing")
    other = byte_level("gpt-2")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    refused(llama, other, "splits text by a rule")
    wider = model_of("llama", size)
    wider.model.layers[1].mlp.side_proj = torch.nn.Linear(64, 64, bias=False)
    refused(wider, tokenizer, r"GGUF's llama architecture has no tensor model\.layers\.1\.mlp\.side_proj\.weight")
