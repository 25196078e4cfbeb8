"""A tokenizer in GGUF's words: tokens, how they join, how text is split first, and what ends an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith import compat
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int, template: str | None, end_ids: Sequence[int]) -> None:
    """Adds a byte-level BPE (GPT-2's kind) or a SentencePiece one with bytes to fall back on (Llama 2's kind).

    `size` tokens in all: what the tokenizer lacks of them is filled up. Raises InputError for other tokenizers.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or not model["merges"]:
        what = "tokenizer that joins nothing" if model["type"] == "BPE" else f"{model['type']} tokenizer"
        raise InputError(f"no GGUF is written with a {what}", "export a folder instead")
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_puts_space(described, chats=template is not None))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(described))
    tokens, types = _tokens(described, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model.get("byte_fallback"):
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, end_ids)
    if template is not None:
        writer.add_chat_template(template)


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, at in described["model"]["vocab"].items():
        tokens[at] = token
        types[at] = int(TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL)
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = described["model"].get("unk_token")
    if unknown in described["model"]["vocab"]:
        types[described["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """SentencePiece joins the pair of the highest score: the merges' order, counted down; what no merge makes, last."""
    rank: dict[str, int] = {}
    for at, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), at)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split_name(described: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text before it joins bytes."""
    steps = described["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
            if pattern == compat.gguf_splits().get(name):
                return name
    raise InputError(
        "the tokenizer splits text by a rule that GGUF has no name for, so llama.cpp would read other tokens",
        "export a folder instead",
    )


def _puts_space(described: dict[str, Any], *, chats: bool) -> bool:
    """Whether llama.cpp puts a space before each stretch of text, at the beginning and behind every special token.

    So do tokenizers that prepend one (Llama 2's). Those that put one at the beginning alone put none into a
    conversation, which begins with a special token, and the only one into plain text.
    """
    steps = [described["normalizer"] or {}, described["pre_tokenizer"] or {}]
    flat = [part for step in steps for part in step.get("normalizers", step.get("pretokenizers", [step]))]
    if any(part.get("type") == "Prepend" or part.get("prepend_scheme") == "always" for part in flat):
        return True
    return not chats and any(part.get("prepend_scheme") == "first" for part in flat)


def _add_special(writer: GGUFWriter, tokenizer: Any, end_ids: Sequence[int]) -> None:
    for name in ("bos", "unk", "pad", "eos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(int(token))
    if end_ids and end_ids[0] != tokenizer.eos_token_id:
        writer.add_eot_token_id(int(end_ids[0]))
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins and tokenizer.bos_token_id is not None)
