"""Two texts in one piece: the tokens that transformers makes of them, and the numbers that its models then give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from chat_families import FAMILIES, byte_level, sentencepiece_like, tokenizer_of, wrapped
from kinds import model_of
from kinds import policy_of as policy_of_family
from tunesmith.data.chat import Renderer
from tunesmith.data.pack import collate, split
from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.models.policy import Policy, Tokens
from tunesmith.types import Batch, Example, Piece, Row, Want

SPECIAL = ["<s>", "</s>", "<pad>"]
NAMED = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
TYPED = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}


def framed(kind: str, **named: Any) -> Any:
    """A tokenizer that frames texts as a family does."""
    backend = byte_level()
    backend.add_special_tokens(SPECIAL)
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    templates = {
        "bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "xlnet": ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),
        "single types": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    }
    backend.post_processor = (
        processors.RobertaProcessing(ids[1], ids[0], trim_offsets=True, add_prefix_space=False)
        if kind == "roberta"
        else processors.TemplateProcessing(single=templates[kind][0], pair=templates[kind][1], special_tokens=ids)
    )
    return wrapped(backend, **NAMED, **named)


TOKENIZERS = {
    "bert": framed("bert", **TYPED),
    "bert, types not given": framed("bert"),
    "roberta": framed("roberta", **TYPED),
    "no types": framed("single types", **TYPED),
}
texts = st.text("abc THE capital?\n\u00e9\u4e2d\U0001f600", max_size=30)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(TOKENIZERS)), texts, texts.filter(bool), st.one_of(st.none(), st.integers(6, 40)))
def test_an_encoders_pair_is_what_its_tokenizer_makes_of_two_texts(
    name: str, first: str, second: str, length: int | None
) -> None:
    tokenizer = TOKENIZERS[name]
    ours = Renderer(tokenizer, sequence_length=length).pair(first, second)
    theirs = tokenizer(first, second, truncation=length is not None, max_length=length)
    assert ours.input_ids.tolist() == theirs["input_ids"]
    types = theirs.get("token_type_ids", [0] * len(theirs["input_ids"]))
    assert [int(0 < ours.typed_from <= place) for place in range(len(ours.input_ids))] == types
    assert bool(ours.typed_from) == (name == "bert")
    assert ours.cut == len(tokenizer(first, second)["input_ids"]) - len(ours.input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoders_pair_is_two_lines(name: str) -> None:
    renderer = Renderer(tokenizer_of(name))
    bos = FAMILIES[name].bos if FAMILIES[name].opens else ""
    whole = renderer.pair("Who?", "The cat, the dog and the élan of a 42")
    assert (
        renderer.decode(whole.input_ids)
        == f"{bos or ''}Who?\nThe cat, the dog and the élan of a 42{FAMILIES[name].eos}"
    )
    assert (whole.typed_from, whole.cut) == (0, 0)
    length = len(whole.input_ids) - 2
    short = Renderer(tokenizer_of(name), sequence_length=length).pair("Who?", "The cat, the dog and the élan of a 42")
    assert short.cut == 2
    assert short.input_ids.tolist() == [*whole.input_ids[: length - 1].tolist(), whole.input_ids[-1]]


def test_a_decoder_that_puts_a_space_before_any_text_puts_none_behind_a_line_end() -> None:
    renderer = Renderer(wrapped(sentencepiece_like(), eos_token="<unk>"))
    assert renderer.decode(renderer.pair("Who?", "The cat").input_ids) == "Who?\nThe cat<unk>"


def test_what_has_no_room_or_no_end_or_other_types_is_refused() -> None:
    with pytest.raises(InputError, match="3 of 4 tokens are the tokenizer's own, so no text has room"):
        Renderer(TOKENIZERS["bert"], sequence_length=4).pair("a", "b")
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        Renderer(wrapped(byte_level())).pair("a", "b")
    with pytest.raises(InputError, match="gives two texts the token types 0, 0, 1, 1, 2, not 0 and then 1"):
        Renderer(framed("xlnet", **TYPED)).pair("a", "b")


# ---------------------------------------------------------------- through the model

PAIRS = [("Who?", "The capital of France is Paris."), ("a b c", "d"), ("", "Two\nlines")]


def _pieces(renderer: Renderer) -> list[Example]:
    encoded = [renderer.pair(*pair) for pair in PAIRS]
    return [Example((Piece(e.input_ids, typed_from=e.typed_from),)) for e in encoded]


def _hidden(policy: Policy, batch: Batch) -> list[Tensor]:
    hidden_BTD = policy.score(batch, Want(hidden=True)).hidden_BTD
    assert hidden_BTD is not None
    return [hidden_BTD[s.row, s.start : s.stop] for s in sorted(batch.segments, key=lambda s: s.example)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_knows_token_types_gives_what_plain_transformers_gives(tiny_bert: Path, packed: bool) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    policy = Policy(AutoModel.from_pretrained(tiny_bert), "encoder", Tokens((1,), 0), packed=packed).eval()
    examples = _pieces(Renderer(tokenizer))
    single = Example((Piece(np.array(tokenizer("Who?")["input_ids"], np.int32)),))
    batch = collate([*examples, single], range(4), packed=packed, pad_id=0)
    with torch.no_grad():
        found = _hidden(policy, batch)
        halves = split(batch, [[2, 0], [3, 1]], packed=packed, pad_id=0)
        again = [*_hidden(policy, halves[0]), *_hidden(policy, halves[1])]
        for at, (pair, ours) in enumerate(zip([*PAIRS, ("Who?", None)], found, strict=True)):
            inputs = tokenizer(*pair, return_tensors="pt")
            assert "token_type_ids" in inputs
            torch.testing.assert_close(ours, plain(**inputs).last_hidden_state[0], rtol=1e-4, atol=1e-5)
            inputs["token_type_ids"].zero_()
            untyped = plain(**inputs).last_hidden_state[0]
            assert (float((ours - untyped).abs().max()) > 0.05) == (pair[1] is not None)
            torch.testing.assert_close(again[[1, 3, 0, 2][at]], ours, rtol=1e-4, atol=1e-5)


def test_a_model_without_token_types_is_given_none(tiny_llama: Path) -> None:
    from transformers import AutoModel

    policy = Policy(AutoModel.from_pretrained(tiny_llama), "decoder", Tokens((1,), 0), packed=True).eval()
    ids = np.arange(3, 12, dtype=np.int32)
    typed, plain = ([Example((Piece(ids, typed_from=at),))] * 2 for at in (4, 0))
    for ours, theirs in zip(
        *(_hidden(policy, collate(e, [0, 1], packed=True, pad_id=0)) for e in (typed, plain)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_behind_virtual_tokens_the_outputs_are_those_of_peft(name: str, packed: bool, tmp_path: Path) -> None:
    """PEFT leaves token types out there, and says so."""
    from peft import PeftModel

    policy, chosen = policy_of_family("bert", packed=packed), METHODS.get(name)
    method = chosen(chosen.Options.model_validate({"virtual_tokens": 4}), 0.0)
    method.attach(policy)
    assert policy.virtual is not None
    with torch.no_grad():
        for parameter in policy.virtual.parameters():
            parameter.normal_(0, 0.5)
    policy.eval()
    method.export(policy, tmp_path)
    theirs = PeftModel.from_pretrained(model_of("bert"), str(tmp_path)).eval()
    draw = np.random.default_rng(0)
    pairs = [draw.integers(10, 90, n).astype(np.int32) for n in (9, 5, 12)]
    batch = collate([Example((Piece(ids, typed_from=3),)) for ids in pairs], range(3), packed=packed, pad_id=0)
    with torch.no_grad():
        for ids, ours in zip(pairs, _hidden(policy, batch), strict=True):
            inputs = {"input_ids": torch.from_numpy(ids)[None].long(), "attention_mask": torch.ones(1, len(ids))}
            types = (torch.arange(len(ids)) >= 3).long()[None]
            with pytest.warns(UserWarning, match="Token type ids are not supported"):
                hidden = theirs(**inputs, token_type_ids=types).last_hidden_state[0, -len(ids) :]
            torch.testing.assert_close(ours, hidden, rtol=1e-4, atol=1e-5)
        with method.reference(policy):
            plain = model_of("bert").eval()(**inputs, token_type_ids=types).last_hidden_state[0]
            torch.testing.assert_close(_hidden(policy, batch)[-1], plain, rtol=1e-4, atol=1e-5)


def test_a_store_keeps_where_the_second_text_begins(tmp_path: Path) -> None:
    ids = np.array([5, 6, 7], np.int32)
    pieces = (Piece(ids, typed_from=2), Piece(ids), Piece(ids, labels_T=np.array([-1, 2, 0], np.int32), typed_from=1))
    store = TokenStore.build(tmp_path / "s", [(Example(pieces), Row({"text": "a"}, "f:1"))])
    assert [piece.typed_from for piece in store.example(0).pieces] == [2, 0, 1]
    batch = collate([store.example(0)], [0], packed=True, pad_id=0)
    types_BT = batch.streams["input"].type_ids_BT
    assert types_BT is not None
    assert types_BT.tolist() == [[0, 0, 1, 0, 0, 0, 0, 1, 1]]
    plain = collate([Example((Piece(ids),))], [0], packed=True, pad_id=0)
    assert plain.streams["input"].type_ids_BT is None
