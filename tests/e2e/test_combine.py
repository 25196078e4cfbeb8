"""Adapters into one: the sum is the sum, pruning is PEFT's, and what comes out is an adapter for everybody."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tunesmith
from test_adapters import LABELLED, ROWS, answers, call, train
from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.methods.low_rank_sum import WAYS

MADE = "made"
WEIGHTS = (0.7, -0.4)
LORAS: dict[str, dict[str, Any]] = {
    "a": {"name": "lora", "rank": 4},
    "b": {"name": "lora", "rank": 4, "alpha": 3.0},
    "wide": {"name": "lora", "rank": 8, "rslora": True, "ranks": {"q_proj": 2}, "targets": ["q_proj", "down_proj"]},
    "pissa": {"name": "lora", "rank": 2, "init": "pissa"},
    "added": {"name": "lora", "rank": 2, "tokens": ["<call>"]},
}
TURNED = {"name": "ia3", "targets": ["down_proj"], "feedforward": ["k_proj"]}
EXPERTS = {"name": "lora", "rank": 2, "targets": ["q_proj", "w1", "w2", "w3"]}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("combine")
    vectors = {"ia3": "ia3", "vectors": "ia3", "turned": TURNED}
    methods: dict[str, Any] = {**LORAS, **vectors, "dora": {"name": "dora", "rank": 2}}
    made = {name: train(tiny_llama, place / name, method, seed) for seed, (name, method) in enumerate(methods.items())}
    recipe = {"model": str(tiny_llama), "objective": "classify", "method": "lora", "precision": "fp32"}
    recipe["train"] = {"max_steps": 2, "batch_size": 4}
    made["labels"] = api.train(recipe, data={"train": LABELLED}, out=place / "labels").path
    made["experts"] = train(mixtral(tiny_llama, place / "mixtral"), place / "experts", EXPERTS)
    return made


def mixtral(like: Path, to: Path) -> Path:
    """A base whose feed-forward layers are stacks of experts, with the tokenizer of another."""
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    shape = AutoConfig.from_pretrained(like).to_dict()
    sizes = {key: shape[key] for key in shape if key.endswith("_size") or key.startswith(("num_", "max_position"))}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, pad_token_id=0)).save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(like / name, to)
    return to


def updates(folder: Path) -> dict[str, Tensor]:
    """s B A of every layer, by the definition, from what is on disk."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    found: dict[str, Tensor] = {}
    for key in (key for key in state if "lora_A" in key):
        down, up = state[key].double(), state[key.replace("lora_A", "lora_B")].double()
        pattern = next((v for k, v in config["alpha_pattern"].items() if f".{k}.lora_A" in key), config["lora_alpha"])
        rank = down.shape[0]
        found[key] = pattern / (math.sqrt(rank) if config["use_rslora"] else rank) * up @ down
    return found


def peft_by(runs: dict[str, Path], base: Path, names: tuple[str, ...], **how: Any) -> dict[str, Tensor]:
    """What PEFT's own combination adds to each layer of a live model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs[names[0]] / "model", names[0])
    for name in names[1:]:
        model.load_adapter(str(runs[name] / "model"), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(names), list(WEIGHTS[: len(names)]), MADE, **how)
    return {
        f"base_model.model.{name.removeprefix('base_model.model.')}.lora_A.weight": module.get_delta_weight(
            "made"
        ).double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and MADE in module.lora_A
    }


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def weights(*values: float) -> list[str]:
    return ["--weights", *map(str, values)]


@pytest.mark.parametrize("names", [("a", "b"), ("a", "wide"), ("pissa", "wide"), ("wide", "a", "b")], ids=str)
def test_the_sum_is_the_weighted_sum_of_the_updates(
    names: tuple[str, ...], runs: dict[str, Path], tmp_path: Path
) -> None:
    shares = (*WEIGHTS, 1.5)[: len(names)]
    assert call("combine", *(runs[n] for n in names), "--to", tmp_path / "made", *weights(*shares))[0] == 0
    expected: dict[str, Tensor] = {}
    for name, share in zip(names, shares, strict=True):
        for key, update in updates(runs[name] / "model").items():
            expected[key] = expected.get(key, 0) + share * update
    close(updates(tmp_path / "made"), expected)


def test_alone_with_weight_one_an_adapter_is_itself_and_without_weights_the_mean(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    call("combine", runs["wide"], "--to", tmp_path / "same")
    close(updates(tmp_path / "same"), updates(runs["wide"] / "model"))
    call("combine", runs["a"], runs["b"], "--to", tmp_path / "mean")
    a, b = (updates(runs[name] / "model") for name in "ab")
    close(updates(tmp_path / "mean"), {key: (a[key] + b[key]) / 2 for key in a})
    assert [
        part["weight"] for part in json.loads((tmp_path / "mean" / "tunesmith.json").read_text())["combined"]["of"]
    ] == [0.5, 0.5]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_is_pefts(
    how: str, runs: dict[str, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DARE's draw is replaced by every other entry: theirs and ours go through the layers in another order."""

    def every_other(like: Tensor) -> Tensor:
        return (torch.arange(like.numel()).reshape(like.shape) % 2).to(like)

    monkeypatch.setattr(torch, "bernoulli", every_other)
    density = {"density": 0.5} if WAYS[how].pruned else {}
    options = ["--density", "0.5"] if density else []
    code, _, err = call(
        "combine", runs["a"], runs["b"], "--to", tmp_path / "made", "--how", how, *weights(*WEIGHTS), *options
    )
    assert code == 0, err
    close(updates(tmp_path / "made"), peft_by(runs, tiny_llama, ("a", "b"), combination_type=how, **density))


def test_a_rank_cuts_to_the_nearest_and_a_seed_draws(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ("combine", runs["a"], runs["wide"], "--how", "svd", "--rank", "3", *weights(1, 1))
    assert call(*words, "--to", tmp_path / "cut")[0] == 0
    call("combine", runs["a"], runs["wide"], *weights(1, 1), "--to", tmp_path / "whole")
    cut, whole = updates(tmp_path / "cut"), updates(tmp_path / "whole")
    for key, update in whole.items():
        assert int(torch.linalg.matrix_rank(cut[key].float(), rtol=1e-5)) <= 3
        lost = torch.linalg.svdvals(update)[3:].square().sum().sqrt()
        torch.testing.assert_close((update - cut[key]).norm(), lost, rtol=1e-4, atol=1e-6)
    for seed, name in (("1", "first"), ("1", "again"), ("2", "other")):
        call("combine", runs["a"], runs["b"], "--how", "dare_linear", "--seed", seed, "--to", tmp_path / name)
    first, again, other = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("first", "again", "other")
    )
    assert first == again != other


def test_vectors_are_combined_around_one(runs: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    assert call("combine", runs["ia3"], runs["vectors"], "--to", tmp_path / "made", *weights(0.25, 0.5))[0] == 0
    one, two, made = (
        load_file(f / "adapter_model.safetensors")
        for f in (runs["ia3"] / "model", runs["vectors"] / "model", tmp_path / "made")
    )
    assert one.keys() == made.keys()
    for key, value in made.items():
        torch.testing.assert_close(value, 1 + 0.25 * (one[key] - 1) + 0.5 * (two[key] - 1))
    assert len(api.predict(tmp_path / "made", ROWS[:2])) == 2


def test_what_comes_out_is_an_adapter_here_and_upstream(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    together = tunesmith.load_adapters([runs["a"], runs["wide"]], "cpu")
    before = answers(together, "a")
    made = together.combine("both", {"a": 0.5, "wide": 2.0})
    folder = together.save("both", tmp_path / "both")
    assert (together.names, together.active) == (["a", "wide", "both"], "a")
    assert answers(together, "a") == before
    alone = answers(api.load(folder, "cpu"), "both")
    assert answers(together["both"], "both") == alone
    policy = made.policy.eval()
    policy.model.set_attn_implementation("sdpa")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder).eval()
    ids = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    code, out, err = call("chat", folder, "--prompt", "colour 1?", "--json", "--max-new-tokens", "4")
    assert code == 0, err
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[8:]))
    code, out, err = call("export", folder, "--to", tmp_path / "merged", "--merge", "--data", rows, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    code, _, err = call("export", folder, "--to", tmp_path / "again", "--merge")
    assert code == 2
    assert "no run" in err
    assert "--data" in err


REFUSED: dict[str, tuple[list[str], list[str], str]] = {
    "whole model": (["a", "labels"], [], "differ in their objective (sft and classify)"),
    "heads": (["labels"], [], "has a head of its own"),
    "method": (["a", "ia3"], ["--how", "linear"], "differ in their method (lora and ia3)"),
    "dora": (["dora"], [], "by dora, whose adapters cannot be combined"),
    "way of ia3": (["ia3", "vectors"], ["--how", "ties"], "by ia3, whose adapters cannot be combined by ties"),
    "turned": (["ia3", "turned"], [], "scales a layer's inputs in one adapter and its outputs in another"),
    "experts": (["experts"], [], "updates stacks of experts (down_proj, gate_up_proj)"),
    "tokens": (["a", "added"], [], "added tokens to the vocabulary"),
    "rows of tokens": (["added"], [], "holds more than low-rank factors (base_model.model.model.embed_tokens."),
    "ranks": (["a", "wide"], ["--how", "linear"], "different ranks in model.layers.0"),
    "unknown way": (["a"], ["--how", "tries"], "there is no way 'tries'"),
    "weights": (["a", "b"], ["--weights", "1"], "2 adapters are combined, and the weights are 1"),
    "not a number": (["a"], ["--weights", "nan"], "the weights are nan"),
    "density unread": (["a", "b"], ["--density", "0.5"], "density is given, and cat reads none"),
    "density": (["a", "b"], ["--how", "ties", "--density", "1"], "density is 1"),
    "rank unread": (["a", "b"], ["--rank", "2"], "rank is given, and cat reads none"),
    "rank": (["a", "b"], ["--how", "svd", "--rank", "0"], "rank is 0"),
    "seed unread": (["a", "b"], ["--how", "ties", "--seed", "2"], "seed is given, and ties reads none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_and_leaves_nothing(
    case: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    names, words, cause = REFUSED[case]
    code, _, err = call("combine", *(runs[name] for name in names), "--to", tmp_path / "made", *words)
    assert code == 2
    assert cause in err
    assert "remedy: " in err
    assert not (tmp_path / "made").exists()


def test_nothing_is_written_over(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    assert "is not empty" in call("combine", runs["a"], "--to", tmp_path / "made")[2]
    together = tunesmith.load_adapters([runs["a"]], "cpu")
    with pytest.raises(InputError, match="is not empty"):
        together.save("a", tmp_path / "made")
    with pytest.raises(InputError, match="no adapter 'b'"):
        together.combine("both", {"a": 1.0, "b": 1.0})


def test_what_was_combined_or_exported_is_measured_and_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "more.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    both = tmp_path / "both"
    assert call("combine", runs["a"], runs["b"], "--to", both)[0] == 0
    before = {p.name: p.read_bytes() for p in both.iterdir()}
    code, _, err = call("compare", runs["a"], both)
    assert (code, f"{both} was not measured yet" in err, "--keep all" in err) == (2, True, True)
    code, out, err = call("evaluate", both, "--data", rows, "--metrics", "loss,exact_match", "--json")
    assert code == 0, err
    found = json.loads(out)
    (loss,) = [r for r in found["records"] if (r["metric"], r["model"]) == ("loss", "tuned")]
    scores = [p.scores for p in api.predict(both, ROWS, device="cpu")]
    total = {key: sum(one[key] for one in scores) for key in ("nll", "tokens")}
    assert loss["value"] == pytest.approx(total["nll"] / total["tokens"], rel=1e-5)
    assert {r["model"] for r in found["records"]} == {"base", "tuned"}
    assert (found["model"], found["report"]) == (str(both), None)
    assert all((both / name).read_bytes() == content for name, content in before.items())
    assert "next:   tunesmith compare" in call("evaluate", both)[1]
    assert call("evaluate", runs["a"] / "model", "--data", rows, "--keep", "all")[0] == 0  # its run's results
    assert not (runs["a"] / "model" / "evaluation.json").exists()
    code, out, err = call("compare", runs["a"], both, "--data", "more", "--json")
    assert code == 0, err
    code, _, err = call("report", both)
    assert (code, "a model without its run" in err) == (2, True)
    assert call("export", both, "--to", tmp_path / "copy")[0] == 0
    assert {p.name for p in (tmp_path / "copy").iterdir()} == set(before)
    with pytest.raises(InputError, match="not a run"):
        api.evaluate(tmp_path, rows)
