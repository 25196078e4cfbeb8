"""Linear layers that train, multiplied in e4m3 while they learn: torchao's, with a scale for each row of the operands.

The casts cost as much as is gained unless torch compiles them into what makes the operands (`compiled_layers`).
What does not learn, as a validation or a saved model, multiplies as it would without.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "torchao"
MULTIPLE = 16  # of features: other widths are not multiplied in e4m3


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


def fuse(layer: nn.Module) -> int:
    """How many linear layers inside train in e4m3 from now on. They are new modules over the same parameters."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    served = [module for module in layer.modules() if _is_served(module)]
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(layer, module_filter_fn=lambda module, _: _is_served(module), config=config)
    for module in layer.modules():
        if type(module) is _theirs():
            module.__class__ = _while_learning()
    return len(served)


def _is_served(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.requires_grad
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )


def _theirs() -> Any:
    from torchao.float8.float8_linear import Float8Linear

    return Float8Linear


@cache
def _while_learning() -> Any:
    """Their layer, as a plain one where nothing is learnt."""
    theirs = _theirs()

    class Fp8Linear(theirs):
        def forward(self, input: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(input)
            return F.linear(input, self.weight, self.bias)

    return Fp8Linear
