"""Continued pre-training: the negative log-likelihood of every token of plain text, document by document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.declared import ObjectiveNeeds
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.sft import Likelihood, Sft
from tunesmith.types import WINDOW, Example, Piece, Row

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer


@OBJECTIVES.register("pretrain")
class Pretrain(Sft):
    """loss = - sum_t log p(x_t | x_<t) / T, where x_<t reaches back to the beginning of the window or document.

    A document longer than train.sequence_length is read in windows of that length; no token sees another document.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="go on learning the language of plain text: a domain, a style, another language",
        head="lm",
        formats=frozenset({"text"}),
        kinds=frozenset({"decoder"}),
        coupling="token",
        trains_tokens=True,
        windows=True,
        metrics=("loss", "perplexity", "bits_per_byte"),
    )

    Options: ClassVar[type[Any]] = Likelihood

    def fit(self, rows: Iterable[Row]) -> None:
        del rows

    def describe(self) -> dict[str, Any]:
        return {}

    def adopt(self, description: Mapping[str, Any]) -> None:
        del description

    def example(self, row: Row, renderer: Renderer) -> Example:
        windows = renderer.windows(row.value["text"])
        pieces = tuple(Piece(window.input_ids, window.weights, WINDOW) for window in windows)
        return Example(pieces, self.columns(row))
