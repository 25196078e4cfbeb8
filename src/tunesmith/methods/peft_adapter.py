"""What adapters of PEFT share: attached in place, switched off for the base, saved as a folder that PEFT loads."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.compat import quiet_transformers
from tunesmith.errors import InputError
from tunesmith.kernels.nf4 import give_back
from tunesmith.models.policy import Policy
from tunesmith.recipe_keys import Positive, Strict

if TYPE_CHECKING:
    from peft import PeftConfig


TRAINED, BENEATH = "default", "beneath"  # PEFT's names of the adapter that trains, and of those that it stands on
Names = Annotated[list[str], Field(min_length=1)]
Targets = Literal["all-linear"] | Names


class LowRankOptions(Strict):
    """What adapters of low rank have in common."""

    rank: Positive = Field(
        16,
        description="width of the update",
        json_schema_extra={"source": "LoRA's: ranks of 4 to 64 differ little (Hu et al. 2021, table 6)"},
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the update is scaled by alpha / rank; twice the rank if left out"
    )
    targets: Targets = Field(
        "all-linear",
        description="linear layers by name, or all-linear",
        json_schema_extra={"source": "LoRA's: on all layers it matches full (Dettmers et al. 2023, figure 2)"},
    )

    @property
    def implied(self) -> dict[str, tuple[float, str]]:
        """What an option that is left out comes to, and why."""
        return {"alpha": (self.scale, "twice the rank")}

    @property
    def scale(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class PeftAdapter(ABC):
    """A method whose parameters PEFT puts into the layers of a model. A subclass gives the configuration.

    `merges_last_first`: in which order adapters in use go into a weight, so that it does what they do one by one.
    """

    merges_last_first: ClassVar[bool] = False

    def __init__(self, options: Any, dropout: float) -> None:
        self.options = options
        self.dropout = dropout
        self._peft: Any = None

    @abstractmethod
    def config(self, policy: Policy) -> PeftConfig:
        """PEFT's configuration for this model."""

    def attach(self, policy: Policy) -> None:
        from peft import get_peft_model

        self._check_names(policy)
        linear = ", ".join(linear_names(policy.model))
        with peft_speaks():
            try:
                self._peft = get_peft_model(policy.model, self.config(policy))
            except (ValueError, TypeError) as error:  # each of PEFT's methods has its own for a layer it cannot train
                raise InputError(
                    f"this method cannot train a layer of {type(policy.model).__name__}: {_first_sentence(error)}",
                    f"name others in method.targets ({linear}), or choose another method: lora takes the most kinds",
                ) from error

    def _check_names(self, policy: Policy) -> None:
        """PEFT asks that one of the targets is there, and would pass over the others."""
        if any(p.ndim > 2 for p in policy.model.parameters()):
            return  # stacks of experts, whose layers PEFT knows by the names that checkpoints have
        known = [name for name, _ in policy.model.named_modules()]
        for key in ("targets", "feedforward"):
            named = getattr(self.options, key, None)
            for target in named if isinstance(named, list) else ():
                if not any(name == target or name.endswith(f".{target}") for name in known):
                    raise InputError(
                        f"method.{key}: {type(policy.model).__name__} has no layer {target!r}",
                        f"use all-linear, or some of: {', '.join(linear_names(policy.model))}",
                    )

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    def stand_on(self, policy: Policy, folders: Sequence[Path]) -> None:
        for place, folder in enumerate(folders, 1):
            with peft_speaks():
                self._peft.load_adapter(str(folder), f"{BENEATH}{place}", torch_device=str(policy.device))
        hold(self._peft)

    @contextmanager
    def reference(self, policy: Policy) -> Generator[None]:
        with self._peft.disable_adapter():
            yield
        hold(self._peft)

    def export(self, policy: Policy, to: Path) -> None:
        """A folder for `peft.PeftModel.from_pretrained`, its bytes the same whichever process writes it."""
        for config in self._peft.peft_config.values():
            if isinstance(config.target_modules, set):  # in an order that each process draws anew
                config.target_modules = sorted(config.target_modules)
        with peft_speaks():
            self._peft.save_pretrained(to, save_embedding_layers=False, selected_adapters=[TRAINED])
        (to / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours comes when the model is measured

    def merge(self, policy: Policy) -> None:
        give_back(policy.model)  # a base in 4 bits takes no update: it goes into the weights that those bits stand for
        with peft_speaks():
            names = self._peft.base_model.active_adapters[::-1] if self.merges_last_first else None
            policy.model = self._peft.merge_and_unload(adapter_names=names)

    def load(self, policy: Policy, source: Path) -> None:
        from peft import PeftModel

        with peft_speaks():
            self._peft = PeftModel.from_pretrained(policy.model, str(source), is_trainable=True)


def hold(peft: Any) -> None:
    """All adapters in use, the trained one last, and the others frozen: PEFT thaws whatever it switches on."""
    others = [name for name in peft.peft_config if name != TRAINED]
    if not others:
        return
    peft.base_model.set_adapter([*others, TRAINED])
    for name, parameter in peft.named_parameters():
        if not set(name.split(".")).isdisjoint(others):
            parameter.requires_grad_(False)


@contextmanager
def peft_speaks() -> Generator[None]:
    """Without what PEFT says of experts, of a rank of 0, and of blocks that do not fit."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")  # of AdaLoRA's rank 0
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # which OFT refuses in words of its own
        yield


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0].rstrip("(")


def task_type(policy: Policy) -> str:
    """PEFT's word for what the model does; it has none for filling masks."""
    if policy.kind == "encoder" or policy.model.get_output_embeddings() is None:
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if policy.kind == "encoder-decoder" else "CAUSAL_LM"


def has_transposed_linears(policy: Policy) -> bool:
    """GPT-2's linear layers keep their weights the other way round."""
    return any(type(module).__name__ == "Conv1D" for module in policy.model.modules())


def token_rows(policy: Policy) -> dict[str, list[int]]:
    """The rows of added tokens in the embeddings, and in the output projection where that has weights of its own."""
    model, added = policy.model, sorted(set(policy.tokens.added))
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(output, "bias", None) is not None:  # PEFT's layer for its rows leaves a bias out
        raise InputError(
            f"method.tokens: the output projection of {type(model).__name__} has a bias", "choose another base"
        )
    tied = output is None or output.weight is embeddings.weight
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: added for module in ([embeddings] if tied else [embeddings, output])}


def linear_layers(model: Any) -> list[str]:
    """The linear layers by full name, GPT-2's among them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def linear_names(model: Any) -> list[str]:
    """The short names of a model's linear layers."""
    return sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
