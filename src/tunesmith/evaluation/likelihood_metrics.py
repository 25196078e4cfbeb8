"""Metrics of likelihood: what the reference, or a text, costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient
from tunesmith.types import AnswerKind, Prediction


def has_likelihoods(predictions: Sequence[Prediction]) -> bool:
    return all("nll" in p.scores and "tokens" in p.scores for p in predictions)


@METRICS.register("loss")
class Loss:
    """Nats per trained token over all rows: the sum of `nll` by the sum of `tokens`."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text", "label", "number", "passages", "choices")
    name: ClassVar[str] = "loss"
    about: ClassVar[About] = About(
        "cross-entropy, in nats",
        "own",
        "the same model and tokenizer before and after; what training minimises",
    )
    applies = staticmethod(has_likelihoods)
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[MetricKind] = "ratio"
    bounds: ClassVar[Bounds] = (0.0, float("inf"))

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        missing = [key for key in ("nll", "tokens") if key not in prediction.scores]
        if missing:
            raise InputError(
                f"{self.name} needs the score {missing[0]!r}, and {prediction.where} has none",
                f"leave {self.name} out of evaluate.metrics: this objective's predictions carry no likelihood",
            )
        return (float(prediction.scores["nll"]), float(prediction.scores["tokens"]))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)


@METRICS.register("bits_per_byte")
class BitsPerByte(Loss):
    """Bits that a byte of UTF-8 text costs: unlike the loss, the same unit whatever the tokenizer."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "bits_per_byte"
    about: ClassVar[About] = About(
        "Gao et al. 2020, arXiv 2101.00027",
        "own",
        "language models with different tokenizers on the same text",
    )

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return all("bytes" in prediction.scores for prediction in predictions)

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        nats, _ = super().statistics(prediction)
        if "bytes" not in prediction.scores:
            raise InputError(
                f"{self.name} needs the bytes of a text, and {prediction.where} is none",
                f"leave {self.name} out of evaluate.metrics, or measure plain text",
            )
        return (nats / np.log(2), float(prediction.scores["bytes"]))


@METRICS.register("perplexity")
class Perplexity(Loss):
    """exp of the loss."""

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "perplexity"
    about: ClassVar[About] = About(
        "Jelinek et al. 1977, J. Acoust. Soc. Am. 62(S1)",
        "own",
        "the loss as others publish it; only between models of one tokenizer",
    )
    tested_as: ClassVar[str] = "loss"
    bounds: ClassVar[Bounds] = (1.0, float("inf"))

    def aggregate(self, sums: FloatArray) -> FloatArray:
        # Above 709 nats exp overflows to infinity, which is then refused as any other non-finite value.
        with np.errstate(over="ignore"):
            return np.exp(super().aggregate(sums))
