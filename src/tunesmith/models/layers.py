"""What a model of transformers is made of, whatever its family: its stacks of layers, norms, biases and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_RATES = ("attention_dropout", "dropout", "dropout_prob", "activation_dropout")  # where a rate is a plain attribute


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of layers by name: one in a decoder or an encoder, two in an encoder-decoder, the encoder's first.

    They are the module lists that lie in no other one; experts and projections inside a layer are not among them.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    return found


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer by name, from the bottom of the model to its top."""
    return {f"{name}.{i}": layer for name, stack in stacks(model).items() for i, layer in enumerate(stack)}


def parameters_above(model: nn.Module) -> set[str]:
    """Parameters that are in no layer and are no embedding or output projection: final norms and the like."""
    inside = tuple(f"{name}." for name in stacks(model))
    vocabulary = {id(p) for module in _vocabulary(model) for p in module.parameters()}
    return {
        name
        for name, p in model.named_parameters()
        if not name.startswith(inside) and id(p) not in vocabulary and "embed" not in name and not _is_position(name)
    }


def norm_parameters(model: nn.Module) -> set[str]:
    """Parameters of normalisation layers, which transformers names so in every family."""
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, _ in module.named_parameters(recurse=False)
    }


def bias_parameters(model: nn.Module) -> set[str]:
    """Parameters called bias, those of norms included."""
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as files hold it: no tensor a stretch of a larger one (as on CUDA), tied ones still one."""
    made: dict[int, Tensor] = {}
    return {name: made.setdefault(value.data_ptr(), value.contiguous()) for name, value in model.state_dict().items()}


def set_dropout(model: nn.Module, rate: float) -> None:
    """Gives `rate` to whatever drops something out; what the model's config leaves at 0 stays so."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = rate
        for name in _RATES:
            if isinstance(getattr(module, name, None), float) and getattr(module, name) > 0:
                setattr(module, name, rate)


def _vocabulary(model: Any) -> Iterator[nn.Module]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield module


def _is_position(name: str) -> bool:
    """GPT-2 calls its tables wte and wpe."""
    return name.rpartition(".")[0].endswith(("wpe", "wte", "shared"))
