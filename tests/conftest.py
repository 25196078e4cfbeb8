"""Fixtures for every test: tiny models made on the spot, the data sets beside the checkout, one thread, no network.

Nothing here is downloaded. `tiny_llama` and `tiny_bert` are folders as a user would have them: read
them, or copy them before changing a file. Torch is imported only by the fixtures that need it, so
that a test of pure Python costs no seconds.
"""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub: both read these once, at import.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).resolve().parents[1]
CALLERS_CACHE = os.environ.get("TUNESMITH_CACHE")

# Wall time on a shared machine says nothing about a property; CI draws the same examples every time.
settings.register_profile("tunesmith", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("tunesmith")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


pytest_plugins = ["raised"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is not asked unless such a test was collected."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test session starts with an empty cache, so that no test passes because of an earlier run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def model_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lasting cache, for tests on real models: fetched and converted once for a checkout, not once for a test."""
    folder = Path(CALLERS_CACHE) if CALLERS_CACHE else CHECKOUT / ".cache" / "tunesmith"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data_sets() -> Path:
    """The folder of public data sets: $TUNESMITH_DATA, or shared/data in or beside the checkout."""
    named = os.environ.get("TUNESMITH_DATA")
    places = [Path(named)] if named else [CHECKOUT / "shared" / "data", CHECKOUT.parent / "shared" / "data"]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip("no data sets: set TUNESMITH_DATA, or put them in shared/data beside the checkout")


def byte_tokenizer(special: list[str]) -> Any:
    """A `tokenizers.Tokenizer` of one token for each byte, and the special tokens first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers (width 32, 4 heads, 2 KV heads, tied) with a ChatML template, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(special),
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nameable(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, its tokenizer splitting text as GPT-2's, which GGUF has a name for, and joining two letters."""
    folder = tmp_path_factory.mktemp("nameable") / "model"
    shutil.copytree(tiny_llama, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"]["use_regex"] = True
    described["model"]["vocab"]["re"] = described["model"]["vocab"].pop("Ā")  # the byte 0, which no text here has
    described["model"]["merges"] = [["r", "e"]]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers (width 32, 4 heads, no dropout) that frames a text in [CLS] and [SEP], in fp32."""
    from transformers import BertModel

    return _bert(tmp_path_factory.mktemp("models") / "tiny-bert", BertModel)


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the head that fills masks."""
    from transformers import BertForMaskedLM

    return _bert(tmp_path_factory.mktemp("models") / "masked-bert", BertForMaskedLM)


def _bert(folder: Path, kind: type[Any]) -> Path:
    import torch
    from tokenizers import processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = byte_tokenizer(special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of 2 layers a side (width 32, 4 heads, tied) whose tokenizer closes a text with </s>, in fp32."""
    import torch
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    backend = byte_tokenizer(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
