"""What a text classifier has to beat: TF-IDF and a linear model of scikit-learn, tuned on the validation rows.

Every choice (n-grams, regularisation, class weights, the threshold of label sets) is the one that does best on the
validation rows by the measure that is reported; the test rows are seen once, by that one. It learns from the rows that
the tuned model learned from: those of train that stand in the test set too are left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import MultiLabelBinarizer

from tunesmith.data.checks import row_keys
from tunesmith.evaluation.answers import Answered
from tunesmith.types import Prediction

Rows = Sequence[Mapping[str, Any]]
Found = tuple[list[Prediction], dict[str, Any]]
Fitted = tuple[float, dict[str, Any], Any]  # its measure on the validation rows, what was chosen, and the model
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
THRESHOLDS = np.round(np.arange(0.05, 0.95, 0.025), 3)
GRID = {"words": ((1, 1), (1, 2)), "characters": (None, (2, 5))}


def unseen(train: Rows, asked: Iterable[Answered]) -> Rows:
    """The rows of train that are not among those asked about."""
    shown = {row.shown for row in asked}
    return [row for row in train if row_keys({"text": row["text"]})[0].hex() not in shown]


def label_sets(train: Rows, validation: Rows, asked: Sequence[Answered]) -> Found:
    """Logistic regression, one label against the rest; labels from one threshold on."""
    names = MultiLabelBinarizer().fit([row["labels"] for row in train])
    actual_VL = names.transform([row["labels"] for row in validation])

    def fits() -> Iterator[Fitted]:
        for text, strength, weights in itertools.product(_readers(), STRENGTHS, (None, "balanced")):
            one = LogisticRegression(C=strength, class_weight=weights, solver="liblinear")
            model = _fitted(text, OneVsRestClassifier(one), train, names.transform([row["labels"] for row in train]))
            shares_VL = model.predict_proba(_texts(validation))
            for threshold in THRESHOLDS:
                score = f1_score(actual_VL, shares_VL >= threshold, average="micro", zero_division=0)
                yield score, {**_told(text), "C": strength, "weights": weights, "threshold": float(threshold)}, model

    chosen, model = _best(fits())
    shares_NL = model.predict_proba([row.input for row in asked])
    given = names.inverse_transform((shares_NL >= chosen["threshold"]).astype(int))
    return [
        Prediction(json.dumps(sorted(labels)), row.reference, row.where, multi_label=True)
        for labels, row in zip(given, asked, strict=True)
    ], chosen


def labels(train: Rows, validation: Rows, asked: Sequence[Answered]) -> Found:
    """Logistic regression over all labels."""
    actual_V = [row["label"] for row in validation]

    def fits() -> Iterator[Fitted]:
        for text, strength, weights in itertools.product(_readers(), STRENGTHS, (None, "balanced")):
            linear = LogisticRegression(C=strength, class_weight=weights, max_iter=1000)
            model = _fitted(text, linear, train, [row["label"] for row in train])
            score = accuracy_score(actual_V, model.predict(_texts(validation)))
            yield float(score), {**_told(text), "C": strength, "weights": weights}, model

    chosen, model = _best(fits())
    given = model.predict([row.input for row in asked])
    return [Prediction(str(label), row.reference, row.where) for label, row in zip(given, asked, strict=True)], chosen


def scores(train: Rows, validation: Rows, asked: Sequence[Answered]) -> Found:
    """Ridge regression of `rating`."""
    actual_V = np.array([row["rating"] for row in validation])

    def fits() -> Iterator[Fitted]:
        for text, strength in itertools.product(_readers(), STRENGTHS):
            model = _fitted(text, Ridge(alpha=1 / strength), train, np.array([row["rating"] for row in train]))
            score = float(np.corrcoef(actual_V, model.predict(_texts(validation)))[0, 1])
            yield score, {**_told(text), "alpha": 1 / strength}, model

    chosen, model = _best(fits())
    given: NDArray[np.float64] = model.predict([row.input for row in asked])
    return [
        Prediction(
            f"{score:.6g}", row.reference, row.where, {"predicted": float(score), "expected": float(row.reference or 0)}
        )
        for score, row in zip(given, asked, strict=True)
    ], chosen


RIVALS: Mapping[str, Callable[[Rows, Rows, Sequence[Answered]], Found]] = {
    "TF-IDF + logistic regression, one label against the rest": label_sets,
    "TF-IDF + logistic regression": labels,
    "TF-IDF + ridge regression": scores,
}


def _readers() -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
    return list(itertools.product(*GRID.values()))


def _told(text: tuple[tuple[int, int], tuple[int, int] | None]) -> dict[str, Any]:
    return {name: part and f"{part[0]} to {part[1]}" for name, part in zip(GRID, text, strict=True)}


def _fitted(text: tuple[tuple[int, int], tuple[int, int] | None], linear: Any, train: Rows, answers: Any) -> Pipeline:
    words, characters = text
    parts = [("words", TfidfVectorizer(ngram_range=words, sublinear_tf=True))]
    if characters:
        parts.append(("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=characters, sublinear_tf=True)))
    return Pipeline([("text", FeatureUnion(parts)), ("linear", linear)]).fit(_texts(train), answers)


def _texts(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


def _best(fits: Iterator[Fitted]) -> tuple[dict[str, Any], Any]:
    """What did best on the validation rows, the first of equals; with its measure there."""
    score, chosen, model = max(fits, key=lambda fitted: fitted[0])
    return {**chosen, "validation": round(score, 4)}, model
