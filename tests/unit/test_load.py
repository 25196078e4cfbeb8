"""What is loaded equals what transformers saved, from filtered configs, with no weight left random."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tunesmith import compat
from tunesmith.errors import InputError, RefusedError
from tunesmith.models.config import dropped_keys, safe_config
from tunesmith.models.fetch import resolve
from tunesmith.models.load import Head, load_backbone, load_tokenizer, meta_model
from tunesmith.models.shared import SharedBase

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.fixture
def bert(tmp_path: Path, tiny_bert: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, folder / name)
    return folder


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- backbones


def test_a_decoder_gives_the_logits_that_were_saved(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ours = load_backbone(resolve(str(tiny_llama)), "fp32", "lm")
    assert not ours.training
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_an_encoder_has_no_pooler_and_the_hidden_states_that_were_saved(tiny_bert: Path) -> None:
    from transformers import AutoModel

    ids = torch.arange(12)[None]
    theirs = AutoModel.from_pretrained(tiny_bert).eval()
    ours = load_backbone(resolve(str(tiny_bert)), "fp32", "pooled")
    assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    assert not [name for name, _ in ours.named_parameters() if "pooler" in name]


def test_an_encoder_decoder_gives_the_logits_that_were_saved(tiny_t5: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    ids = torch.arange(12)[None]
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    ours = load_backbone(resolve(str(tiny_t5)), "fp32", "lm")
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_decoder_without_its_head(tiny_llama: Path) -> None:
    ids = torch.arange(12)[None]
    whole = load_backbone(resolve(str(tiny_llama)), "fp32", "lm")
    body = load_backbone(resolve(str(tiny_llama)), "fp32", "pooled")
    assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_bf16_and_attention_are_as_asked(tiny_llama: Path) -> None:
    model = load_backbone(resolve(str(tiny_llama)), "bf16", "lm", attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_attention_is_never_fetched(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="would fetch code from the hub"):
        load_backbone(resolve(str(tiny_llama)), "fp32", "lm", attn_implementation="owner/kernel")


def test_an_encoder_without_the_head_that_fills_masks_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(RefusedError, match=r"lacks \d+ weights .* random: cls\.predictions"):
        load_backbone(resolve(str(tiny_bert)), "fp32", "lm")


def test_a_checkpoint_with_a_layer_missing_is_refused(llama: Path) -> None:
    edit_weights(llama, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(RefusedError, match=r"lacks 1 weights .* random: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(resolve(str(llama)), "fp32", "lm")


def test_a_config_with_more_layers_than_the_checkpoint_is_refused(bert: Path) -> None:
    edit(bert, num_hidden_layers=3)
    with pytest.raises(RefusedError, match="lacks 16 weights"):
        load_backbone(resolve(str(bert)), "fp32", "pooled")


def test_weights_of_another_shape_are_refused(llama: Path) -> None:
    edit(llama, intermediate_size=48)
    with pytest.raises(RefusedError, match="do not have the shapes"):
        load_backbone(resolve(str(llama)), "fp32", "lm")


def test_weights_that_nobody_wants_are_said(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(llama, lambda w: w.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    with caplog.at_level(logging.WARNING, "tunesmith.models"):
        load_backbone(resolve(str(llama)), "fp32", "lm")
    assert "1 weights in" in caplog.text
    assert "model.layers.0.extra.weight" in caplog.text


def test_a_missing_pooler_is_no_matter(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(bert, lambda w: [w.pop(key) for key in list(w) if key.startswith("pooler")])
    with caplog.at_level(logging.WARNING, "tunesmith.models"):
        load_backbone(resolve(str(bert)), "fp32", "pooled")
    assert caplog.text == ""


def test_code_in_the_folder_is_refused_even_after_resolve(llama: Path) -> None:
    local = resolve(str(llama))
    edit(llama, auto_map={"AutoModelForCausalLM": "evil.Model"})
    for load in (lambda: load_backbone(local, "fp32", "lm"), lambda: meta_model(local, "lm")):
        with pytest.raises(RefusedError, match="auto_map"):
            load()


# ---------------------------------------------------------------- configs


def test_only_known_keys_reach_the_config(llama: Path) -> None:
    edit(
        llama,
        _attn_implementation="owner/kernel",
        _attn_implementation_internal="owner/kernel",
        attn_implementation="owner/kernel",
        to_dict="shadowed",
        transformers_weights="../elsewhere",
        dtype="load",
    )
    config = safe_config(llama)
    assert config._attn_implementation is None
    assert callable(config.to_dict)
    assert not hasattr(config, "transformers_weights")
    assert {"_attn_implementation", "attn_implementation", "to_dict", "transformers_weights", "dtype"} <= set(
        dropped_keys(llama)
    )


def test_older_spellings_are_understood(llama: Path) -> None:
    content = json.loads((llama / "config.json").read_text())
    del content["rope_parameters"], content["dtype"]
    scaling = {"rope_type": "linear", "factor": 2.0}
    (llama / "config.json").write_text(
        json.dumps(content | {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"})
    )
    config: Any = safe_config(llama)
    assert config.rope_parameters == {"rope_theta": 500000.0} | scaling
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "Gemma3TextConfig", "MistralConfig", "GPT2Config"])
def test_a_config_survives_its_filter(name: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, name)()
    config.save_pretrained(tmp_path)
    theirs = {k: v for k, v in config.to_dict().items() if k != "transformers_version"}
    ours = {k: v for k, v in safe_config(tmp_path).to_dict().items() if k != "transformers_version"}
    assert ours == theirs
    assert {key for key in dropped_keys(tmp_path) if not key.startswith("_")} <= {"transformers_version"}


def test_nested_configs_are_filtered_too(tmp_path: Path) -> None:
    import transformers

    transformers.Gemma3Config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"] |= {"_attn_implementation": "owner/kernel", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config: Any = safe_config(tmp_path)
    assert config.text_config.hidden_size == 64
    assert "text_config._attn_implementation" in dropped_keys(tmp_path)


def test_quantised_weights_are_refused_by_name(llama: Path) -> None:
    edit(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"are quantised \(gptq\)") as caught:
        safe_config(llama)
    assert caught.value.remedy == "use the unquantised base"


def test_values_that_make_no_sense_are_an_input_error(llama: Path) -> None:
    edit(llama, hidden_size="wide")
    with pytest.raises(InputError, match="not a valid llama config"):
        safe_config(llama)


def test_known_keys_are_read_from_the_class() -> None:
    from transformers import LlamaConfig, ModernBertConfig

    assert {"rope_theta", "rope_scaling", "torch_dtype", "hidden_size"} <= compat.config_keys(LlamaConfig)
    assert {"global_attn_every_n_layers", "local_rope_theta"} <= compat.config_keys(ModernBertConfig)
    assert not {"auto_map", "gguf_file", "cache_dir", "token", "kwargs"} & compat.config_keys(LlamaConfig)


# ---------------------------------------------------------------- tokenizers


def test_stored_truncation_and_padding_are_not_applied(bert: Path) -> None:
    path = bert / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 4},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(resolve(str(bert)))
    assert len(tokenizer("abcdefgh").input_ids) == 10
    assert len(tokenizer("a").input_ids) == 3
    assert len(tokenizer.backend_tokenizer.encode("abcdefgh").ids) == 10
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == (None, None)


def test_special_tokens_that_only_the_class_knows_are_named(bert: Path) -> None:
    (bert / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    tokenizer = load_tokenizer(resolve(str(bert)))
    assert (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token) == ("[PAD]", "[CLS]", "[SEP]")


def test_a_vocabulary_alone_is_enough_for_bert(bert: Path) -> None:
    (bert / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer = load_tokenizer(resolve(str(bert)))
    assert tokenizer("hello world").input_ids == [2, 5, 6, 3]


def test_a_chat_template_is_kept(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(tiny_llama)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_folder_without_tokenizer_is_told(llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llama / name).unlink()
    with pytest.raises(InputError, match="no tokenizer that can be loaded") as caught:
        load_tokenizer(resolve(str(llama)))
    assert "tokenizer.json" in caught.value.remedy


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("which", "head", "kind", "context"),
    [
        ("tiny_llama", "lm", "decoder", 512),
        ("tiny_llama", "pooled", "decoder", 512),
        ("tiny_bert", "pooled", "encoder", 512),
        ("tiny_t5", "lm", "encoder-decoder", None),
    ],
)
def test_facts_agree_with_the_loaded_model(
    which: str, head: Head, kind: str, context: int | None, request: pytest.FixtureRequest
) -> None:
    local = resolve(str(request.getfixturevalue(which)))
    facts, model = meta_model(local, head), load_backbone(local, "fp32", head)
    assert {p.device.type for p in facts.module.parameters()} == {"meta"}
    assert {n: p.shape for n, p in facts.module.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert (facts.kind, facts.context_length, facts.width, facts.layers) == (kind, context, 32, 2)
    assert facts.tied_embeddings is (head == "lm")
    assert facts.vocab_size == model.config.vocab_size


def test_untied_embeddings_are_seen(tmp_path: Path, llama: Path) -> None:
    edit(llama, tie_word_embeddings=False)
    facts = meta_model(resolve(str(llama)), "lm")
    assert not facts.tied_embeddings


def test_roberta_has_fewer_positions_than_its_table(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=514, **size)).save_pretrained(tmp_path / "r")
    local = resolve(str(tmp_path / "r"))
    assert meta_model(local, "pooled").context_length == 512


def test_a_model_that_is_one_with_its_projection_is_not_shared_without_it(tiny_t5: Path) -> None:
    shared = SharedBase(resolve(str(tiny_t5)), "fp32", "lm", "cpu")
    assert shared.model("lm").get_output_embeddings() is not None
    with pytest.raises(InputError, match="T5ForConditionalGeneration cannot be taken apart"):
        shared.model("pooled")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="type 'vit' is neither"):
        meta_model(resolve(str(tmp_path)), "pooled")
