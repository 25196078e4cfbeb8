"""Linear layers that train, multiplied in e4m3 while they learn: torchao's, with one scale for each operand.

The casts cost as much as is gained unless torch compiles them into what makes the operands (`compiled_layers`), and
more with a scale for each row: on an H200 a step of a Qwen3-1.7B shape took 188 ms in bf16, 185 so and 265 by rows.
What does not learn, as a validation or a saved model, multiplies as it would without.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "torchao"
MULTIPLE = 16  # of features and of positions; layers of other widths are not multiplied in e4m3


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


def fuse(layer: nn.Module) -> int:
    """How many linear layers inside train in e4m3. They are new modules over the same parameters."""
    theirs, ours = _torchao(), _while_learning()
    config = theirs.Float8LinearConfig.from_recipe_name("tensorwise")
    theirs.convert_to_float8_training(layer, module_filter_fn=_chosen, config=config)
    for module in layer.modules():
        if type(module) is ours.__base__:
            module.__class__ = ours
    return sum(type(module) is ours for module in layer.modules())


def _chosen(module: nn.Module, _: str) -> bool:
    return _is_served(module)


def _is_served(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.requires_grad
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )


@cache
def _torchao() -> Any:
    """Its part for training; what it logs of its other parts while they are imported is nothing to a run."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8
    finally:
        logging.disable(quiet)
    return torchao.float8


@cache
def _while_learning() -> Any:
    """Their layer for any number of positions, and as a plain one where nothing is learnt.

    The product for the weight's gradient is along the positions, and e4m3 takes them in whole multiples.
    """
    from torchao.float8.float8_linear import Float8Linear

    class Fp8Linear(Float8Linear):
        def forward(self, input: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return F.linear(input, self.weight, self.bias)
            x_ND = input.reshape(-1, input.shape[-1])
            out_NO = super().forward(F.pad(x_ND, (0, 0, 0, -x_ND.shape[0] % MULTIPLE)))[: x_ND.shape[0]]
            return out_NO.reshape(*input.shape[:-1], out_NO.shape[-1])

    return Fp8Linear
