"""Every method on one base: how much of it trains and what that asks of memory, counted on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.compat import quiet_transformers
from tunesmith.declared import HeadSpec, MethodFacts
from tunesmith.engine import memory
from tunesmith.errors import TunesmithError
from tunesmith.methods import METHODS
from tunesmith.models.config import safe_config
from tunesmith.models.fetch import LocalModel, resolve
from tunesmith.models.heads import Head
from tunesmith.models.load import kind_of, meta_model
from tunesmith.models.policy import Policy, Tokens

# A decoder of 8 billion parameters, where no base is named: the sizes of Llama-3.1-8B.
REFERENCE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
REFERENCE_NAME = "a decoder of 8B parameters (the sizes of Llama-3.1-8B)"


@dataclass(frozen=True, slots=True)
class Line:
    """A method with its default options on a base; `trainable` and `bytes` are None where it does not serve it.

    `bytes`: the weights, frozen ones in bf16, with gradients and Adam's moments; activations come on top.
    An encoder has a head of two labels.
    """

    name: str
    facts: MethodFacts
    trainable: int | None
    total: int
    bytes: int | None
    why_not: str | None = None


def method_table(model: str | None = None) -> tuple[str, list[Line]]:
    """The name of the base (`model`, as recipes name it) and a line for every registered method.

    Raises what `resolve` raises for the model.
    """
    local = None if model is None else resolve(model)
    return (REFERENCE_NAME if local is None else local.name), [_line(name, local) for name in METHODS]


def _line(name: str, local: LocalModel | None) -> Line:
    found = METHODS.get(name)
    method: Any = found(found.Options(), 0.0)
    module = _module(local)
    total = sum(p.numel() for p in module.parameters())
    kind = kind_of(module.config)
    if kind not in method.facts.kinds:
        return Line(name, method.facts, None, total, None, f"not for {kind} models")
    output = module.get_output_embeddings()
    tied = output is not None and output.weight is module.get_input_embeddings().weight
    if tied and method.facts.moves_output and not method.facts.unties:
        return Line(name, method.facts, None, total, None, "needs `untie`: the base's output projection is tied")
    try:
        with torch.device("meta"):
            policy = Policy(module, kind, Tokens((0,), 0), packed=False)
            if kind == "encoder":
                policy.add_head(Head(HeadSpec("label", 2, ("no", "yes")), policy.width))
            method.attach(policy)
    except TunesmithError as error:
        return Line(name, method.facts, None, total, None, error.cause)
    counts = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    trainable = sum(n for n, trains in counts if trains)
    frozen = sum(n for n, trains in counts if not trains)
    return Line(name, method.facts, trainable, total, 2 * frozen + memory.ADAM_BYTES * trainable)


def _module(local: LocalModel | None) -> Any:
    """The base on the meta device, with its output projection where it has one."""
    if local is not None:
        encodes = kind_of(safe_config(local.folder)) == "encoder"
        return meta_model(local, "pooled" if encodes else "lm").module
    from transformers import AutoModelForCausalLM, LlamaConfig

    with quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**REFERENCE), dtype=torch.float32)
