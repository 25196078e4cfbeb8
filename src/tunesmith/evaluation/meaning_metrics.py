"""How near texts are in meaning: the cosine of their vectors, by the catalog's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About, Bounds, FloatArray, MetricKind, quotient, reference_of
from tunesmith.types import AnswerKind, Prediction

if TYPE_CHECKING:
    from tunesmith.models.fetch import LocalModel

ENCODER = "all-minilm-l6-v2"
SCORE = "similarity"  # of a prediction
TOGETHER = 32  # texts that go through the encoder at once


@METRICS.register("similarity")
class Similarity:
    """Mean over rows of the cosine of the output's vector and the nearest reference's, by the catalog's
    all-minilm-l6-v2.

    The encoder is fetched when a recipe names this metric; of a text it reads the first 512 tokens. The record's
    signature names its weights. Kept answers keep their similarity.
    """

    of: ClassVar[tuple[AnswerKind, ...]] = ("text",)
    name: ClassVar[str] = "similarity"
    about: ClassVar[About] = About(
        "Reimers and Gurevych 2019, arXiv 1908.10084",
        "own, on transformers; sentence-transformers' published example",
        "English answers in free words, where another wording is as good; blind to a small word that turns the meaning",
    )
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[MetricKind] = "mean"
    bounds: ClassVar[Bounds] = (-1.0, 1.0)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        del labels

    @staticmethod
    def applies(predictions: Sequence[Prediction]) -> bool:
        return all(SCORE in p.scores for p in predictions)

    def prepare(self, predictions: Sequence[Prediction]) -> None:
        """Fetches the encoder; InputError naming a row that has no reference."""
        for prediction in predictions:
            reference_of(prediction, self.name)
        _local()

    def scored(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """The predictions with their similarities."""
        texts = list(dict.fromkeys(text for p in predictions for text in (p.output, *p.references)))
        vector_of = dict(zip(texts, vectors(texts), strict=True))
        nearest = [max(float(vector_of[p.output] @ vector_of[other]) for other in p.references) for p in predictions]
        return [replace(p, scores={**p.scores, SCORE: cosine}) for p, cosine in zip(predictions, nearest, strict=True)]

    def statistics(self, prediction: Prediction) -> tuple[float, ...]:
        if SCORE not in prediction.scores:
            raise InputError(
                f"{self.name} needs vectors of answers, and that to {prediction.where} was kept without",
                f"measure the run again with --metrics {self.name}, or leave it out",
            )
        return (prediction.scores[SCORE], 1.0)

    def aggregate(self, sums: FloatArray) -> FloatArray:
        return quotient(sums)

    def signature(self) -> str:
        return f"encoder:{ENCODER}|pooling:mean|weights:{_local().sha256[:12]}"


def vectors(texts: Sequence[str]) -> FloatArray:
    """[N, D] of length 1: the mean of a text's last hidden states."""
    import torch

    model, tokenizer, context = _encoder()
    ids = [tokenizer.encode(text, truncation=True, max_length=context) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
    found = np.zeros((len(texts), model.config.hidden_size))
    for start in range(0, len(order), TOGETHER):
        chosen = order[start : start + TOGETHER]
        mask_BT = torch.zeros((len(chosen), len(ids[chosen[0]])), dtype=torch.long)
        ids_BT = mask_BT.clone()
        for row, index in enumerate(chosen):
            ids_BT[row, : len(ids[index])] = torch.tensor(ids[index])
            mask_BT[row, : len(ids[index])] = 1
        with torch.no_grad():
            hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        mean_BD = (hidden_BTD * mask_BT[:, :, None]).sum(1) / mask_BT.sum(1, keepdim=True)
        found[chosen] = torch.nn.functional.normalize(mean_BD, dim=1).double().numpy()
    return found


@cache
def _local() -> LocalModel:
    from tunesmith.models.fetch import resolve

    return resolve(ENCODER)


@cache
def _encoder() -> tuple[Any, Any, int]:
    """The model, its tokenizer, and how many tokens it reads."""
    from tunesmith.models.load import context_length, load_backbone, load_tokenizer

    local = _local()
    model: Any = load_backbone(local, "fp32", "pooled")
    return model, load_tokenizer(local), context_length(model.config, local) or 512
