"""Where LoRA's factors start: in the base's own leading directions, or in those of what its layers read.

PiSSA and OLoRA take the start out of the base's weights, W - s B0 A0, and train B A from B0 A0. Here the base stays
as it is, to the bit, and a second adapter, which is frozen, takes the start out again: W + s (B A - B0 A0). That is
the same function with the same gradients, and as one adapter of twice the rank it stands on the base itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.errors import InputError
from tunesmith.methods.peft_adapter import TRAINED, hold, peft_speaks
from tunesmith.types import Batch, Want

if TYPE_CHECKING:
    from tunesmith.models.policy import Policy

START = "start"  # PEFT's name of the frozen adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXACT = 2048  # narrower layers have all their singular values computed, wider ones the leading ones by iteration
ITERATIONS = 16
KEPT = 64  # directions that EVA carries from batch to batch, or four times the rank if that is more

Factors = tuple[Tensor, Tensor]  # A [R, I], B [O, R]


def pissa(weight_OI: Tensor, rank: int, scaling: float) -> Factors:
    """The leading singular directions: s B A is the best W of that rank (Meng et al. 2024, 2404.02948, eq. 2-3)."""
    if min(weight_OI.shape) <= EXACT:
        left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        left_OR, values_R, right_IR = torch.svd_lowrank(weight_OI, q=2 * rank, niter=ITERATIONS)
        right_RI = right_IR.T
    root_R = (values_R[:rank] / scaling).sqrt()
    return root_R[:, None] * right_RI[:rank], left_OR[:, :rank] * root_R


def olora(weight_OI: Tensor, rank: int, scaling: float) -> Factors:
    """The first columns of Q and rows of R of W = Q R (Buyukakyuz 2024, 2406.01775, section 3)."""
    del scaling
    left_OR, right_RI = torch.linalg.qr(weight_OI)
    return right_RI[:rank], left_OR[:, :rank]


STARTS: dict[str, Callable[[Tensor, int, float], Factors]] = {"pissa": pissa, "olora": olora}


def offset(peft: Any, config: Any, factors: Callable[[Tensor, int, float], Factors] | None) -> None:
    """Adds the frozen adapter and starts both at `factors` of each layer's weight; None leaves them to be loaded."""
    config.lora_dropout = 0.0
    with peft_speaks():
        peft.add_adapter(START, config)
    hold(peft)
    for layer in lora_layers(peft, "starts in the base's weights"):
        down = layer.lora_A[TRAINED].weight
        weight_OI = _weight(layer)
        _check_rank(len(down), min(weight_OI.shape))
        if factors is None or down.is_meta:
            continue
        # Of values that bf16 holds, a copy in the frozen weights' precision is the same: B A - B0 A0 starts at 0.
        start_down, start_up = (f.bfloat16() for f in factors(weight_OI.float(), len(down), layer.scaling[TRAINED]))
        for name, sign in ((TRAINED, 1), (START, -1)):
            layer.lora_A[name].weight.data.copy_(start_down)
            layer.lora_B[name].weight.data.copy_(sign * start_up)


def join(peft: Any, folder: Path) -> None:
    """Makes of the saved adapter one of twice the rank that holds both."""
    held = dict(peft.named_parameters())
    both = {
        name: torch.cat([value, held[_of_start(name)].data.to(value)], _dimension(name)) if _is_factor(name) else value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file(both, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config["rank_pattern"] = {layer: 2 * rank for layer, rank in (config["rank_pattern"] or {}).items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def split(peft: Any, folder: Path) -> None:
    """Takes back the two adapters that `join` made one."""
    from peft import set_peft_model_state_dict

    held, trained = dict(peft.named_parameters()), load_file(folder / WEIGHTS)
    for name in filter(_is_factor, trained):
        trained[name], start = trained[name].chunk(2, _dimension(name))
        held[_of_start(name)].data.copy_(start)
    set_peft_model_state_dict(peft, trained, adapter_name=TRAINED)


@torch.no_grad()
def observe(policy: Policy, peft: Any, batches: Iterable[Batch]) -> None:
    """A becomes the leading right singular vectors of each layer's inputs over `batches`, which hold no padding.

    EVA (Paischer et al. 2024, 2410.07170, equation 2) with the same rank in every layer: B is 0 and the base's
    outputs are as they were. Vectors are carried from batch to batch (incremental SVD).
    """
    layers = list(lora_layers(peft, "starts in what its layers read"))
    seen = _Seen(4 * max(len(layer.lora_A[TRAINED].weight) for layer in layers))
    hooks = [layer.register_forward_pre_hook(seen) for layer in layers]
    training = policy.training
    policy.eval()
    try:
        for batch in batches:
            policy.score(place(batch, policy.device), Want(hidden=True))
            seen.last = None
    finally:
        policy.train(training)
        for hook in hooks:
            hook.remove()
    for layer in layers:
        down = layer.lora_A[TRAINED].weight
        rows_KI = seen.rows[id(layer)]
        _check_rank(len(down), min(rows_KI.shape))
        leading_RI = rows_KI[: len(down)]
        down.data.copy_(leading_RI / leading_RI.norm(dim=1, keepdim=True).clamp_min(1e-12))


class _Seen:
    """Hook: for each layer the leading directions of its inputs, each as long as its singular value."""

    def __init__(self, kept: int) -> None:
        self.kept = max(KEPT, kept)
        self.rows: dict[int, Tensor] = {}
        self.last: tuple[Tensor, Tensor | None, Tensor] | None = None  # projections of one input share the work

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        before = self.rows.get(id(layer))
        if self.last is None or self.last[0] is not inputs[0] or self.last[1] is not before:
            x_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).cpu().double()
            found = _leading(x_NI if before is None else torch.cat([before, x_NI]), self.kept)
            self.last = (inputs[0], before, found)
        self.rows[id(layer)] = self.last[2]


def _leading(x_NI: Tensor, count: int) -> Tensor:
    """The leading `count` rows of S V' of X = U S V', by the smaller of X X' and X' X."""
    if len(x_NI) <= x_NI.shape[1]:
        _, left_NK = torch.linalg.eigh(x_NI @ x_NI.T)
        return (left_NK.T @ x_NI).flip(0)[:count]
    values_I, right_II = torch.linalg.eigh(x_NI.T @ x_NI)
    return (values_I.clamp_min(0).sqrt()[:, None] * right_II.T).flip(0)[:count]


def lora_layers(peft: Any, what: str) -> Iterator[Any]:
    """The layers that hold the trained adapter. InputError where one is no linear layer."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    for name, layer in peft.named_modules():
        if isinstance(layer, LoraLayer):
            if not isinstance(layer, Linear):
                raise InputError(
                    f"method.init {what}, and {name} is no linear layer", "name linear layers in method.targets"
                )
            yield layer


def _weight(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


def _check_rank(rank: int, most: int) -> None:
    if rank > most:
        raise InputError(
            f"method.rank is {rank}, and only {most} directions are there to start in", f"set it to {most} or less"
        )


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _of_start(name: str) -> str:
    """The parameter of the frozen adapter beside one that is saved as `name`."""
    return name.removesuffix("weight") + f"{START}.weight"


def _dimension(name: str) -> int:
    """Where a factor's rank lies."""
    return 0 if ".lora_A." in name else 1
