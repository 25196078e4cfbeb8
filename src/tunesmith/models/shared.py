"""One base's weights under several trees of modules, so that each adapter has a model and all have one base."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from tunesmith.errors import InputError, RefusedError
from tunesmith.models.fetch import LocalModel
from tunesmith.models.load import Dtype, Head, load_backbone


class SharedBase:
    """A base loaded once, its linear layers in 4 bits if `in_nf4`.

    `head` is the widest that any of its models will have: "lm" serves "pooled" too.
    """

    def __init__(self, local: LocalModel, dtype: Dtype, head: Head, device: str, *, in_nf4: bool = False) -> None:
        self.local, self.dtype, self.head = local, dtype, head
        self._model: Any = load_backbone(local, dtype, head, device, in_nf4=in_nf4)
        self._placed = [(p, p.data) for p in self._model.parameters()]

    def model(self, head: Head) -> Any:
        """Modules of their own over the weights that all share: what is put into them is in no other model."""
        if head == "lm" and self.head != head:
            raise InputError(
                f"{self.local.name} was loaded without the output projection that an adapter needs to generate",
                "load an adapter that generates among the first",
            )
        whole = self._model
        chosen = whole if head == self.head else whole.base_model
        if head != self.head and chosen is whole:
            raise InputError(
                f"a {type(whole).__name__} cannot be taken apart into its output projection and what is below",
                "load adapters that generate and adapters that label apart from each other",
            )
        tensors = chain(whole.parameters(), whole.buffers())
        return copy.deepcopy(chosen, {id(tensor): tensor for tensor in tensors})

    def check(self, what: str) -> None:
        """RefusedError where `what` has put other weights in the place of the base's own, which are put back."""
        moved = [(p, data) for p, data in self._placed if p.data_ptr() != data.data_ptr()]
        for parameter, data in moved:
            parameter.data = data
        if moved:
            raise RefusedError(
                f"{what} changes {len(moved)} of the base's own weights, which other adapters share",
                "load it by itself",
            )
