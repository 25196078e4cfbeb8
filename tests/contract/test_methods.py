"""What every method promises, for every family of models: each registered name goes through the same tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinds import (
    FAMILIES,
    PADDED,
    batches_of,
    examples_of,
    model_of,
    objective_of,
    outputs,
    policy_of,
    state_of,
    step_of,
)
from tunesmith import compat
from tunesmith.engine import checkpoint
from tunesmith.engine.native import NativeEngine, Optimization, seed_step
from tunesmith.methods import METHODS
from tunesmith.models.layers import stacks
from tunesmith.models.policy import Policy
from tunesmith.plugins import load_plugins
from tunesmith.protocols import Fitted, Method, Ruled
from tunesmith.types import ModelKind

load_plugins([path for path in os.environ.get("CONTRACT_PLUGINS", "").split(os.pathsep) if path])  # methods of others

TIED = ("llama", "gemma3", "falcon", "gpt2", "t5", "bart")
EXAMPLES = 4
FP32_ONLY = ("deberta",)  # the plan refuses bf16


@dataclass(frozen=True)
class Case:
    """A method with options; `counted` says how many parameters of a model it should train."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    counted: Callable[[nn.Module], int] | None = None
    tolerance: float = 0.0  # of a saved model's outputs
    starts_as_base: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def options_for(self, family: str) -> dict[str, Any]:
        untie = self.name == "head" and family in TIED
        return {**self.options, **({"untie": True} if untie else {})}

    def method(self, family: str) -> Method:
        found = METHODS.get(self.name)
        return found(found.Options.model_validate(self.options_for(family)), 0.0)

    def serves(self, family: str) -> bool:
        facts = METHODS.get(self.name).facts
        kind: ModelKind = FAMILIES[family]
        return family in self.families and kind in facts.kinds


def elements(model: nn.Module, chosen: Callable[[str, nn.Module], bool] = lambda name, module: True) -> int:
    """Elements of the parameters that modules chosen by name and class own, each once."""
    own = {id(p): p.numel() for n, m in model.named_modules() if chosen(n, m) for p in m.parameters(recurse=False)}
    return sum(own.values())


def is_norm(name: str, module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def output_projection(model: nn.Module) -> int:
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if output is None else sum(p.numel() for p in output.parameters())


def adapters(model: nn.Module, inner: int, each: int, scalings: int = 0) -> int:
    """Elements of `each` bottlenecks in every layer of a model 32 wide: two matrices, their biases, scalings."""
    count = sum(len(stack) for stack in stacks(model).values())
    return count * each * (2 * 32 * inner + inner + 32 + scalings)


CASES = [
    Case("full", counted=elements),
    Case("head", counted=output_projection),
    Case("partial", {"only": "norms"}, counted=lambda model: elements(model, is_norm)),
    Case("partial", {"top": 1}),
    Case("partial", {"layers": [0, 0], "gradual": 1.0}),
    Case(
        "partial",
        {"only": "biases"},
        families=("gpt2", "gpt_neox", "bert", "roberta", "deberta", "bart"),
        counted=lambda model: sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias")),
    ),
]
KEYS = "k|k_proj|key|key_proj|qkv_proj|query_key_value|Wqkv|c_attn"  # what makes the keys in each family
NO_TRANSPOSED = tuple(family for family in FAMILIES if family != "gpt2")  # PEFT has no layer for GPT-2's linears there
NO_EXPERTS = tuple(family for family in FAMILIES if family != "mixtral")
NO_SECOND_TABLE = tuple(family for family, kind in FAMILIES.items() if kind != "encoder-decoder")
CASES += [
    Case("dora", families=NO_EXPERTS),
    Case("ia3", families=NO_EXPERTS),
    Case("lora", {"rank": 4, "rslora": True, "plus": 16.0, "ranks": {KEYS: 2}}),
    Case("lora", {"rank": 4, "init": "pissa"}, families=NO_EXPERTS, tolerance=1e-5),
    Case("lora", {"rank": 4, "init": "olora", "rslora": True, "ranks": {KEYS: 2}}, families=NO_EXPERTS),
    Case("lora", {"rank": 4, "init": "eva"}, families=NO_EXPERTS),
    Case("lora", {"rank": 4, "init": "gaussian"}, families=("llama", "bert", "t5")),
    Case("lora", {"rank": 4, "tokens": ["<a>", "<b>"]}, families=NO_SECOND_TABLE),
    Case("lora", {"rank": 4, "tokens": ["<a>", "<b>"], "init": "pissa"}, families=("llama", "qwen3")),
    Case("adalora", {"rank": 2}, tolerance=1e-5),  # what it has pruned is not saved, so sums are shorter
    Case("vera", {"rank": 8}),
    Case("loha", {"rank": 2}, families=NO_TRANSPOSED),
    Case("lokr", {"rank": 2}, families=NO_TRANSPOSED),
    Case("oft", {"block_size": 8}, families=NO_TRANSPOSED),
]
CASES += [
    Case("bottleneck", {"variant": "pfeiffer"}, counted=lambda model: adapters(model, inner=2, each=1)),
    Case(
        "bottleneck",
        {"variant": "houlsby", "reduction_factor": 10, "scaling": "learned"},
        counted=lambda model: adapters(model, inner=3, each=2, scalings=1),
    ),
    Case(
        "bottleneck",
        {"variant": "parallel", "reduction_factor": 4},
        counted=lambda model: adapters(model, inner=8, each=1),
    ),
]
VIRTUAL = {"virtual_tokens": 5}
TAKES_KEYS = ("llama", "qwen3", "mistral", "mixtral", "gemma3", "phi3", "gpt2", "gpt_neox", "bert", "roberta")


def key_width(model: nn.Module) -> int:
    """What the keys of a position take in one layer: 4 heads of width 8, or 2 where they are grouped."""
    return 8 * getattr(model.config, "num_key_value_heads", 4)  # type: ignore[union-attr]


CASES += [
    Case("prompt", VIRTUAL, counted=lambda model: 5 * 32, starts_as_base=False),
    Case("prompt", {**VIRTUAL, "init": "random"}, starts_as_base=False),
    Case("prompt", {**VIRTUAL, "init": "text", "text": "abc"}, starts_as_base=False),
    Case(
        "p_tuning",
        {**VIRTUAL, "hidden": 8},
        counted=lambda model: 5 * 32 + 33 * 8 + 9 * 8 + 9 * 32,
        starts_as_base=False,
    ),
    Case("p_tuning", {**VIRTUAL, "encoder": "lstm", "hidden": 4}, starts_as_base=False),
    Case(
        "prefix",
        VIRTUAL,
        families=TAKES_KEYS,
        counted=lambda model: 5 * 2 * 3 * key_width(model),
        starts_as_base=False,
    ),
    Case("prefix", {**VIRTUAL, "hidden": 8}, families=TAKES_KEYS, starts_as_base=False),
]
CASES += [Case(name) for name in METHODS if name not in {case.name for case in CASES}]
CELLS = [
    pytest.param(case, family, id=f"{case}-{family}") for case in CASES for family in FAMILIES if case.serves(family)
]


def attached(case: Case, family: str, **given: Any) -> tuple[Policy, Method]:
    policy, method = policy_of(family, **given), case.method(family)
    if method.facts.tokens:
        policy.tokens = replace(policy.tokens, added=tuple(examples_of(family)[0].pieces[0].input_ids_T[:2].tolist()))
    seed_step(0, 0)
    method.attach(policy)
    if isinstance(method, Fitted):
        method.fit(policy, batches_of(policy, examples_of(family, EXAMPLES), [1] * EXAMPLES))
    return policy, method


class Training:
    """An engine and the method's own rules, driven as the loop drives them."""

    def __init__(self, policy: Policy, method: Method, family: str) -> None:
        self.policy, self.family, self.number = policy, family, 0
        groups = method.parameter_groups(policy)
        self.engine = NativeEngine(policy, groups, Optimization(1e-2, "constant", 0, 0.0, 10), seed=0)
        self.rules = method.rules(policy, 10) if isinstance(method, Ruled) else []

    def steps(self, count: int) -> Training:
        objective, examples = objective_of(self.family), examples_of(self.family, EXAMPLES)
        for _ in range(count):
            self.number += 1
            step = step_of(self.policy, examples, [EXAMPLES], self.number)
            self.engine.forward_backward(objective, self.policy, step)
            for rule in self.rules:
                rule.before_step(self.engine, self.number)
            self.engine.step()
            for rule in self.rules:
                rule.after_step(self.engine, self.number)
        return self

    def saved(self, folder: Path) -> None:
        rules = {str(i): rule.state() for i, rule in enumerate(self.rules)}
        checkpoint.write(folder, self.number, {"engine": self.engine.state(), "rules": rules})

    def restored(self, folder: Path) -> Training:
        (found,) = checkpoint.found(folder)
        state, self.number = checkpoint.read(found), found.step
        self.engine.restore(state["engine"])
        for i, rule in enumerate(self.rules):
            rule.restore(state["rules"][str(i)])
        return self


def gradient(policy: Policy, method: Method, family: str, sizes: list[int]) -> dict[str, Tensor]:
    engine = Training(policy, method, family).engine
    engine.forward_backward(objective_of(family), policy, step_of(policy, examples_of(family, EXAMPLES), sizes))
    return {n: p.grad.double() for n, p in engine.trainable.items() if p.grad is not None}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative L2 distance; a parameter without gradient counts as one of zeros."""
    apart = sum(
        float((a.get(n, torch.zeros(())) - b.get(n, torch.zeros(()))).square().sum()) for n in a.keys() | b.keys()
    )
    return (apart / sum(float(g.square().sum()) for g in a.values())) ** 0.5


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_only_what_is_named_trains_and_the_base_comes_back(case: Case, family: str) -> None:
    objective, examples = objective_of(family), examples_of(family, EXAMPLES)
    base = outputs(policy_of(family), objective, examples)
    policy, method = attached(case, family)
    if case.starts_as_base:
        torch.testing.assert_close(outputs(policy, objective, examples), base, rtol=1e-5, atol=1e-5)
    before = state_of(policy)
    engine = Training(policy, method, family).steps(3).engine
    after = state_of(policy)
    assert set(engine.trainable) == {n for n, p in policy.named_parameters() if p.requires_grad}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(engine.trainable)
    unmoved = {n for n in set(engine.trainable) - moved if engine.trainable[n].abs().sum() > 0}
    assert not unmoved - may_rest(policy, case), sorted(unmoved)
    assert not torch.equal(outputs(policy, objective, examples), base)
    if not len(policy.heads):
        with method.reference(policy):
            assert torch.equal(outputs(policy, objective, examples), base)
        assert state_of(policy).keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in state_of(policy).items())


def may_rest(policy: Policy, case: Case) -> set[str]:
    """Trained parameters that nothing in these examples uses: token types, rows of tables."""
    return {n for n, _ in policy.named_parameters() if "token_type" in n}


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_what_is_saved_gives_the_same_outputs_here_and_upstream(case: Case, family: str, tmp_path: Path) -> None:
    objective, examples = objective_of(family), examples_of(family, EXAMPLES)
    policy, method = attached(case, family)
    Training(policy, method, family).steps(2)
    trained = outputs(policy, objective, examples)
    method.export(policy, tmp_path)
    again, loader = policy_of(family), case.method(family)
    again.tokens = policy.tokens
    loader.load(again, tmp_path)
    again.heads.load_state_dict(policy.heads.state_dict())
    found = outputs(again, objective, examples)
    torch.testing.assert_close(found, trained, rtol=case.tolerance, atol=case.tolerance)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in policy.named_parameters() if p.requires_grad
    }
    assert not list(tmp_path.rglob("*.bin"))
    theirs = upstream(family, tmp_path)
    if theirs is None:
        return
    theirs.eval()
    for example in examples:
        torch.testing.assert_close(
            hidden_upstream(theirs, family, example), hidden_ours(policy, example), rtol=1e-4, atol=1e-4
        )


def upstream(family: str, folder: Path) -> nn.Module | None:
    """What transformers or PEFT makes of an exported folder, by their own words alone.

    None for AdapterHub's library, which lives with another transformers: tests/e2e/test_adapterhub.py asks it.
    """
    if (folder / "adapter.safetensors").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys|.*have invalid shape")
            return PeftModel.from_pretrained(model_of(family), str(folder))
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = {"decoder": AutoModelForCausalLM, "encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM}
    return auto[FAMILIES[family]].from_pretrained(folder)


@torch.no_grad()
def hidden_upstream(model: nn.Module, family: str, example: Any) -> Tensor:
    """Logits, or hidden states of an encoder, of one example by the model's own forward."""
    ids = [torch.from_numpy(piece.input_ids_T).long()[None] for piece in example.pieces]
    inputs: dict[str, Tensor] = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])}
    if FAMILIES[family] == "encoder-decoder":
        inputs["decoder_input_ids"] = ids[1]
    found = model(**inputs)
    shown = found.last_hidden_state if FAMILIES[family] == "encoder" else found.logits.log_softmax(-1)
    return shown[0, -len(ids[-1][0]) :]  # PEFT shows virtual tokens in front


@torch.no_grad()
def hidden_ours(policy: Policy, example: Any) -> Tensor:
    from tunesmith.types import Want

    policy.eval()
    hidden = policy.score(batches_of(policy, [example], [1])[0], Want(hidden=True)).hidden_BTD
    assert hidden is not None
    if policy.kind == "encoder":
        return hidden[0]
    scale = policy._projection()["scale"]  # pyright: ignore[reportPrivateUsage]
    return (policy.model.get_output_embeddings()(hidden[0]) * scale).log_softmax(-1)


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_a_restored_state_goes_on_to_the_same_bits(case: Case, family: str, tmp_path: Path) -> None:
    policy, method = attached(case, family)
    training = Training(policy, method, family).steps(2)
    training.saved(tmp_path)
    training.steps(3)
    other, other_method = attached(case, family)
    Training(other, other_method, family).restored(tmp_path).steps(3)
    expected = state_of(other)
    for name, value in state_of(policy).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_micro_batches_packing_and_recomputation_leave_the_gradient_alone(case: Case, family: str) -> None:
    policy, method = attached(case, family)
    Training(policy, method, family).steps(1)
    whole = gradient(policy, method, family, [EXAMPLES])
    assert distance(whole, gradient(policy, method, family, [1] * EXAMPLES)) < 2e-5
    assert distance(whole, gradient(policy, method, family, [3, 1])) < 2e-5
    if policy.packed:
        padded, padded_method = attached(case, family, packed=False)
        padded.load_state_dict(policy.state_dict())
        assert distance(whole, gradient(padded, padded_method, family, [EXAMPLES])) < 2e-5
    if method.facts.recomputes and not method.facts.frozen_backbone:
        compat.recompute(policy.model, [])
        assert distance(whole, gradient(policy, method, family, [EXAMPLES])) < 2e-5


@pytest.mark.parametrize(("case", "family"), [cell for cell in CELLS if cell.values[1] not in FP32_ONLY])
def test_in_bf16_the_gradient_is_nearly_that_of_fp32(case: Case, family: str) -> None:
    policy, method = attached(case, family)
    Training(policy, method, family).steps(1)
    exact = gradient(policy, method, family, [EXAMPLES])
    policy.autocast = torch.bfloat16
    rough = gradient(policy, method, family, [EXAMPLES])
    assert rough.keys() == exact.keys()
    assert distance(exact, rough) < (0.6 if family == "mixtral" else 0.2)  # another expert may be chosen


@pytest.mark.parametrize("case", [case for case in CASES if case.counted is not None], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainable_count_is_the_one_counted_by_hand(case: Case, family: str) -> None:
    if not case.serves(family):
        pytest.skip(f"{case.name} does not serve {family}")
    policy, _ = attached(case, family)
    fresh = sum(p.numel() for p in policy.heads.parameters())
    assert case.counted is not None
    counted = 0 if case.name == "head" and fresh else case.counted(model_of(family))
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == counted + fresh


def test_padded_families_are_those_whose_attention_cannot_be_held(tmp_path: Path) -> None:
    from tunesmith.facts import is_packable
    from tunesmith.models.load import MetaModel

    for family, kind in FAMILIES.items():
        with torch.device("meta"):
            module = model_of(family)
        meta = MetaModel(module, family, kind, 0, 0, None, False, 97, 32, 3, ())
        assert is_packable(meta) == (family not in PADDED), family


def test_weights_that_are_stretches_of_larger_ones_are_saved_whole(tmp_path: Path) -> None:
    """As frozen weights are on CUDA, where the last columns of the larger matrix hold an adapter's."""
    policy, method = attached(Case("partial", {"only": "norms"}), "llama")
    expected = {name: value.clone() for name, value in policy.model.state_dict().items()}
    for parameter in policy.model.parameters():
        if parameter.ndim == 2:
            wide = torch.zeros(parameter.shape[0], parameter.shape[1] + 3)
            wide[:, :-3] = parameter.data
            parameter.data = wide[:, :-3]
    method.export(policy, tmp_path)
    loaded = upstream("llama", tmp_path)
    assert loaded is not None
    again = loaded.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(value, again[name]) for name, value in expected.items())
