"""Layers that no kernel of ours serves, compiled by torch: one set of graphs for all layers of a class.

Graphs serve any number of positions. They go through the attention of rows that are a dense batch, and stop at that of
others, which has backends of its own.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith import compat
from tunesmith.kernels import attention, cuda_attention

log = logging.getLogger("tunesmith.kernels")


def fuse(layer: nn.Module) -> None:
    """`layer` runs compiled where it learns; one that torch cannot compile runs as before, and the log says why."""
    cast(Any, layer).forward = MethodType(_compiled(type(layer)), layer)


class _Compiled:
    """The forward of a class of layers, which all its layers share."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self._kind = kind
        self._eager = kind.forward
        bare = inspect.unwrap(self._eager)
        self._recomputes = bare is not self._eager  # newer transformers recompute in the forward, older around it
        self._cut, self._whole = compat.compiled(bare), compat.compiled(_twin(bare))
        self._fails = False

    def __call__(self, layer: Any, *given: Any, **named: Any) -> Any:
        if self._fails or not _learns(given, named):
            return self._eager(layer, *given, **named)
        run = self._whole if _is_dense(given, named) else self._cut
        try:
            if self._recomputes and layer.training and getattr(layer, "gradient_checkpointing", False):
                return layer._gradient_checkpointing_func(partial(run, layer, **named), *given)
            return run(layer, *given, **named)
        except compat.compiler_errors() as error:
            self._fails = True
            log.warning("%s is not compiled: %s", self._kind.__name__, str(error).strip().splitlines()[0])
            return self._eager(layer, *given, **named)


def _twin(function: Any) -> Any:
    """The same function over code of its own: torch keeps graphs by code, and which runs hangs on no earlier rows."""
    code, defaults, closure = function.__code__.replace(), function.__defaults__, function.__closure__
    twin = FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _hidden(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return given[0] if given else named.get("hidden_states")


def _is_dense(given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a graph may go through attention, which is told so: rows of one length, of those that come again."""
    bounds = named.get(attention.KEYWORD)
    if bounds is None or bounds.shared or bounds.before is not None:
        return False
    length = cuda_attention.alike(bounds, _hidden(given, named).shape[1])
    bounds.alike = length if cuda_attention.comes_again(length) else 0
    bounds.calls += bounds.alike > 0  # inside a graph nobody counts
    return bounds.alike > 0


def _learns(given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether gradients go through to what is below: else a graph of its own would be compiled for few layers' sake."""
    hidden = _hidden(given, named)
    inside = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
    return inside and named.get("past_key_values") is None


@cache
def _compiled(kind: type[nn.Module]) -> _Compiled:
    attention.keep_outside_graphs()
    return _Compiled(kind)
