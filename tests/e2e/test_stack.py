"""Adapters on adapters: a fresh one trains while earlier ones stay in use, frozen, and the stack is one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from test_adapters import LABELLED, METHODS, ROWS, answers, call, train
from tunesmith import api
from tunesmith.errors import InputError, RefusedError
from tunesmith.methods import METHODS as REGISTERED
from tunesmith.methods.peft_adapter import peft_speaks
from tunesmith.rundir import sha256_file

STACKED = [name for name in METHODS if REGISTERED.get(METHODS[name]["name"]).facts.stands_on]


def on(base: Path, to: Path, method: Any, *beneath: Path, **keys: Any) -> Path:
    return train(base, to, method, adapters=list(map(str, beneath)), seed=9, **keys)


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run by every method, and one of the same method that stands on it."""
    place = tmp_path_factory.mktemp("stack")
    made: dict[str, Path] = {}
    for seed, name in enumerate(METHODS):
        made[name] = train(tiny_llama, place / name, METHODS[name], seed)
    for name in STACKED:
        made[f"{name}+"] = on(tiny_llama, place / f"{name}+", METHODS[name], made[name])
    return made


@pytest.mark.parametrize("name", STACKED)
def test_what_is_beneath_stays_as_it_was_and_everybody_loads_the_stack(
    name: str, runs: dict[str, Path], tiny_llama: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first, model = runs[name] / "model", runs[f"{name}+"] / "model"
    under = model / "beneath" / f"01-{name}"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (under / file).read_bytes() == (first / file).read_bytes()
    assert (model / "adapter_model.safetensors").read_bytes() != (first / "adapter_model.safetensors").read_bytes()
    loaded = api.load(runs[f"{name}+"], "cpu")
    held = {key.removeprefix("model."): v for key, v in loaded.policy.state_dict().items() if ".beneath1" in key}
    for key, value in load_file(first / "adapter_model.safetensors").items():
        if "vera_A" not in key and "vera_B" not in key:  # they are kept outside of the layers
            own = key.removeprefix("base_model.model.").removesuffix(".weight")
            (found,) = (v for k, v in held.items() if k.replace(".beneath1", "").removesuffix(".weight") == own)
            assert torch.equal(found, value)
    with peft_speaks():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), model).eval()
        theirs.load_adapter(str(under), "under")
    theirs.base_model.set_adapter(["under", "default"])
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    policy = loaded.policy.eval()
    policy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours = policy.model(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        theirs.base_model.set_adapter("default")
        assert (ours - theirs(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", STACKED)
def test_training_starts_where_the_earlier_adapter_left_off(
    name: str, runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """At a rate that moves nothing, the stack is the earlier adapter; off, it is the base."""
    still = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-30}
    fresh = on(tiny_llama, tmp_path / "fresh", METHODS[name], runs[name], train=still)
    loaded, before = api.load(fresh, "cpu"), api.load(runs[name], "cpu")
    for (_, mine, _), (_, theirs, _) in zip(answers(loaded, name), answers(before, name), strict=True):
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
    with loaded.method.reference(loaded.policy), before.method.reference(before.policy):
        assert answers(loaded, name) == answers(before, name)


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_is_merged_whole(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = call("export", runs[f"{name}+"], "--merge", "--to", tmp_path / "whole", "--json")
    assert code == 0, err
    assert json.loads(out)["largest"] < 1e-4
    assert not (tmp_path / "whole" / "beneath").exists()


def test_stacks_grow_and_go_on(runs: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    """A third adapter on two, by another start; and the two trained further as `model`."""
    third = {"name": "lora", "rank": 2, "init": "pissa"}
    top = on(tiny_llama, tmp_path / "top", third, runs["lora+"])
    card = json.loads((top / "model" / "tunesmith.json").read_text())
    assert [one["folder"] for one in card["beneath"]] == ["beneath/01-lora", "beneath/02-lora+"]
    assert [one["name"] for one in json.loads((top / "manifest.json").read_text())["beneath"]] == ["lora", "lora+"]
    under = load_file(top / "model" / "beneath" / "02-lora+" / "adapter_model.safetensors")
    before = load_file(runs["lora+"] / "model" / "adapter_model.safetensors")
    assert all(torch.equal(value, under[key]) for key, value in before.items())
    measured = json.loads((top / "evaluation.json").read_text())[0]
    scores = [p.scores for p in api.predict(top, ROWS[8:], device="cpu")]
    assert measured["metric"] == "loss"
    total = {key: sum(one[key] for one in scores) for key in ("nll", "tokens")}
    assert total["nll"] / total["tokens"] == pytest.approx(measured["value"], rel=1e-4)
    further = train(runs["lora+"], tmp_path / "further", "lora", seed=4)
    assert [one["name"] for one in api.load(further, "cpu").card["beneath"]] == ["lora"]
    moved = (further / "model" / "adapter_model.safetensors", runs["lora+"] / "model" / "adapter_model.safetensors")
    assert sha256_file(moved[0]) != sha256_file(moved[1])
    bare, whole = (train(runs[name], tmp_path / name, "lora", seed=4) for name in ("lora", "lora+"))
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in (bare, whole)]
    assert first[0] != first[1]


def test_a_classifier_stands_on_a_classifier_and_lora_on_dora(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = {
        "model": str(tiny_llama),
        "objective": "classify",
        "method": "lora",
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        "precision": "bf16",
    }
    first = api.train(recipe, data={"train": LABELLED}, out=tmp_path / "first").path
    second = api.train({**recipe, "adapters": str(first)}, data={"train": LABELLED}, out=tmp_path / "second").path
    loaded = api.load(second, "cpu")
    held = [p for name, p in loaded.policy.named_parameters() if ".beneath1" in name]
    assert {p.dtype for p in held} == {torch.float32}
    assert not any(p.requires_grad for p in held)
    assert loaded.predict([{"text": "red 1"}])[0].output in ("red", "green")
    mixed = on(tiny_llama, tmp_path / "mixed", "lora", runs["dora"])
    code, out, err = call("export", mixed, "--merge", "--to", tmp_path / "whole", "--json")
    assert code == 0, err
    assert json.loads(out)["largest"] < 1e-4


def test_a_stack_that_is_stopped_goes_on_to_the_same_bits(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from tunesmith.errors import StoppedError
    from tunesmith.events import StopRun

    keys: dict[str, Any] = {"model": str(tiny_llama), "objective": "sft", "method": METHODS["lora"]}
    keys |= {"adapters": [str(runs["lora"])], "precision": "fp32", "place": {"device": "cpu"}}
    keys |= {"train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "save_every": 1}}
    data = {"train": ROWS[:8]}
    whole = api.train(keys, data=data, out=tmp_path / "whole").path

    def stop(event: str, about: Any) -> None:
        if event == "step" and about["step"] == 2:
            raise StopRun

    with pytest.raises(StoppedError):
        api.train(keys, data=data, out=tmp_path / "halted", listen=stop)
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "halted", copied)
    api.resume(tmp_path / "halted")
    same = [tmp_path / run / "model" / "adapter_model.safetensors" for run in ("whole", "halted")]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert (whole / "model" / "beneath").is_dir()
    shutil.rmtree(runs["lora"].parent / "other", ignore_errors=True)
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace(str(runs["lora"]), str(runs["lora+"])))
    with pytest.raises(RefusedError, match="adapters changed"):
        api.resume(copied)


def test_a_changed_file_is_refused_and_a_copy_is_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    assert call("export", runs["lora+"], "--to", tmp_path / "copy")[0] == 0
    assert answers(api.load(tmp_path / "copy", "cpu"), "lora") == answers(api.load(runs["lora+"], "cpu"), "lora")
    weights = tmp_path / "copy" / "beneath" / "01-lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RefusedError, match="damaged"):
        api.load(tmp_path / "copy", "cpu")


def test_stacks_are_listed_switched_and_summed(runs: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    code, out, _ = call("adapters", runs["lora"], runs["lora+"], "--json")
    listed = json.loads(out)["adapters"]
    assert [one["beneath"] for one in listed] == [[], ["lora"]]
    assert listed[0]["parameters"] == listed[1]["parameters"]
    assert "lora on lora" in call("adapters", runs["lora"], runs["lora+"])[1]
    together = tunesmith.load_adapters([runs["lora"], runs["lora+"]], "cpu")
    for name in ("lora", "lora+"):
        together.use(name)
        assert answers(together, name) == answers(api.load(runs[name], "cpu"), name)
    assert call("combine", runs["lora+"], "--to", tmp_path / "flat")[0] == 0
    flat, stack = api.load(tmp_path / "flat", "cpu"), api.load(runs["lora+"], "cpu")
    assert "beneath" not in flat.card
    for mine, theirs in zip(flat.predict(ROWS), stack.predict(ROWS), strict=True):
        assert mine.scores["nll"] == pytest.approx(theirs.scores["nll"], rel=1e-5)
    code, _, err = call("combine", runs["lora+"], runs["wide"], "--how", "ties", "--to", tmp_path / "no")
    assert (code, "stands on lora, and ties sums no updates" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_the_card_says_how_peft_loads_a_stack(runs: dict[str, Path], tiny_llama: Path) -> None:
    card = (runs["lora+"] / "model" / "README.md").read_text()
    code = next(text for text in card.split("```python\n")[1:] if "PeftModel" in text).split("messages = ")[0]
    code = code.replace("path/to/this/folder", str(runs["lora+"] / "model"))
    names: dict[str, Any] = {}
    exec(code.replace(f"path/to/{tiny_llama.name}", str(tiny_llama)), names)
    policy, ids = api.load(runs["lora+"], "cpu").policy, torch.tensor([[5, 9, 40, 77, 12]])
    policy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, policy.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_stacked_is_refused_with_a_remedy(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "lora", "train": {"max_steps": 1}}

    def refused(**keys: Any) -> str:
        with pytest.raises(InputError) as caught:
            api.plan({**recipe, **keys}, data={"train": ROWS[:8]})
        return str(caught.value)

    assert "is by ia3, and lora stands on adapters by dora or lora" in refused(adapters=[str(runs["ia3"])])
    said = refused(adapters=[str(runs["lora"])], method="bottleneck")
    assert "bottleneck stands on no other adapter" in said
    assert "export that adapter with --merge" in said
    assert "brings lora, which" in refused(adapters=[str(runs["lora"]), str(runs["lora+"])])
    assert "model names an earlier run" in refused(model=str(runs["lora"]), adapters=[str(runs["lora"])])
    full = train(tiny_llama, tmp_path / "full", "full")
    assert "which leaves no adapter of PEFT" in refused(adapters=[str(full)])
    assert "is not there" in refused(adapters=[str(tmp_path / "nowhere")])
    tokens = train(tiny_llama, tmp_path / "tokens", {"name": "lora", "tokens": ["<call>"]})
    assert "added tokens to the vocabulary" in refused(adapters=[str(tokens)])
    other = train(Path(shutil.copytree(full / "model", tmp_path / "base")), tmp_path / "other", "lora")
    assert "method.tokens trains rows" in refused(
        adapters=[str(runs["lora"])], method={"name": "lora", "tokens": ["<call>"]}
    )
    assert "has other weights" in refused(adapters=[str(other)])
    planned = api.plan({**recipe, "adapters": [str(runs["lora"])]}, data={"train": ROWS[:8]})
    assert planned.beneath[0]["name"] == "lora"


def test_the_plan_says_what_a_method_leaves_open_and_why(tiny_llama: Path) -> None:
    def told(method: Any) -> dict[str, tuple[Any, str]]:
        recipe = {"model": str(tiny_llama), "objective": "sft", "method": method, "train": {"max_steps": 1}}
        found = api.plan(recipe, data={"train": ROWS[:8]}).defaults
        return {d.key.removeprefix("method."): (d.value, d.why) for d in found if d.key.startswith("method.")}

    lora = told({"name": "lora", "rank": 4})
    assert "rank" not in lora
    assert lora["alpha"] == (8.0, "twice the rank")
    assert lora["targets"][0] == "all-linear"
    assert "Dettmers et al. 2023" in lora["targets"][1]
    assert told("partial")["top"][0] == 0.25
    assert "top" not in told({"name": "partial", "only": "norms"})
    assert told({"name": "bottleneck", "variant": "parallel"})["scaling"][0] == 4.0


@pytest.mark.gpu
def test_a_stack_on_cuda_is_measured_as_it_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    cuda = {"place": {"device": "cuda"}, "precision": "bf16"}
    first = train(tiny_llama, tmp_path / "first", "lora", **cuda)
    second = on(tiny_llama, tmp_path / "second", "lora", first, **cuda)
    held = second / "model" / "beneath" / "01-first" / "adapter_model.safetensors"
    assert held.read_bytes() == (first / "model" / "adapter_model.safetensors").read_bytes()
    (measured,) = [r for r in json.loads((second / "evaluation.json").read_text()) if r["metric"] == "loss"]
    scores = [p.scores for p in api.predict(second, ROWS[8:], device="cuda")]
    total = {key: sum(one[key] for one in scores) for key in ("nll", "tokens")}
    assert total["nll"] / total["tokens"] == pytest.approx(measured["value"], rel=1e-2)
    assert api.export(second, tmp_path / "whole", merge=True, device="cuda").check is not None
