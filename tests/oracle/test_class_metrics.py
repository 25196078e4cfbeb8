"""ROC-AUC, ECE, per-class numbers and confusion against scikit-learn and slow plain versions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from tunesmith.errors import InputError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.calibration import reliability
from tunesmith.evaluation.class_metrics import by_class, confusion, details
from tunesmith.evaluation.intervals import interval, wilson
from tunesmith.evaluation.metrics import applicable, build, lacking, statistics
from tunesmith.types import Prediction

LABELS = ["a", "b", "c"]


def answers(count: int, seed: int, labels: list[str] = LABELS, ties: bool = False) -> list[Prediction]:
    draw = np.random.default_rng(seed)
    found: list[Prediction] = []
    for index in range(count):
        truth = int(draw.integers(len(labels)))
        logits = draw.normal(size=len(labels)) + 1.2 * (np.arange(len(labels)) == truth)
        if ties:
            logits = np.round(logits)
        shares = np.round(np.exp(logits) / np.exp(logits).sum(), 9)  # else rounding breaks ties
        output = labels[int(shares.argmax())]
        found.append(
            Prediction(output, labels[truth], f"row {index}", probabilities=dict(zip(labels, shares, strict=True)))
        )
    return found


def value(name: str, predictions: list[Prediction], labels: list[str] = LABELS) -> float:
    metric = METRICS.get(name)(labels)
    return float(metric.aggregate(statistics(metric, predictions).sum(0)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("labels", [LABELS, ["no", "yes"]])
def test_roc_auc_is_scikit_learns(labels: list[str], ties: bool) -> None:
    predictions = answers(200, 3, labels, ties)
    truth = [p.reference for p in predictions]
    shares = np.array([[p.probabilities[label] for label in labels] for p in predictions])  # type: ignore[index]
    if len(labels) == 2:
        expected = sk.roc_auc_score([t == "yes" for t in truth], shares[:, 1])
    else:
        expected = sk.roc_auc_score(truth, shares, multi_class="ovr", average="macro", labels=labels)
    assert value("roc_auc", predictions, labels) == pytest.approx(expected, abs=1e-12)


def test_roc_aucs_spread_is_delongs() -> None:
    """The variance of the row statistics is DeLong's estimate, from the two sides' placements."""
    predictions = answers(300, 5, ["no", "yes"])
    metric = METRICS.get("roc_auc")(["no", "yes"])
    spread = statistics(metric, predictions)[:, 0].var() / len(predictions)
    scores = np.array([p.probabilities["yes"] for p in predictions])  # type: ignore[index]
    positive = np.array([p.reference == "yes" for p in predictions])
    above = (scores[positive][:, None] > scores[~positive]).astype(float)
    slow = above.mean(1).var(ddof=1) / positive.sum() + above.mean(0).var(ddof=1) / (~positive).sum()
    assert spread == pytest.approx(slow, rel=1e-9)


def test_roc_auc_of_one_class_is_refused_and_left_out_by_default() -> None:
    one = [p for p in answers(50, 1) if p.reference == "a"]
    with pytest.raises(InputError, match="needs rows of two classes, and all of these have 'a'"):
        value("roc_auc", one)
    assert applicable(["accuracy", "roc_auc", "ece"], one) == ["accuracy", "ece"]


def test_ece_is_the_plain_sum_over_bins() -> None:
    predictions = answers(400, 7)
    confidence = np.array([max(p.probabilities.values()) for p in predictions])  # type: ignore[union-attr]
    right = np.array([p.output == p.reference for p in predictions], dtype=float)
    slow = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            slow += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert value("ece", predictions) == pytest.approx(slow)
    assert reliability(predictions)["ece"] == pytest.approx(slow)
    assert sum(b["n"] for b in reliability(predictions)["bins"]) == 400


def test_metrics_of_probabilities_name_the_row_that_has_none() -> None:
    bare = [Prediction("a", "a", "row 0"), Prediction("b", "b", "row 1")]
    for name in ("roc_auc", "ece"):
        with pytest.raises(InputError, match=f"{name} needs the probability of each label, and the answer to row 0"):
            value(name, bare)
    assert applicable(["accuracy", "roc_auc", "ece"], bare) == ["accuracy"]


def test_each_class_as_scikit_learn_counts_it() -> None:
    predictions = answers(150, 9)
    truth, said = [p.reference for p in predictions], [p.output for p in predictions]
    precision, recall, _, support = sk.precision_recall_fscore_support(truth, said, labels=LABELS)
    found = {(r.group, r.metric): r for r in by_class("tuned", "test", predictions, LABELS)}
    for i, label in enumerate(LABELS):
        assert found[f"label={label}", "precision"].value == pytest.approx(precision[i])
        assert found[f"label={label}", "recall"].value == pytest.approx(recall[i])
        assert found[f"label={label}", "recall"].n == support[i]
        assert found[f"label={label}", "recall"].low < recall[i] < found[f"label={label}", "recall"].high


def test_a_class_nobody_names_or_has_has_no_such_record() -> None:
    predictions = [Prediction("a", "b", "row"), Prediction("a", "a", "row")]
    found = {(r.group, r.metric) for r in by_class("tuned", "test", predictions, ["a", "b", "c"])}
    assert found == {("label=a", "precision"), ("label=a", "recall"), ("label=b", "recall")}


def test_confusion_is_scikit_learns() -> None:
    predictions = answers(150, 11)
    truth, said = [p.reference for p in predictions], [p.output for p in predictions]
    assert confusion(predictions, LABELS)["counts"] == sk.confusion_matrix(truth, said, labels=LABELS).tolist()
    assert set(details(predictions, LABELS)) == {"confusion", "reliability"}
    assert set(details([Prediction("a", "a", "row")], LABELS)) == {"confusion"}


def test_json_metrics_are_measured_where_every_reference_is_an_object() -> None:
    asked = ["exact_match", "json_valid", "field_accuracy"]
    assert applicable(asked, [Prediction("x", '{"a": 1}', "row")]) == asked
    assert applicable(asked, [Prediction("x", '{"a": 1}', "row"), Prediction("x", "plain", "row")]) == ["exact_match"]
    assert [m.name for m in build(asked, [Prediction("x", "plain", "row")])] == asked


def test_classes_of_one_row_each_still_have_a_spread() -> None:
    """Their areas differ by chance: the spread of the mean is that of the areas, as for rows of one class."""
    labels = [str(i) for i in range(12)]
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.ones(12), size=12)
    singles = [
        Prediction("0", label, f"row {i}", probabilities=dict(zip(labels, shares[i], strict=True)))
        for i, label in enumerate(labels)
    ]
    metric = METRICS.get("roc_auc")(labels)
    spread = statistics(metric, singles)[:, 0].var() / len(singles)
    each = [sk.roc_auc_score([p.reference == label for p in singles], shares[:, i]) for i, label in enumerate(labels)]
    assert spread > 0.5 * np.var(each, ddof=1) / len(each)


def test_precision_and_recall_of_sources_are_less_sure_than_of_rows() -> None:
    predictions = [p for p in answers(60, 9) for _ in range(4)]
    alone = {(r.group, r.metric): r for r in by_class("tuned", "test", predictions, LABELS)}
    sources = by_class("tuned", "test", predictions, LABELS, np.repeat(np.arange(60), 4))
    for record in sources:
        other = alone[record.group, record.metric]
        assert (record.value, record.n) == (other.value, other.n)
        assert record.high - record.low > 1.5 * (other.high - other.low)


def test_the_interval_of_the_calibration_error_is_freed_of_noise() -> None:
    """Answers of a calibrated classifier: the error that 200 rows show is noise, and the interval reaches 0."""
    draw = np.random.default_rng(5)
    confident = draw.uniform(0.5, 1, 200)
    outputs = np.where(draw.random(200) < confident, "yes", "no")
    calibrated = [
        Prediction("yes", str(truth), "row", probabilities={"yes": float(c), "no": 1 - float(c)})
        for truth, c in zip(outputs, confident, strict=True)
    ]
    metric = METRICS.get("ece")([])
    shown, low, high = interval(metric, statistics(metric, calibrated), 0)
    assert shown > 0.03
    assert low == 0
    assert high < 2 * shown
    bold = [replace(p, probabilities={"yes": 0.999, "no": 0.001}) for p in calibrated]
    shown, low, high = interval(metric, statistics(metric, bold), 0)
    rate = wilson(float(np.mean(outputs == "yes")) * 200, 200)
    assert (shown - low, high - shown) == pytest.approx(((rate[1] - rate[0]) / 2,) * 2, abs=0.01)


def sets(count: int, seed: int, labels: list[str]) -> list[Prediction]:
    """Rows with several labels or none, and answers that are drawn towards them."""
    draw = np.random.default_rng(seed)
    found: list[Prediction] = []
    for index in range(count):
        truth = draw.random(len(labels)) < np.linspace(0.1, 0.5, len(labels))
        shares = np.round(1 / (1 + np.exp(-draw.normal(size=len(labels)) - 1.5 * truth + 0.7)), 3)
        said, actual = (
            json.dumps([label for label, on in zip(labels, chosen, strict=True) if on])
            for chosen in (shares >= 0.5, truth)
        )
        by_label = dict(zip(labels, shares.tolist(), strict=True))
        found.append(Prediction(said, actual, f"row {index}", probabilities=by_label, multi_label=True))
    return found


@pytest.mark.parametrize("labels", [LABELS, [f"label {i}" for i in range(30)]], ids=["3", "30"])
def test_label_sets_are_measured_as_by_scikit_learn(labels: list[str]) -> None:
    predictions = sets(400, 7, labels)
    truth, said = (
        np.array([[label in own for label in labels] for own in own_sets])
        for own_sets in ([p.expected for p in predictions], [p.answered for p in predictions])
    )
    shares = np.array([list((p.probabilities or {}).values()) for p in predictions])
    expected = {
        "micro_f1": sk.f1_score(truth, said, average="micro"),
        "macro_f1": sk.f1_score(truth, said, average="macro"),
        "accuracy": sk.accuracy_score(truth, said),
        "roc_auc": sk.roc_auc_score(truth, shares, average="macro"),
    }
    assert {name: value(name, predictions, labels) for name in expected} == pytest.approx(expected, abs=1e-12)
    records = {(r.group, r.metric): r for r in by_class("tuned", "test", predictions, labels)}
    precision, recall, _, rows = sk.precision_recall_fscore_support(truth, said, average=None)
    for at, label in enumerate(labels):
        found = records[f"label={label}", "recall"]
        assert (found.value, found.n) == (pytest.approx(recall[at]), rows[at])
        assert records[f"label={label}", "precision"].value == pytest.approx(precision[at])


def test_the_spread_of_a_mean_area_over_label_sets_is_that_of_resamples() -> None:
    predictions = sets(300, 11, LABELS)
    metric = METRICS.get("roc_auc")(LABELS)
    spread = statistics(metric, predictions)[:, 0].std() / np.sqrt(len(predictions))
    draw = np.random.default_rng(0)
    drawn = [value("roc_auc", [predictions[i] for i in draw.integers(300, size=300)]) for _ in range(300)]
    assert spread == pytest.approx(np.std(drawn), rel=0.15)


def test_sets_of_one_label_each_are_measured_as_labels() -> None:
    one = answers(150, 4)
    as_sets = [
        replace(p, output=json.dumps([p.output]), reference=json.dumps([p.reference]), multi_label=True) for p in one
    ]
    for name in ("micro_f1", "macro_f1", "accuracy", "roc_auc"):
        metric = METRICS.get(name)(LABELS)
        assert statistics(metric, as_sets).tolist() == statistics(metric, one).tolist()


def test_ece_of_label_sets_is_refused() -> None:
    with pytest.raises(InputError, match="ece needs one label a row, and row 0 may have several"):
        value("ece", sets(3, 1, LABELS))


def test_average_precision_of_label_sets_is_scikit_learns() -> None:
    predictions = sets(200, 8, LABELS)
    truth = np.array([[label in p.expected for label in LABELS] for p in predictions])
    shares = np.array([list((p.probabilities or {}).values()) for p in predictions])
    expected = sk.average_precision_score(truth, shares, average="macro")
    assert value("average_precision", predictions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_a_rows_influence_on_average_precision_is_that_of_its_weight(ties: bool) -> None:
    """By scikit-learn's weights of rows, one of them moved a little; a class of P rows counts P / (P - 1) as much."""
    predictions = answers(60, 3, ties=ties)
    shares = np.array([[p.probabilities[label] for label in LABELS] for p in predictions])  # type: ignore[index]
    area, influence = np.zeros(len(LABELS)), np.zeros(60)
    for at, label in enumerate(LABELS):
        truth = np.array([p.reference == label for p in predictions])
        area[at] = sk.average_precision_score(truth, shares[:, at])
        for row in range(60):
            moved = [
                sk.average_precision_score(truth, shares[:, at], sample_weight=1 + step * (np.arange(60) == row))
                for step in (-1e-4, 1e-4)
            ]
            pull = (moved[1] - moved[0]) / 2e-4
            influence[row] += pull * np.sqrt(truth.sum() / (truth.sum() - 1)) / len(LABELS)
    metric = METRICS.get("average_precision")(LABELS)
    assert statistics(metric, predictions)[:, 0] == pytest.approx(area.mean() + 60 * influence, abs=1e-5)


def test_average_precision_asks_for_ten_rows_of_every_class() -> None:
    predictions = answers(12, 2)
    metric = METRICS.get("average_precision")(LABELS)
    fewest = min(sum(p.reference == label for p in predictions) for label in LABELS)
    assert lacking(metric, statistics(metric, predictions)) == f"no interval: a class with {fewest} rows; 10 are needed"
    assert lacking(metric, statistics(metric, answers(90, 2))) is None
