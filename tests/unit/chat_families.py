"""Six chat-template families over tiny tokenizers: templates written after their public documentation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
LINES = [
    "You are a helpful assistant. What is the capital of France? Paris is the capital of France.",
    "Tell me a joke about cats and dogs, please.\n\n\nThe answer is 42.\n  Two spaces,   three.\t\n",
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}} user assistant system tool model',
    "Straße naïve façade 東京 こんにちは 😀 👍🏽 <think> </think> <tool_call> [INST]",
] * 4


@dataclass(frozen=True)
class Family:
    """`end` closes an answer; `special` are its tokens, `added` those that are not flagged special."""

    name: str
    end: str
    special: tuple[str, ...]
    bos: str | None = None
    eos: str = ""
    added: tuple[str, ...] = ()
    swallows: bool = False  # special tokens take the space behind them
    opens: bool = False  # the tokenizer puts BOS before any text
    system: bool = True
    tools: bool = False

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")


FAMILIES = {
    f.name: f
    for f in (
        Family("chatml", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
        Family(
            "llama3",
            "<|eot_id|>",
            ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            opens=True,
            tools=True,
        ),
        Family(
            "mistral",
            "</s>",
            (
                *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
                *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            ),
            bos="<s>",
            eos="</s>",
            opens=True,
            tools=True,
        ),
        Family(
            "gemma",
            "<end_of_turn>",
            ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            bos="<bos>",
            eos="<eos>",
            opens=True,
            system=False,
        ),
        Family(
            "qwen3",
            "<|im_end|>",
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            eos="<|im_end|>",
            added=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
            tools=True,
        ),
        Family(
            "phi3",
            "<|end|>",
            ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            bos="<s>",
            eos="<|endoftext|>",
            swallows=True,
        ),
    )
}


def wrapped(backend: Tokenizer, family: Family | None = None, **named: Any) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a backend, with the family's tokens and template."""
    if family is not None:
        backend.add_special_tokens(
            [AddedToken(s, special=True, normalized=False, rstrip=family.swallows) for s in family.special]
        )
        backend.add_tokens([AddedToken(s, special=False, normalized=False) for s in family.added])
        if family.opens:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
            )
        named = {"bos_token": family.bos, "eos_token": family.eos, **named}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{k: v for k, v in named.items() if v}
    )
    tokenizer.chat_template = family.template if family else None
    return tokenizer


@cache
def _bytes_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend.to_str()


def byte_level() -> Tokenizer:
    """Byte-level BPE as of GPT-2, trained on a few lines."""
    return Tokenizer.from_str(_bytes_json())


def sentencepiece_like() -> Tokenizer:
    """BPE as of Llama 2: a space before any stretch of text, unknown characters as bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([line.encode("ascii", "ignore").decode().replace("\n", " ") for line in LINES], trainer)
    whole = json.loads(backend.to_str())
    for byte in range(256):
        whole["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(whole["model"]["vocab"]))
    backend = Tokenizer.from_str(json.dumps(whole))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return wrapped(byte_level(), FAMILIES[name])
