"""A run's model, or an exported one, loaded to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import session
from tunesmith.data.corpus import open_corpus
from tunesmith.data.given import PathLike, Rows, check_kinds, to_answer
from tunesmith.engine.precision import choose_device
from tunesmith.errors import InputError
from tunesmith.evaluation.calibrated import calibrated, of_card
from tunesmith.measurable import run_of
from tunesmith.models.cache import cache_dir
from tunesmith.models.drawing import of_card as drawn_of
from tunesmith.models.policy import Policy
from tunesmith.models.saved import folder_of
from tunesmith.protocols import Converses, Method, Objective, Searches
from tunesmith.recipe import CorpusFile
from tunesmith.recipe_file import load_recipe, parse_corpus
from tunesmith.types import Prediction, Row

Passages = PathLike | Mapping[str, Any]  # a file that is searched, or its path and the names of its columns


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run's model, ready to answer."""

    policy: Policy
    objective: Objective
    method: Method
    renderer: Any
    card: dict[str, Any]

    @property
    def gives_sets(self) -> bool:
        """Whether answers come with a set of labels."""
        calibration = of_card(self.card)
        return calibration is not None and calibration.sets is not None

    def predict(self, rows: PathLike | Rows, max_new_tokens: int | None = None) -> list[Prediction]:
        """Answers to rows of a file or in memory, in their order; labels and answers in them are optional."""
        return self._predict(self._asked(rows), max_new_tokens)

    def answered(
        self, rows: PathLike | Rows, max_new_tokens: int | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows with the model's answers in place of their own, for another model to learn from.

        (Sequence-level distillation: Kim and Rush 2016, arXiv 1606.07947.) Rows whose answer was cut off are left out;
        where they stand comes beside. Raises InputError where the model answers no conversations.
        """
        if not isinstance(self.objective, Converses):
            raise InputError(
                "rows to train on are made of answers to conversations, and a model for "
                f"{self.card['objective']['name']} gives none",
                "use a model for sft",
            )
        asked = self._asked(rows)
        answered = list(zip(asked, self._predict(asked, max_new_tokens), strict=True))
        made = [
            {**_asked_with(row), "messages": [*_question(row), {"role": "assistant", "content": answer.output}]}
            for row, answer in answered
            if answer.finished
        ]
        return made, [row.where for row, answer in answered if not answer.finished]

    def _asked(self, rows: PathLike | Rows) -> list[Row]:
        asked = to_answer(rows, self.card.get("columns", {}), self.card.get("format"))
        check_kinds(asked, self.objective.needs, asking=True)
        return asked

    def _predict(self, asked: list[Row], max_new_tokens: int | None) -> list[Prediction]:
        spec, _ = drawn_of(self.card).specs(max_new_tokens or int(self.card["max_new_tokens"]))
        return calibrated(self.objective.predict(self.policy, asked, self.renderer, spec), asked, self.card)


def load(path: PathLike, device: str = "auto", corpus: Passages | None = None) -> Loaded:
    """The model of a run (or an exported model folder), ready to predict.

    `corpus`: the passages that a model which searches is asked for: a path, or `{"path": ..., "columns": ...}` as in
    a recipe, whose own names of columns hold for a path alone. Left out, those of the run's recipe, if it has any.
    Raises InputError where there is no model (yet), RefusedError where its base has other bytes than at training.
    """
    loaded = Loaded(*session.load(folder_of(Path(path)), str(choose_device(device))))
    if isinstance(loaded.objective, Searches):
        asked = _corpus(run_of(Path(path)), corpus)
        if asked is not None:
            loaded.objective.search_in(open_corpus(asked, Path.cwd(), cache_dir(), _silent))
    elif corpus is not None:
        raise InputError(
            f"--corpus is given, and a model for {loaded.card['objective']['name']} searches nothing", "leave it out"
        )
    return loaded


def _asked_with(row: Row) -> dict[str, Any]:
    """What a row has beside its messages and its own answers."""
    return {key: value for key, value in row.value.items() if key not in ("messages", "other_answers")}


def _question(row: Row) -> list[dict[str, Any]]:
    messages = row.value["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _corpus(run: Path, given: Passages | None) -> CorpusFile | None:
    """What is searched: what was given, a path alone read by the recipe's names of its columns, or the recipe's."""
    if isinstance(given, Mapping):
        return parse_corpus(given)
    recipe = run / "recipe.yaml"
    own = load_recipe(recipe)[0].data.corpus if recipe.is_file() else None
    if given is None:
        return own
    return CorpusFile(path=str(given), columns=own.columns if own is not None else {})


def _silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
