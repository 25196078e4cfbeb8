"""What becomes of a classifier's answers behind the model: truer probabilities, and sets of labels with a coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.evaluation import conformal, scaling
from tunesmith.evaluation.conformal import Sets, chance
from tunesmith.evaluation.scaling import IntArray, Scaling
from tunesmith.recipe_evaluation import Conformal
from tunesmith.types import Prediction, Row

LEAST = float(np.finfo(np.float32).tiny)  # a probability below it is as good as none, and has no logarithm


@dataclass(frozen=True, slots=True)
class Calibration:
    """How probabilities are scaled, and which labels make a set; `rows` were what each of the two is fitted to."""

    labels: tuple[str, ...]
    scaling: Scaling | None
    sets: Sets | None
    rows: tuple[int, int]

    @classmethod
    def fit(
        cls,
        predictions: Sequence[Prediction],
        rows: Sequence[Row],
        calibrate: str | None,
        asked: Conformal | None,
        seed: int,
    ) -> Calibration:
        """Of answers to validation rows, of which the plan has seen that they can carry it (`preflight`).

        Those of a label that training never saw are left out for the scaling.
        """
        first, left = parts(len(predictions), calibrate is not None, asked is not None, seed)
        labels = tuple(predictions[0].probabilities or ())
        known = [predictions[i] for i in first if predictions[i].reference in labels]
        scaled: Scaling | None = None
        if calibrate is not None:
            scaled = scaling.fit(calibrate, _logprobs(known, labels), _places(known, labels))
        made = cls(labels, scaled, None, (len(known), 0))
        if asked is None:
            return made
        others = made.apply([predictions[i] for i in left], [rows[i] for i in left])
        told = [(p.probabilities or {}, p.reference or "", chance(rows[i])) for p, i in zip(others, left, strict=True)]
        return replace(made, sets=Sets.fit(told, asked.coverage, asked.sets), rows=(len(known), len(others)))

    def apply(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> list[Prediction]:
        """The answers to the rows with scaled probabilities and the likelihood that follows, and with their sets.

        By vector and isotonic scaling another label may be the most probable: it is the answer then.
        """
        found = list(predictions)
        if self.scaling is not None and found:
            shares_NV = self.scaling(_logprobs(found, self.labels))
            found = [self._scaled(p, shares) for p, shares in zip(found, shares_NV.tolist(), strict=True)]
        if self.sets is not None:
            parts = zip(found, map(chance, rows), strict=True)
            found = [replace(p, label_set=self.sets.of(p.probabilities or {}, own)) for p, own in parts]
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "labels": list(self.labels),
            "scaling": None if self.scaling is None else scaling.to_json(self.scaling),
            "sets": None if self.sets is None else conformal.to_json(self.sets),
            "rows": list(self.rows),
        }

    def _scaled(self, prediction: Prediction, shares: Sequence[float]) -> Prediction:
        probabilities = dict(zip(self.labels, shares, strict=True))
        best, output = max(shares), prediction.output
        if self.scaling is None or not (self.scaling.keeps_order or probabilities[output] == best):
            output = self.labels[shares.index(best)]
        scores = dict(prediction.scores)
        if "nll" in scores and prediction.reference in probabilities:
            scores["nll"] = -math.log(max(probabilities[prediction.reference], LEAST))
        return replace(prediction, output=output, probabilities=probabilities, scores=scores)


def parts(count: int, scaled: bool, sets: bool, seed: int) -> tuple[list[int], list[int]]:
    """Which of so many validation rows the scaling is fitted to, and which the sets.

    Where both are asked for, one half of the rows, drawn with the seed, is for each: sets keep their coverage only on
    rows that nothing else was fitted to.
    """
    order = np.random.default_rng(seed).permutation(count)
    half = count // 2 if scaled and sets else count if scaled else 0
    return sorted(order[:half].tolist()), sorted(order[half:].tolist())


def of_card(card: Mapping[str, Any]) -> Calibration | None:
    """That of a saved model, by its card; None where it has none."""
    told = card.get("calibration")
    if told is None:
        return None
    return Calibration(
        tuple(told["labels"]),
        told["scaling"] and scaling.from_json(told["scaling"]),
        told["sets"] and Sets(**told["sets"]),
        (int(told["rows"][0]), int(told["rows"][1])),
    )


def calibrated(predictions: list[Prediction], rows: Sequence[Row], card: Mapping[str, Any]) -> list[Prediction]:
    """The answers of a saved model as they are with what its card says of their probabilities."""
    calibration = of_card(card)
    return predictions if calibration is None else calibration.apply(predictions, rows)


def _logprobs(predictions: Sequence[Prediction], labels: Sequence[str]) -> Any:
    return scaling.table([p.probabilities or {} for p in predictions], labels, LEAST)


def _places(predictions: Sequence[Prediction], labels: Sequence[str]) -> IntArray:
    place = {label: at for at, label in enumerate(labels)}
    return np.array([place[p.reference or ""] for p in predictions], dtype=np.int64)
