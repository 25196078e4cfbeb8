"""A pre-norm decoder layer as two functions around its attention, on bordered weights and row kernels.

Served: x + attention(norm(x)), then x + swiglu(norm(x)), with rotary positions, no biases, frozen weights
and LoRA (Llama, Mistral, SmolLM2 and whatever computes the same; tried on random input before it is taken).
What is kept for the backward is chosen here: nothing is computed twice but the norms' rates, and where memory is short
the feed-forward half (`FastLayer.again`): of a Llama-3.1-8B it keeps 111 of a layer's 148 KB a token, and making it
again costs a third of a forward's products less than the whole layer, attention and the last product among them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.errors import RefusedError
from tunesmith.kernels import cuda_attention
from tunesmith.kernels.attention import KEYWORD, Bounds, segment_attention
from tunesmith.kernels.bordered import Bordered, BorderedFp8, BorderedNf4, adapters_in_use, base_of, drops, is_plain
from tunesmith.kernels.nf4 import Nf4Linear
from tunesmith.kernels.rows import Rows, hand_on, in_rows, taken_over

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class FastLayer:
    """The bordered weights of one layer, and the sizes its functions need.

    again: what its feed-forward half keeps is made again in the backward.
    """

    again = False

    def __init__(self, layer: Any, *, fp8: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        kind = BorderedNf4 if type(base_of(attention.q_proj)) is Nf4Linear else BorderedFp8 if fp8 else Bordered
        self.qkv = kind([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = kind([attention.o_proj])
        self.gate_up = kind([mlp.gate_proj, mlp.up_proj])
        self.down = kind([mlp.down_proj])
        self.width = int(attention.head_dim)
        self.heads = base_of(attention.q_proj).out_features // self.width
        self.key_heads = base_of(attention.k_proj).out_features // self.width
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.fp8 = fp8
        linears = [linear for weight in self.weights for linear in weight.linears if hasattr(linear, "lora_A")]
        self._in_use = [(linear, adapters_in_use(linear)) for linear in linears]
        self._dropouts = [linear.lora_dropout[name] for linear, names in self._in_use for name in names]

    @cached_property
    def refresh(self) -> Callable[[], None]:
        """Copies the adapters into the borders when called."""
        from tunesmith.kernels import triton_entries

        entries = [entry for weight in self.weights for entry in weight.entries]
        return triton_entries.Entering(entries) if triton_entries.serves(entries) else self._refresh_each

    def _refresh_each(self) -> None:
        for weight in self.weights:
            weight.refresh()

    @property
    def weights(self) -> tuple[Bordered, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def norm(self, index: int) -> tuple[Tensor, float]:
        module = self.norms[index]
        return module.weight, float(module.variance_epsilon)

    def still_serves(self) -> bool:
        """Whether the adapters that were in use when this was built are, and no others, and none drops out now."""
        return all(_uses(linear, names) for linear, names in self._in_use) and not any(map(drops, self._dropouts))


def _uses(linear: Any, names: list[str]) -> bool:
    """Whether these are the adapters in use; asked at each call, so without a look at what cannot change."""
    if not names:
        return not adapters_in_use(linear)
    return linear.active_adapters == names and not (linear.disable_adapters or linear.merged)


class _Project(torch.autograd.Function):
    """x [N, D] -> rotated queries, keys and values [heads, N', width], and x itself.

    N' >= N: attention may want more rows than there are; the rest is zeros. x comes out again so that the
    gradient of the residual path comes in here, where it is added without another pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, cos_ND: Tensor, sin_ND: Tensor, fast: FastLayer, padded: int, *_: Tensor
    ) -> Any:
        from tunesmith.kernels import triton_rows as rows

        count, width = x_ND.shape[0], fast.width
        weight_D, epsilon = fast.norm(0)
        normed = Rows.empty(count, fast.qkv.inputs + fast.qkv.border, x_ND, fast.fp8)
        rows.normalise(x_ND, weight_D, epsilon, normed)
        qkv_NX = x_ND.new_empty(padded, fast.qkv.outputs)
        qkv_NX[count:].zero_()
        fast.qkv.project(normed, out=qkv_NX[:count])
        rows.rotate(qkv_NX, cos_ND, sin_ND, fast.heads + fast.key_heads, width)
        normed.cast_NW = None
        ctx.save_for_backward(x_ND, cos_ND, sin_ND, normed.wide_NW)
        ctx.fast = fast
        heads = qkv_NX.view(padded, -1, width).transpose(0, 1)
        return *heads.split((fast.heads, fast.key_heads, fast.key_heads)), x_ND.view_as(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from tunesmith.kernels import triton_rows as rows

        fast: FastLayer = ctx.fast
        x_ND, cos_ND, sin_ND, wide_NW = ctx.saved_tensors
        normed = Rows(wide_NW)
        grad = Rows.empty(x_ND.shape[0], fast.qkv.outputs + fast.qkv.border, x_ND, fast.fp8)
        rows.rotate_backward((grads[0], grads[1], grads[2]), cos_ND, sin_ND, grad, fast.width)
        found = fast.qkv.gradients(grad, normed)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            weight_D, epsilon = fast.norm(0)
            out = Rows.empty(x_ND.shape[0], x_ND.shape[1] + fast.down.border, x_ND, False)
            rows.normalise_backward(fast.qkv.back(grad), x_ND, weight_D, epsilon, in_rows(grads[3]), out)
            grad_x = hand_on(out, x_ND.shape[1])  # to the layer below, whose border is most likely the same
        return grad_x, None, None, None, None, *found


@dataclass(slots=True)
class _Fed:
    """What the feed-forward half computes before its last product."""

    middle_ND: Tensor  # the residual stream between the halves
    gate_up_NX: Tensor
    mixed: Rows  # inputs of its three weights
    normed: Rows
    product: Rows

    @staticmethod
    def of(mixed_NX: Tensor, x_ND: Tensor, fast: FastLayer, copy_ND: Tensor | None = None) -> _Fed:
        from tunesmith.kernels import triton_rows as rows
        from tunesmith.kernels import triton_swiglu

        count = x_ND.shape[0]

        def empty(weight: Bordered) -> Rows:
            return Rows.empty(count, weight.inputs + weight.border, x_ND, fast.fp8)

        mixed = empty(fast.o)
        rows.lay(mixed_NX[:count], mixed)
        weight_D, epsilon = fast.norm(1)
        normed = empty(fast.gate_up)
        middle_ND = rows.normalise(x_ND, weight_D, epsilon, normed, fast.o.project(mixed), copy_ND)
        assert middle_ND is not None
        gate_up_NX = fast.gate_up.project(normed)
        product = empty(fast.down)
        triton_swiglu.swiglu(gate_up_NX, product)
        return _Fed(middle_ND, gate_up_NX, mixed, normed, product)


class _Feed(torch.autograd.Function):
    """attention's result [N', heads * width] and x [N, D] -> the layer's result [N, D]."""

    @staticmethod
    def forward(ctx: Any, mixed_NX: Tensor, x_ND: Tensor, fast: FastLayer, *_: Tensor) -> Tensor:
        out_ND = None if fast.fp8 else torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        fed = _Fed.of(mixed_NX, x_ND, fast, copy_ND=out_ND)
        if out_ND is None:
            out_ND = fast.down.project(fed.product).add_(fed.middle_ND)
        else:
            fast.down.project_onto(out_ND, fed.product)
        ctx.fast, ctx.padded, ctx.again = fast, mixed_NX.shape[0], fast.again
        if ctx.again:
            ctx.save_for_backward(mixed_NX, x_ND)
        else:
            kept = fed.mixed.wide_NW, fed.normed.wide_NW, fed.product.wide_NW
            ctx.save_for_backward(fed.middle_ND, fed.gate_up_NX, *kept)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from tunesmith.kernels import triton_rows as rows
        from tunesmith.kernels import triton_swiglu

        fast: FastLayer = ctx.fast
        if ctx.again:
            mixed_NX, x_ND = ctx.saved_tensors
            fed = _Fed.of(mixed_NX, x_ND, fast)
            fast.down.border_in(fed.product)
        else:
            middle_ND, gate_up_NX, *wides = ctx.saved_tensors
            mixed, normed, product = (Rows(wide) for wide in wides)
            fed = _Fed(middle_ND, gate_up_NX, mixed, normed, product)
        middle_ND = fed.middle_ND
        count = middle_ND.shape[0]

        def empty(weight: Bordered) -> Rows:
            return Rows.empty(count, weight.outputs + weight.border, middle_ND, fast.fp8)

        grad_ND = in_rows(grads[0])
        grad = None if fast.fp8 else taken_over(grad_ND, fast.down.border)
        if grad is None:
            grad = empty(fast.down)
            rows.lay(grad_ND, grad)
        of_down = fast.down.gradients(grad, fed.product)
        del fed.product
        halves = empty(fast.gate_up)
        triton_swiglu.swiglu_backward(fast.down.back(grad), fed.gate_up_NX, halves)
        del grad
        of_gate_up = fast.gate_up.gradients(halves, fed.normed)
        weight_D, epsilon = fast.norm(1)
        middle = empty(fast.o)
        rows.normalise_backward(fast.gate_up.back(halves), middle_ND, weight_D, epsilon, grad_ND, middle)
        del halves
        of_o = fast.o.gradients(middle, fed.mixed)
        grad_mixed = middle_ND.new_empty(ctx.padded, fast.o.inputs)
        grad_mixed[count:].zero_()
        fast.o.back(middle, out=grad_mixed[:count])
        return grad_mixed, middle.wide_NW[:, : middle_ND.shape[1]], None, *of_o, *of_gate_up, *of_down


def drops_out(layer: nn.Module) -> bool:
    """Whether adapters of the layer drop out in training, when it runs by its own forward."""
    adapted: Any = [module for module in layer.modules() if hasattr(module, "lora_dropout")]
    return any(getattr(dropout, "p", 0.0) > 0 for module in adapted for dropout in module.lora_dropout.values())


def fuse(layer: nn.Module, *, fp8: bool) -> bool:
    """Puts the fast functions in place of the forward of a decoder layer that they serve; False for any other.

    Seen at each call and left to the layer's own forward: a cache, a mask, several rows, dropout, adapters
    that are switched off. Raises RefusedError for a layer whose weights are in fp8 and whose result is another.
    """
    served: Any = layer
    if isinstance(getattr(served, "fast", None), FastLayer):
        return True
    if not _is_built_as_served(layer):
        return False
    with torch.no_grad(), _measured(layer):
        inputs = _sample(served)
        served.fast = FastLayer(layer, fp8=fp8)
        expected = type(served).forward(served, **inputs)  # on the same weights: what rounds them is not judged here
        found = _forward(served, **inputs)
    added, wanted = (found - inputs["hidden_states"]).float(), (expected - inputs["hidden_states"]).float()
    error = float((added - wanted).norm() / wanted.norm())
    if error < (0.15 if fp8 else 0.05):
        served.forward = MethodType(_forward, layer)
        return True
    del served.fast
    if fp8:
        raise RefusedError(
            f"{type(layer).__name__} in fp8 gives another result (relative error {error:.2g})", "set precision to bf16"
        )
    return False


@contextmanager
def _measured(layer: nn.Module) -> Generator[None]:
    """Inside, nothing of the layer drops out."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _sample(layer: Any) -> dict[str, Any]:
    """Random input of a layer's forward: one segment, so small that what the layer adds is not lost in rounding."""
    weight = layer.input_layernorm.weight
    noise = torch.Generator(weight.device).manual_seed(0)
    x_1TD = 0.02 * torch.randn(1, 64, len(weight), generator=noise, device=weight.device)
    angle_1TD = torch.arange(64, device=weight.device)[None, :, None] * torch.linspace(
        0.01, 1.0, layer.self_attn.head_dim // 2, device=weight.device
    ).repeat(2)
    positions = angle_1TD.cos().to(weight.dtype), angle_1TD.sin().to(weight.dtype)
    return {"hidden_states": x_1TD.to(weight.dtype), "position_embeddings": positions, KEYWORD: Bounds([[(0, 64)]])}


def _is_built_as_served(layer: Any) -> bool:
    from torch.nn import SiLU
    from transformers.activations import SiLUActivation

    children = {name for name, _ in layer.named_children()}
    if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    names = {name for name, _ in attention.named_children()}, {name for name, _ in mlp.named_children()} - {"act_fn"}
    if names != (set(ATTENTION), set(MLP)) or not isinstance(getattr(mlp, "act_fn", None), SiLU | SiLUActivation):
        return False
    linears = [getattr(attention, name) for name in ATTENTION] + [getattr(mlp, name) for name in MLP]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(_is_frozen_linear(linear) for linear in linears)
        and len({type(base_of(linear)) for linear in linears}) == 1
        and all(isinstance(getattr(norm, "variance_epsilon", None), float) for norm in norms)
        and not any(norm.weight.requires_grad for norm in norms)
        and _is_power_of_two(int(attention.head_dim))
        and base_of(attention.q_proj).in_features % 16 == 0
        and base_of(mlp.down_proj).in_features % 16 == 0
    )


def _is_frozen_linear(linear: Any) -> bool:
    from peft.tuners.lora.layer import Linear as PeftLinear

    base = base_of(linear)
    if getattr(base, "bias", None) is not None:
        return False
    if type(base) is Nf4Linear:
        half = base.dtype == torch.bfloat16
    else:
        half = type(base) is nn.Linear and not base.weight.requires_grad and base.weight.dtype == torch.bfloat16
    if not half:
        return False
    return linear is base or (type(linear) is PeftLinear and not linear.fan_in_fan_out and _is_served(linear))


def _is_served(linear: Any) -> bool:
    """Dropout is seen at each call; here it is enough that nothing else is in the way."""
    return bool(linear.active_adapters) and all(is_plain(linear, name) for name in linear.active_adapters)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _forward(self: Any, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
    bounds = keywords.get(KEYWORD)
    positions = keywords.get("position_embeddings")
    plain = (
        isinstance(bounds, Bounds)
        and bounds.before is None
        and positions is not None
        and not args
        and keywords.get("past_key_values") is None
        and keywords.get("attention_mask") is None
        and hidden_states.is_cuda
        and hidden_states.dtype == torch.bfloat16
        and hidden_states.shape[0] == 1
        and not (self.training and self.self_attn.attention_dropout)
        and positions[0].shape[-1] == self.fast.width
    )
    if not plain or not self.fast.still_serves():
        return type(self).forward(self, hidden_states, *args, **keywords)
    run = partial(_run, self, bounds=cast(Bounds, bounds), positions=cast(Any, positions))
    recompute = getattr(self, "gradient_checkpointing", False) and self.training and torch.is_grad_enabled()
    # Newer transformers recompute inside the class's own forward, which is not called here; older around it.
    if recompute and hasattr(type(self).forward, "__wrapped__"):
        return self._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def _run(self: Any, hidden_states: Tensor, bounds: Bounds, positions: tuple[Tensor, Tensor]) -> Tensor:
    fast: FastLayer = self.fast
    attention = self.self_attn
    bounds.calls += 1
    fast.refresh()
    look = cuda_attention.Look.of(attention, bounds, hidden_states.shape[1])
    project, feed = (cast(Callable[..., Any], f.apply) for f in (_Project, _Feed))
    with torch.autocast("cuda", enabled=False):
        cos_ND, sin_ND = (angle.squeeze(0).to(torch.bfloat16) for angle in positions)
        features = fast.heads * fast.width
        padded = cuda_attention.padded_length(look, features)
        # squeeze and not [0], whose gradient would be copied into zeros.
        q, k, v, x_ND = project(hidden_states.squeeze(0), cos_ND, sin_ND, fast, padded, *fast.qkv.parameters)
        if cuda_attention.backend(look, features, torch.bfloat16) in ("padded", "each"):
            window = getattr(attention, "sliding_window", None)
            options: dict[str, Any] = {KEYWORD: bounds, "scaling": look.scaling, "sliding_window": window}
            mixed_1THD = segment_attention(attention, q[None], k[None], v[None], None, **options)[0]
        else:
            mixed_1THD = cuda_attention.attend(q[None], k[None], v[None], look)
        trained = [p for weight in (fast.o, fast.gate_up, fast.down) for p in weight.parameters]
        return feed(mixed_1THD.reshape(padded, -1), x_ND, fast, *trained)[None]
