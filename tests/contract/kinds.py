"""A tiny random model of every family that the methods are tried on, and the examples and objective for its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.pack import collate
from tunesmith.declared import HeadSpec
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy, Tokens
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.sft import Sft
from tunesmith.protocols import Objective
from tunesmith.types import Batch, Example, ModelKind, Piece, Step

VOCABULARY = 97
LABELS = ("a", "b", "c")
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
ENCODER = {**SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    gpt2 = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    bart = {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        "d_model": 32,
        "dropout": 0.0,
        "max_position_embeddings": 128,
    }
    return {
        "llama": lambda: t.LlamaConfig(**GROUPED, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**GROUPED, head_dim=8),
        "mistral": lambda: t.MistralConfig(**GROUPED, sliding_window=6),
        "mixtral": lambda: t.MixtralConfig(**GROUPED, num_local_experts=3),
        "gemma3": lambda: t.Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        "phi3": lambda: t.Phi3Config(**GROUPED, bos_token_id=1, eos_token_id=1),
        "falcon": lambda: t.FalconConfig(
            **{k: v for k, v in SIZE.items() if k not in ("intermediate_size", "max_position_embeddings")},
            ffn_hidden_size=48,
            alibi=False,
        ),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            initializer_range=0.3,
            **gpt2,
            **still,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SIZE),
        "bert": lambda: t.BertConfig(**ENCODER),
        "roberta": lambda: t.RobertaConfig(**ENCODER),
        "deberta": lambda: t.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "modernbert": lambda: t.ModernBertConfig(
            **SIZE,
            **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
            **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
            local_attention=8,
            global_attn_every_n_layers=2,
        ),
        "t5": lambda: t.T5Config(vocab_size=VOCABULARY, pad_token_id=0, decoder_start_token_id=0, **t5),
        "bart": lambda: t.BartConfig(
            vocab_size=VOCABULARY, pad_token_id=0, decoder_start_token_id=2, init_std=0.3, **bart
        ),
    }


FAMILIES: dict[str, ModelKind] = {
    **dict.fromkeys(
        ("llama", "qwen3", "mistral", "mixtral", "gemma3", "phi3", "falcon", "gpt2", "gpt_neox"), "decoder"
    ),
    **dict.fromkeys(("bert", "roberta", "deberta", "modernbert"), "encoder"),
    **dict.fromkeys(("t5", "bart"), "encoder-decoder"),
}
PADDED = ("deberta", "falcon", "t5", "bart")  # their attention cannot be held inside segments


def model_of(family: str) -> nn.Module:
    """A random model; the same weights at every call."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = _configs()[family]()
    auto = {"decoder": AutoModelForCausalLM, "encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM}
    extra = {"add_pooling_layer": False} if family in ("bert", "roberta") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return auto[FAMILIES[family]].from_config(config, **extra)


def policy_of(family: str, *, packed: bool | None = None) -> Policy:
    """A policy over `model_of(family)`, an encoder's with a head; its `weights` are the model's as they are made."""
    kind = FAMILIES[family]
    policy = Policy(
        model_of(family),
        kind,
        Tokens((1,), 0, encode=text_ids),
        packed=family not in PADDED if packed is None else packed,
    )
    if kind == "encoder":
        policy.add_head(Head(HeadSpec("label", len(LABELS), LABELS), policy.width))

    def weights(folder: Path | None) -> dict[str, Tensor]:
        model = model_of(family) if folder is None else type(policy.model).from_pretrained(folder, **_extra(family))
        return model.state_dict()

    policy.weights = weights
    return policy


def text_ids(text: str) -> list[int]:
    """A token for each letter."""
    return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]


def _extra(family: str) -> dict[str, Any]:
    return {"add_pooling_layer": False} if family in ("bert", "roberta") else {}


def objective_of(family: str) -> Objective:
    """What the family learns here: the next token, a label, or an answer of the decoder."""
    if FAMILIES[family] != "encoder":
        return Sft(Sft.Options())
    objective = Classify(Classify.Options())
    objective.adopt({"labels": list(LABELS)})
    return objective


def examples_of(family: str, count: int = 4) -> list[Example]:
    """Examples of 4 to 20 tokens."""
    draw = np.random.default_rng(3)
    made: list[Example] = []
    for index in range(count):
        ids = draw.integers(3, VOCABULARY, int(draw.integers(4, 21))).astype(np.int32)
        trained = (np.arange(len(ids)) >= len(ids) // 2).astype(np.float32)
        if FAMILIES[family] == "encoder-decoder":
            answer = np.concatenate([[0], draw.integers(3, VOCABULARY, int(draw.integers(2, 8)))]).astype(np.int32)
            weights = np.append([0], np.ones(len(answer) - 1)).astype(np.float32)
            made.append(Example((Piece(ids), Piece(answer, weights, stream="decoder"))))
        elif FAMILIES[family] == "encoder":
            made.append(Example((Piece(ids),), {"label": index % len(LABELS)}))
        else:
            made.append(Example((Piece(ids, trained),)))
    return made


def batches_of(policy: Policy, examples: Sequence[Example], sizes: Sequence[int]) -> list[Batch]:
    found: list[Batch] = []
    at = 0
    for size in sizes:
        chosen = examples[at : at + size]
        found.append(collate(chosen, range(at, at + size), packed=policy.packed, pad_id=0))
        at += size
    return found


def step_of(policy: Policy, examples: Sequence[Example], sizes: Sequence[int], number: int = 1) -> Step:
    return Step(number, batches_of(policy, examples, sizes), {})


def outputs(policy: Policy, objective: Objective, examples: Sequence[Example]) -> Tensor:
    """Losses of all units, in evaluation mode: what two policies that are the same agree in."""
    policy.eval()
    with torch.no_grad():
        batch = batches_of(policy, examples, [len(examples)])[0]
        (part,) = objective.terms(policy, batch).parts.values()
        return part.loss_U.float()


def state_of(policy: Policy) -> Mapping[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}
