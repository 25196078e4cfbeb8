"""Several adapters over one base: each answers as it does alone, and the base is in memory once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import InputError, RefusedError

ROWS: list[dict[str, Any]] = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(12)]
LABELLED = [{"text": f"{colour} {i}", "label": colour} for i in range(6) for colour in ("red", "green")]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4},
    "wide": {"name": "lora", "rank": 8, "rslora": True},
    "dora": {"name": "dora", "rank": 2},
    "adalora": {"name": "adalora", "rank": 2},
    "vera": {"name": "vera", "rank": 8},
    "ia3": {"name": "ia3"},
    "loha": {"name": "loha", "rank": 2},
    "lokr": {"name": "lokr", "rank": 2},
    "oft": {"name": "oft", "block_size": 8},
}

SHAPES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # of a layer of tiny_llama


def train(base: Path, to: Path, method: Any, seed: int = 1, **keys: Any) -> Path:
    recipe = {
        "model": str(base),
        "objective": "sft",
        "method": method,
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "fp32",
        "place": {"device": "cpu"},
        "evaluate": {"max_new_tokens": 4, "base": False, "metrics": ["loss"]},
        "seed": seed,
        **keys,
    }
    return api.train(recipe, data={"train": ROWS[:8], "test": ROWS[8:]}, out=to).path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, place: Path) -> dict[str, Path]:
    """A run by every method that is an adapter, each with its own seed; and a classifier."""
    made = {name: train(tiny_llama, place / name, method, seed) for seed, (name, method) in enumerate(METHODS.items())}
    recipe = {
        "model": str(tiny_llama),
        "objective": "classify",
        "method": "lora",
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "fp32",
    }
    made["labels"] = api.train(recipe, data={"train": LABELLED}, out=place / "labels").path
    return made


def answers(model: Any, name: str) -> list[Any]:
    rows = [{"text": row["text"]} for row in LABELLED] if name == "labels" else ROWS
    return [(p.output, dict(p.scores), p.probabilities) for p in model.predict(rows)]


def test_each_adapter_answers_as_it_does_alone_whichever_was_in_use_before(runs: dict[str, Path]) -> None:
    alone = {name: answers(api.load(path, "cpu"), name) for name, path in runs.items()}
    together = tunesmith.load_adapters(list(runs.values()), "cpu")
    assert (together.names, together.active) == (list(runs), "lora")
    for name in [*runs, *reversed(runs)]:
        together.use(name)
        assert answers(together, name) == alone[name]
    assert len({str(alone[name]) for name in METHODS}) == len(METHODS)


def elements(*policies: torch.nn.Module) -> int:
    """What the parameters of all of them take, each storage once."""
    return sum({p.data_ptr(): p.numel() for policy in policies for p in policy.parameters()}.values())


def test_the_base_is_the_base(runs: dict[str, Path]) -> None:
    together = tunesmith.load_adapters(runs, "cpu")
    together.use(None)
    assert together.active is None
    lora = api.load(runs["lora"], "cpu")
    with lora.method.reference(lora.policy):
        expected = answers(lora, "lora")
    assert answers(together, "lora") == expected
    together.use("wide")
    assert answers(together, "wide") == answers(api.load(runs["wide"]), "wide") != expected


def test_the_base_is_in_memory_once(runs: dict[str, Path], tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    together = tunesmith.load_adapters(runs, "cpu")
    base = elements(AutoModelForCausalLM.from_pretrained(tiny_llama))
    alone = {name: elements(api.load(path, "cpu").policy) for name, path in runs.items()}
    assert alone["lora"] == base + sum(4 * (n + m) for n, m in SHAPES) * 2
    expected = base + sum(held - base for held in alone.values())
    assert elements(*(together[name].policy for name in together)) == expected
    assert elements(together.use(None).policy, *(together[name].policy for name in together)) == expected


def test_what_cannot_share_a_base_is_refused_before_any_is_loaded(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.models.shared.load_backbone", lambda *_: pytest.fail("weights were read"))
    other_base = tmp_path / "other-base"
    shutil.copytree(tiny_llama, other_base)
    weights = load_file(other_base / "model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, other_base / "model.safetensors")
    other = train(other_base, tmp_path / "other", "lora")
    full = train(tiny_llama, tmp_path / "full", "full")
    rough = train(tiny_llama, tmp_path / "rough", "lora", precision="bf16")
    again = tmp_path / "again" / "lora"
    shutil.copytree(runs["lora"], again)
    lora = runs["lora"]
    with pytest.raises(RefusedError, match="stands on") as refused:
        tunesmith.load_adapters([lora, other])
    assert str(other) in str(refused.value)
    with pytest.raises(InputError, match="by full, which is a whole model"):
        tunesmith.load_adapters([lora, full])
    with pytest.raises(InputError, match=r"over a base in fp32, and .* in bf16"):
        tunesmith.load_adapters([lora, rough])
    with pytest.raises(InputError, match="would be called 'lora', which is of"):
        tunesmith.load_adapters([lora, again])
    with pytest.raises(InputError, match="what the base is called"):
        tunesmith.load_adapters({"base": lora})
    with pytest.raises(InputError, match="no adapter to load"):
        tunesmith.load_adapters([])
    (again / "model" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RefusedError, match="damaged"):
        tunesmith.load_adapters({"a": lora, "b": again})


def test_an_adapter_that_moves_the_bases_weights_is_refused_and_spoils_nothing(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.methods.ia3 import Ia3
    from tunesmith.models.policy import Policy

    load = Ia3.load

    def moving(self: Ia3, policy: Policy, source: Path) -> None:
        load(self, policy, source)
        parameter = next(p for name, p in policy.model.named_parameters() if "base_layer" in name)
        parameter.data = parameter.data + 1

    together = tunesmith.load_adapters([runs["lora"]], "cpu")
    before = answers(together, "lora")
    monkeypatch.setattr(Ia3, "load", moving)
    with pytest.raises(RefusedError, match="changes 1 of the base's own weights"):
        together.add("ia3", runs["ia3"])
    assert together.names == ["lora"]
    assert answers(together, "lora") == before


def test_names_that_are_not_there_are_said(runs: dict[str, Path]) -> None:
    together = tunesmith.load_adapters([runs["labels"]], "cpu")
    with pytest.raises(InputError, match="no adapter 'lora'"):
        together.use("lora")
    with pytest.raises(InputError, match="a base without a trained head"):
        together.use(None)
    assert together.active == "labels"
    with pytest.raises(InputError, match="loaded without the output projection"):
        together.add("lora", runs["lora"])
    with pytest.raises(InputError, match="is loaded already"):
        together.add("labels", runs["labels"])
    together = tunesmith.load_adapters([runs["lora"]], "cpu")
    together.add("more", runs["labels"])
    assert answers(together["more"], "labels") == answers(api.load(runs["labels"], "cpu"), "labels")


# ---------------------------------------------------------------- the command line


def call(*words: str | Path, stdin: str = "") -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(map(str, words)))
    return code, out.getvalue(), err.getvalue()


def test_a_list_says_what_each_is_and_whether_they_go_together(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    code, out, _ = call("adapters", runs["lora"], f"second={runs['ia3']}", runs["labels"], "--json")
    found = json.loads(out)
    assert (code, found["one_base"], found["clash"]) == (0, True, None)
    assert [one["name"] for one in found["adapters"]] == ["lora", "second", "labels"]
    lora = found["adapters"][0]
    assert lora["parameters"] == sum(4 * (n + m) for n, m in SHAPES) * 2
    assert lora["bytes"] == (runs["lora"] / "model" / "adapter_model.safetensors").stat().st_size
    assert (lora["method"], lora["rank"], lora["objective"], lora["base"]) == ("lora", 4, "sft", str(tiny_llama))
    measured = json.loads((runs["lora"] / "evaluation.json").read_text())
    (loss,) = [r for r in measured if (r["metric"], r["model"]) == ("loss", "tuned")]
    assert lora["metric"] == {key: loss[key] for key in ("metric", "data", "value", "low", "high", "n")}
    assert found["adapters"][2]["metric"] is None
    heads = load_file(runs["labels"] / "model" / "heads.safetensors")
    alone = sum(16 * (n + m) for n, m in SHAPES) * 2
    assert found["adapters"][2]["parameters"] == alone + sum(w.numel() for w in heads.values())
    full = train(tiny_llama, tmp_path / "full", "full")
    code, out, _ = call("adapters", runs["lora"], full)
    assert code == 0
    assert "not together" in out
    assert "by full, which is a whole model" in out.replace("\n", " ")
    code, _, err = call("adapters", runs["lora"], runs["lora"] / "model")
    assert code == 2
    assert "are both called 'lora'" in err


def test_a_chat_switches_at_once_and_goes_on_with_the_conversation(runs: dict[str, Path]) -> None:
    turns = ["one", "/use wide", "two", "/use nothing", "/use", "/adapters", "/use labels", "three"]
    words = ("chat", runs["lora"], runs["wide"], "--max-new-tokens", "6", "--json")
    code, out, err = call(*words, stdin="\n".join(turns) + "\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line.get("model") for line in lines] == ["lora", "wide", None, None, None, "wide"]
    assert "no adapter 'nothing'" in lines[2]["error"]
    assert "  lora (lora)\n* wide (lora)\n" in err
    first = api.chat(runs["lora"], max_new_tokens=6)
    second = api.chat(runs["wide"], max_new_tokens=6)
    said = [first.ask("one").text]
    second.messages = list(first.messages)
    said += [second.ask("two").text, second.ask("three").text]
    assert [line["text"] for line in lines if "text" in line] == said


def test_a_question_to_several_adapters_is_answered_by_each_as_alone(runs: dict[str, Path]) -> None:
    names = ("lora", "wide", "ia3")
    words = ("chat", *(runs[name] for name in names), "--max-new-tokens", "6", "--prompt", "colour 2?")
    alone = {name: api.chat(runs[name], max_new_tokens=6).ask("colour 2?").text for name in names}
    code, out, _ = call(*words, "--json", "--base")
    answers = json.loads(out)["answers"]
    assert code == 0
    base = answers.pop("base")
    assert {name: answer["text"] for name, answer in answers.items()} == alone
    asked = api.chat(runs["lora"], max_new_tokens=6)
    asked.ask("colour 2?")
    assert base["text"] == asked.base().text
    code, out, _ = call(*words)
    assert [line.removesuffix(":") for line in out.splitlines() if line.removesuffix(":") in names] == list(names)
    labelled = call("chat", runs["labels"], f"again={runs['labels']}", "--prompt", "red 1", "--json")[1].splitlines()
    assert [json.loads(line)["model"] for line in labelled] == ["labels", "again"]
    code, _, err = call("chat", runs["labels"], runs["lora"])
    assert code == 2
    assert "lora converse, and labels give labels" in err
