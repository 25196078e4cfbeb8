"""What every method promises, for every family of models: each registered name goes through the same tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from tunesmith.engine.native import NativeEngine, Optimization, seed_step
from tunesmith.methods import METHODS
from tunesmith.models.policy import Policy
from tunesmith.protocols import Method, Ruled
from tunesmith.types import ModelKind

TIED = ("llama", "gemma3", "falcon", "gpt2", "t5", "bart")
EXAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A method with options; `counted` says how many parameters of a model it should train."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    counted: Callable[[nn.Module], int] | None = None

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
CASES += [Case(name) for name in METHODS if name not in {case.name for case in CASES}]
CELLS = [
    pytest.param(case, family, id=f"{case}-{family}") for case in CASES for family in FAMILIES if case.serves(family)
]


def attached(case: Case, family: str, **given: Any) -> tuple[Policy, Method]:
    policy, method = policy_of(family, **given), case.method(family)
    seed_step(0, 0)
    method.attach(policy)
    return policy, method


def engine_of(policy: Policy, method: Method) -> NativeEngine:
    return NativeEngine(
        policy, method.parameter_groups(policy), Optimization(1e-2, "constant", 0, 0.0, 10), seed=0, rules=[]
    )


def train(
    policy: Policy, method: Method, family: str, steps: int, engine: NativeEngine | None = None, start: int = 0
) -> NativeEngine:
    """`steps` steps on the family's examples, as the loop takes them."""
    engine = engine or engine_of(policy, method)
    objective, examples = objective_of(family), examples_of(family, EXAMPLES)
    rules = method.rules(policy, 10) if isinstance(method, Ruled) else []
    for number in range(start + 1, start + steps + 1):
        engine.forward_backward(objective, policy, step_of(policy, examples, [EXAMPLES], number))
        for rule in rules:
            rule.before_step(engine, number)
        engine.step()
        for rule in rules:
            rule.after_step(engine, number)
    return engine


def gradient(policy: Policy, method: Method, family: str, sizes: list[int]) -> dict[str, Tensor]:
    engine = engine_of(policy, method)
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
    torch.testing.assert_close(outputs(policy, objective, examples), base, rtol=1e-5, atol=1e-5)
    before = state_of(policy)
    engine = train(policy, method, family, 3)
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
    train(policy, method, family, 2)
    trained = outputs(policy, objective, examples)
    method.export(policy, tmp_path)
    again, loader = policy_of(family), case.method(family)
    loader.load(again, tmp_path)
    again.heads.load_state_dict(policy.heads.state_dict())
    assert torch.equal(outputs(again, objective, examples), trained)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(engine_of(policy, method).trainable)
    assert not list(tmp_path.rglob("*.bin"))
    theirs = upstream(family, tmp_path).eval()
    for example in examples:
        torch.testing.assert_close(
            hidden_upstream(theirs, family, example), hidden_ours(policy, example), rtol=1e-4, atol=1e-4
        )


def upstream(family: str, folder: Path) -> nn.Module:
    """What transformers or PEFT makes of an exported folder, by their own words alone."""
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
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
    return found.last_hidden_state[0] if FAMILIES[family] == "encoder" else found.logits[0].log_softmax(-1)


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
def test_a_restored_state_goes_on_to_the_same_bits(case: Case, family: str) -> None:
    policy, method = attached(case, family)
    engine = train(policy, method, family, 2)
    state = {key: {n: v for n, v in values.items()} for key, values in engine.state().items()}
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
    train(policy, method, family, 2, engine, 2)
    other, other_method = attached(case, family)
    resumed = engine_of(other, other_method)
    resumed.restore(state)
    train(other, other_method, family, 2, resumed, 2)
    for name, value in state_of(policy).items():
        assert torch.equal(value, state_of(other)[name]), name


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_micro_batches_packing_and_recomputation_leave_the_gradient_alone(case: Case, family: str) -> None:
    policy, method = attached(case, family)
    train(policy, method, family, 1)
    whole = gradient(policy, method, family, [EXAMPLES])
    assert distance(whole, gradient(policy, method, family, [1] * EXAMPLES)) < 2e-5
    assert distance(whole, gradient(policy, method, family, [3, 1])) < 2e-5
    if policy.packed:
        padded, padded_method = attached(case, family, packed=False)
        padded.load_state_dict(policy.state_dict())
        assert distance(whole, gradient(padded, padded_method, family, [EXAMPLES])) < 2e-5
    if method.facts.recomputes and not method.facts.frozen_backbone:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
        assert distance(whole, gradient(policy, method, family, [EXAMPLES])) < 2e-5


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_bf16_trains_near_fp32(case: Case, family: str) -> None:
    exact, method = attached(case, family)
    rough, rough_method = attached(case, family)
    rough.autocast = torch.bfloat16
    for policy, own in ((exact, method), (rough, rough_method)):
        train(policy, own, family, 2)
    objective, examples = objective_of(family), examples_of(family, EXAMPLES)
    near, far = outputs(rough, objective, examples), outputs(exact, objective, examples)
    assert torch.isfinite(near).all()
    assert float((near.mean() - far.mean()).abs()) < 0.3


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
