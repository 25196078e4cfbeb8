"""OFT: layers turned by block-diagonal rotations (Qiu et al. 2023, arXiv 2306.07280), through PEFT."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tunesmith.declared import MethodFacts
from tunesmith.errors import InputError
from tunesmith.methods import METHODS
from tunesmith.methods.peft_adapter import TRAINED, PeftAdapter, Targets, has_transposed_linears, task_type
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Strict

if TYPE_CHECKING:
    from peft import OFTConfig


@METHODS.register("oft")
class Oft(PeftAdapter):
    """h = W R x with R orthogonal and block-diagonal, by the Cayley transform (equation 4)."""

    facts: MethodFacts = MethodFacts(
        summary="rotations of each layer's inputs: norms and angles of the base are kept",
        when="the base must keep what it knows: its neurons turn together and keep their lengths",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        mergeable=True,
        learning_rate=3e-3,
        learning_rate_source="best of 3e-3 (0.826) and 1e-2 (0.786) on 10 rows a class of BANKING77, four epochs",
        stands_on=frozenset({"oft"}),
    )

    merges_last_first = True  # (W R2) R1 x: the first rotates the input first

    class Options(Strict):
        """How wide the rotated blocks are, and which layers are rotated."""

        block_size: Annotated[int, Field(ge=2)] = Field(
            32, description="inputs that one rotation mixes; it divides every layer's width"
        )
        targets: Targets = Field("all-linear", description="linear layers by name, or all-linear")

    options: Options

    def attach(self, policy: Policy) -> None:
        """InputError where blocks of this size do not fill a layer: PEFT would take others there, and not say so."""
        from peft.tuners.oft import OFTLayer

        super().attach(policy)
        size = self.options.block_size
        layers = {name: layer for name, layer in self._peft.named_modules() if isinstance(layer, OFTLayer)}
        for name, layer in layers.items():
            if layer.oft_block_size[TRAINED] != size:
                most = gcd(*(int(layer.in_features or 0) for layer in layers.values()))
                raise InputError(
                    f"method.block_size is {size}, and {name.removeprefix('base_model.model.')} reads "
                    f"{layer.in_features} inputs, which is no multiple of it",
                    f"set it to a divisor of {most}" if most > 1 else "name layers of one width in method.targets",
                )

    def config(self, policy: Policy) -> OFTConfig:
        from peft import OFTConfig

        return OFTConfig(
            r=0,
            oft_block_size=self.options.block_size,
            module_dropout=self.dropout,
            use_cayley_neumann=False,  # a short series in place of the inverse is not orthogonal
            fan_in_fan_out=has_transposed_linears(policy),
            target_modules=self.options.targets,
            task_type=task_type(policy),  # type: ignore[arg-type]
        )
