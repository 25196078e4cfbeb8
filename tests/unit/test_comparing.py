"""Runs compared over the rows that they share: which rows, which tests, and what cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tunesmith
from tunesmith import measuring, rundir
from tunesmith.comparing import Comparison, Contrast, compare
from tunesmith.errors import InputError
from tunesmith.evaluation import paired
from tunesmith.evaluation.metrics import METRICS
from tunesmith.objectives.classify import majority
from tunesmith.recipe_file import parse_recipe
from tunesmith.report.comparison_page import comparison_page
from tunesmith.report.comparison_view import show_comparison
from tunesmith.rundir import RunDir
from tunesmith.types import Prediction, Row

LABELS = ["down", "up"]
CLASSIFIED = ("accuracy", "macro_f1", "roc_auc", "ece", "loss")
WRITTEN = ("exact_match", "token_f1", "loss", "perplexity")
Answer = Callable[[int, str], str]


def labelled(count: int, start: int = 0) -> list[Row]:
    return [
        Row({"text": f"text {i}", "label": LABELS[i % 3 != 0]}, f"test.jsonl:{i + 1}", {"source": str(i // 4)})
        for i in range(start, start + count)
    ]


def asked(count: int) -> list[Row]:
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"the {i}"}] for i in range(count)]
    return [Row({"messages": said}, f"test.jsonl:{i + 1}") for i, said in enumerate(turns)]


def right_but(every: int, at: int = 0) -> Answer:
    """Right but for each `every`th row."""
    return lambda i, expected: expected if i % every != at else LABELS[1 - LABELS.index(expected)]


def classified(rows: Sequence[Row], answer: Answer, sure: float = 0.9) -> list[Prediction]:
    found: list[Prediction] = []
    for i, row in enumerate(rows):
        output, expected = answer(i, row.value["label"]), row.value["label"]
        shares = {label: sure if label == output else 1 - sure for label in LABELS}
        scores = {"nll": -math.log(shares[expected]), "tokens": 1.0}
        found.append(Prediction(output, expected, row.where, scores, shares))
    return found


def written(
    rows: Sequence[Row], answer: Callable[[int], str], tokens: float = 4.0, nats: float = 1.0
) -> list[Prediction]:
    return [
        Prediction(
            answer(i), row.value["messages"][-1]["content"], row.where, {"nll": nats + i % 5 / 9, "tokens": tokens}
        )
        for i, row in enumerate(rows)
    ]


def run(
    path: Path,
    sets: Mapping[str, tuple[Sequence[Row], Mapping[str, Sequence[Prediction]]]],
    labels: Sequence[str] | None = LABELS,
    finished: bool = True,
    train: Mapping[str, int] = {"down": 3, "up": 7},  # never changed
    **evaluate: Any,
) -> Path:
    """A run's folder as measuring leaves it, without a model."""
    name = "sft" if labels is None else "classify"
    given = {"model": "m", "data": {"train": "t.jsonl"}, "objective": name, "method": "lora", "evaluate": evaluate}
    recipe = parse_recipe(given)
    learned = {} if labels is None else {"labels": list(labels)}
    metrics = WRITTEN if labels is None else CLASSIFIED
    objective: Any = SimpleNamespace(needs=SimpleNamespace(metrics=metrics), describe=lambda: learned)
    path.mkdir()
    rundir.write_json(path / "manifest.json", {"seed": 17})
    meaning = {"objective": [name, {}, learned], "evaluate": recipe.evaluate.model_dump(mode="json")}
    rundir.write_json(
        path / "plan.json",
        {"meaning": meaning, "audit": {"train": {"labels": dict(train), "rows": sum(train.values())}}},
    )
    results: dict[str, Any] = {"records": [], "effects": [], "details": {}, "groups": []}
    for data, (rows, found) in sets.items():
        measuring.write_predictions(RunDir(path), data, rows, found, recipe.evaluate.keep)
        measuring.merge(results, measuring.score(data, rows, found, objective, recipe))
    if finished:
        measuring.write_results(RunDir(path), results)
    return path


def alone(rows: Sequence[Row], every: int) -> tuple[Sequence[Row], dict[str, list[Prediction]]]:
    """A set that only the tuned model answered."""
    return rows, {"tuned": classified(rows, right_but(every))}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two classifiers of which b errs on fewer rows, on 120 rows in other orders, of which 90 are shared."""
    mine, theirs = labelled(120), labelled(120, start=30)[::-1]
    a = run(tmp_path / "a", {"test": (mine, {"tuned": classified(mine, right_but(3))})})
    b = run(tmp_path / "b", {"test": (theirs, {"tuned": classified(theirs, right_but(10))})})
    return a, b


def contrast(comparison: Comparison, metric: str, before: str = "a", after: str = "b") -> Contrast:
    """The one test."""
    (found,) = [t for t in comparison.tests if (t.metric, t.before, t.after) == (metric, before, after)]
    return found


def test_the_rows_that_both_have_are_matched_whatever_their_order(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    (shared,) = found.shared
    assert (shared.rows, dict(shared.left_out)) == (90, {"a": 30, "b": 30})
    rows = labelled(120)[30:]
    errs = right_but(10)  # b saw them from the last to the first
    last_first = {row.where: errs(i, row.value["label"]) for i, row in enumerate(labelled(120, start=30)[::-1])}
    mine = {row.where: right_but(3)(i, row.value["label"]) for i, row in enumerate(labelled(120))}
    for row, of in zip(rows, found.rows["test"], strict=True):
        assert (of.row.where, of.answers["a"].output, of.answers["b"].output) == (
            row.where,
            mine[row.where],
            last_first[row.where],
        )


def test_effects_are_those_of_the_paired_tests_and_p_is_holms(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    before, after = ([row.answers[name] for row in found.rows["test"]] for name in ("a", "b"))
    aligned = [
        Prediction(p.output, p.reference, q.where, p.scores, p.probabilities)
        for p, q in zip(after, before, strict=True)
    ]
    p: list[float] = []
    for name in CLASSIFIED:
        effect, test = paired.compare(before, aligned, METRICS.get(name)(LABELS), seed=17), contrast(found, name)
        same = [float("nan") if effect.reason else limit for limit in (effect.low, effect.high, effect.p)]
        assert [test.difference, test.low, test.high, test.p] == pytest.approx([effect.difference, *same], nan_ok=True)
        p += [] if effect.reason else [effect.p]
    # ECE is not tested on so few rows, and not counted by the correction.
    silent = contrast(found, "ece")
    assert (silent.standing, silent.rows_needed, silent.detectable) == ("cannot tell", None, None)
    assert silent.reason == "no interval: 90 rows in 15 bins of confidence; 1,000 are needed to compare"
    assert [contrast(found, name).p_holm for name in CLASSIFIED if name != "ece"] == paired.holm(p)
    assert found.shared[0].tests == len(p) == 4
    (told,) = [test for test in found.to_json()["tests"] if test["metric"] == "ece"]
    assert (told["low"], told["high"], told["p"], told["p_holm"], told["reason"]) == (*[None] * 4, silent.reason)
    assert contrast(found, "accuracy").standing == "better"
    assert {r.model: r.value for r in found.records if r.metric == "accuracy"} == {
        "a": pytest.approx(np.mean([q.output == q.reference for q in before])),
        "b": pytest.approx(np.mean([q.output == q.reference for q in after])),
    }


def test_the_same_numbers_as_the_runs_own_where_all_rows_are_shared(tmp_path: Path) -> None:
    """Probabilities come back from disk as they were."""
    rows = labelled(60)
    answers = classified(rows, right_but(4), sure=float(np.float32(0.9123456789)))
    a = run(tmp_path / "a", {"test": (rows, {"tuned": answers})})
    b = run(tmp_path / "b", {"test": (rows, {"tuned": classified(rows, right_but(5))})})
    stored = {r["metric"]: r for r in json.loads((a / "evaluation.json").read_text()) if r["group"] == "all"}
    for record in compare(a, b).records:
        if record.model == "a":
            own = stored[record.metric]
            assert (own["low"] is None) == (own["reason"] is not None) == (record.metric == "ece")
            limits = [math.nan if own[key] is None else own[key] for key in ("value", "low", "high")]
            assert [record.value, record.low, record.high] == pytest.approx(limits, rel=1e-6, nan_ok=True)


def test_what_has_no_interval_is_said_wherever_it_is_shown(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    why = "no interval: 90 rows in 15 bins of confidence; 200 are needed"
    assert [record.reason for record in found.records if record.metric == "ece"] == [why, why]
    for text in (shown(found), comparison_page(found)):
        assert why in " ".join(text.split())
        assert "cannot tell" in text.lower()
    alone = compare(*two, metrics=["ece"])
    assert alone.shared[0].tests == 0
    assert "Cannot tell b from a: ECE" in " ".join(shown(alone).split())


def test_an_undecided_test_says_how_many_rows_would_tell(tmp_path: Path) -> None:
    rows = labelled(100)
    a = run(tmp_path / "a", {"test": (rows, {"tuned": classified(rows, right_but(10, 1))})})
    b = run(tmp_path / "b", {"test": (rows, {"tuned": classified(rows, right_but(14, 2))})})
    test = contrast(compare(a, b, metrics=["accuracy"]), "accuracy")
    assert test.standing == "undecided"
    assert test.rows_needed is not None
    assert test.rows_needed > 100
    assert test.detectable is not None
    assert test.detectable > test.difference > 0
    pairing = paired.pair(
        classified(rows, right_but(10, 1)), classified(rows, right_but(14, 2)), METRICS.get("accuracy")([])
    )
    assert test.rows_needed == pairing.units_needed(0.05)
    # Among four undecided tests it is decided for certain at a quarter of the level, which takes more rows.
    among = compare(a, b)
    assert {other.standing for other in among.tests} == {"undecided", "cannot tell"}
    assert contrast(among, "accuracy").rows_needed == pairing.units_needed(0.05 / 4)


def test_one_run_is_told_against_the_majority_class(tmp_path: Path) -> None:
    rows = labelled(90)
    found = {"majority": majority({"down": 3, "up": 7}, rows), "tuned": classified(rows, right_but(9))}
    comparison = compare(run(tmp_path / "a", {"test": (rows, found)}))
    stored = {e["metric"]: e for e in json.loads((tmp_path / "a" / "comparison.json").read_text())}
    assert set(stored) == {"accuracy", "roc_auc", "ece", "loss"}  # in macro-F1 any guessing beats the majority
    for name, effect in stored.items():
        test = contrast(comparison, name, "majority", "a")
        keys = ("difference", "low", "high", "p", "p_holm")
        own = [math.nan if effect[key] is None else effect[key] for key in keys]
        assert [getattr(test, key) for key in keys] == pytest.approx(own, rel=1e-12, nan_ok=True)
        assert test.reason == effect["reason"]
    assert comparison.rows["test"][0].answers["majority"].probabilities == {"down": 0.3, "up": 0.7}


def test_equal_bases_are_one_and_each_run_is_told_against_its_own(tmp_path: Path) -> None:
    rows = asked(40)
    base = written(rows, lambda i: "no")
    texts: dict[str, Callable[[int], str]] = {"a": lambda i: f"the {i + i % 2}", "b": lambda i: f"the {i}", "c": str}
    runs = [
        run(tmp_path / n, {"test": (rows, {"base": base, "tuned": written(rows, f)})}, None) for n, f in texts.items()
    ]
    assert compare(*runs[:2]).pairs == [("a", "b")]
    found = compare(*runs, base=True)
    assert list(found.models) == ["base", "a", "b", "c"]
    assert found.pairs == [("a", "b"), ("a", "c"), ("b", "c"), ("base", "a"), ("base", "b"), ("base", "c")]
    # All answers are equally probable here, so the loss is not tested: two tests for each of six pairs.
    assert found.shared[0].tests == 12
    other = run(tmp_path / "d", {"test": (rows, {"base": written(rows, str), "tuned": written(rows, str)})}, None)
    found = compare(runs[0], other, base=True)
    assert found.pairs == [("a", "d"), ("base", "a"), ("d:base", "d")]


def test_losses_over_other_tokens_are_left_out_or_refused(tmp_path: Path) -> None:
    rows = asked(30)
    a = run(tmp_path / "a", {"test": (rows, {"tuned": written(rows, str)})}, None)
    b = run(tmp_path / "b", {"test": (rows, {"tuned": written(rows, str, tokens=5)})}, None)
    found = compare(a, b)
    assert {test.metric for test in found.tests} == {"exact_match", "token_f1"}
    assert [note.split()[0] for note in found.notes] == ["loss", "perplexity"]
    with pytest.raises(InputError, match="loss cannot be compared: the models count other tokens on test"):
        compare(a, b, metrics=["loss"])


def test_rows_of_one_source_stay_together(tmp_path: Path) -> None:
    """Four rows that are right or wrong together are worth one."""
    rows = labelled(120)
    by_source: tuple[Answer, Answer] = (lambda i, e: right_but(6)(i // 4, e), lambda i, e: right_but(15, 1)(i // 4, e))
    found: list[Contrast] = []
    for cluster in (None, "source"):
        runs = [
            run(tmp_path / f"{name}-{cluster}", {"test": (rows, {"tuned": classified(rows, of)})}, cluster=cluster)
            for name, of in zip("ab", by_source, strict=True)
        ]
        comparison = compare(*runs, metrics=["accuracy"])
        assert comparison.shared[0].cluster == cluster
        found.append(contrast(comparison, "accuracy", f"a-{cluster}", f"b-{cluster}"))
    alone, together = found
    assert together.difference == pytest.approx(alone.difference)
    assert together.p > 3 * alone.p
    assert together.rows_needed is not None
    assert alone.rows_needed is not None
    assert together.rows_needed > 1.5 * alone.rows_needed
    assert together.rows_needed % 4 == 0


def test_rows_of_the_second_runs_sources_stay_together_too(tmp_path: Path) -> None:
    """The column is named by one run alone, and kept with its rows alone."""
    rows = labelled(40)
    bare = [Row(row.value, row.where) for row in rows]
    a = run(tmp_path / "a", {"test": alone(bare, 3)})
    b = run(tmp_path / "b", {"test": alone(rows, 7)}, cluster="source")
    found = compare(a, b)
    assert found.shared[0].cluster == "source"
    assert found.notes == []
    nowhere = run(tmp_path / "c", {"test": alone(rows, 7)}, cluster="source")
    lines = [json.loads(line) for line in (nowhere / "predictions" / "test.jsonl").read_text().splitlines()]
    lines[3]["tags"] = {}
    (nowhere / "predictions" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(a, nowhere)
    assert found.shared[0].cluster is None
    assert found.notes == ["evaluate.cluster is source for some runs: not all rows have it, and each stands for itself"]


def test_a_metric_that_one_run_alone_was_measured_by_is_left_out_and_said(tmp_path: Path) -> None:
    rows = labelled(40)
    a = run(tmp_path / "a", {"test": alone(rows, 3)})
    b = run(tmp_path / "b", {"test": alone(rows, 7)}, metrics=["accuracy", "loss"])
    found = compare(b, a)
    assert [test.metric for test in found.tests] == ["accuracy", "loss"]
    assert [note.split(":")[0] for note in found.notes] == [f"{m} is left out" for m in ("macro_f1", "roc_auc", "ece")]
    assert [test.metric for test in compare(a, b, metrics=["ece"]).tests] == ["ece"]
    c = run(tmp_path / "c", {"test": alone(rows, 7)}, metrics=["ece"])
    assert "the runs have no metric of test in common | name metrics with --metrics" in refusal(b, c)


def test_where_no_test_is_fair_none_is_claimed(tmp_path: Path) -> None:
    rows = labelled(30)
    found = {"majority": majority({"down": 3, "up": 7}, rows), "tuned": classified(rows, right_but(9))}
    comparison = compare(run(tmp_path / "a", {"test": (rows, found)}), metrics=["macro_f1"])
    assert comparison.tests == []
    for text in (shown(comparison), comparison_page(comparison)):
        assert "not tested against majority" in " ".join(text.split())


def test_sets_are_compared_each_for_itself(tmp_path: Path) -> None:
    easy, hard = labelled(40), labelled(40, start=100)
    a = run(
        tmp_path / "a", {s: (r, {"tuned": classified(r, right_but(4))}) for s, r in (("easy", easy), ("hard", hard))}
    )
    b = run(
        tmp_path / "b", {s: (r, {"tuned": classified(r, right_but(9))}) for s, r in (("hard", hard), ("easy", easy))}
    )
    found = compare(a, b)
    assert [shared.data for shared in found.shared] == ["easy", "hard"]
    assert {shared.tests for shared in found.shared} == {4}
    assert [shared.data for shared in compare(a, b, data="hard").shared] == ["hard"]
    with pytest.raises(InputError, match="a was not measured on 'harder'") as caught:
        compare(a, b, data=["harder"])
    assert "easy, hard" in caught.value.remedy


# ---------------------------------------------------------------- what cannot be compared


def refusal(*runs: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        compare(*runs, **more)
    assert "\n" not in caught.value.cause
    return f"{caught.value.cause} | {caught.value.remedy}"


def test_runs_that_cannot_be_compared_are_refused_with_a_reason(tmp_path: Path, two: tuple[Path, Path]) -> None:
    a, _ = two
    rows, far = labelled(20), labelled(20, start=500)
    tuned = {"tuned": classified(rows, right_but(3))}
    third = {"tuned": [*tuned["tuned"][:-1], Prediction("left", "up", "r", {"nll": 1, "tokens": 1}, {"left": 1.0})]}
    texts = asked(5)
    cases = {
        "no run to compare": (),
        "is given twice": (a, tmp_path / "x" / ".." / "a"),
        "is not a run of tunesmith": (a, tmp_path),
        "tunesmith resume": (a, run(tmp_path / "begun", {}, finished=False)),
        "different labels: only labels has left": (
            a,
            run(tmp_path / "labels", {"test": (rows, third)}, [*LABELS, "left"]),
        ),
        "a was trained for classify and texts for sft": (
            a,
            run(tmp_path / "texts", {"test": (texts, {"tuned": written(texts, str)})}, None),
        ),
        "unkept has kept no answers (evaluate.keep) | measure it again and keep them": (
            a,
            run(tmp_path / "unkept", {"test": (rows, tuned)}, keep=0),
        ),
        "share no row of test (rows with answers: a 120, far 20)": (
            a,
            run(tmp_path / "far", {"test": (far, {"tuned": classified(far, right_but(3))})}),
        ),
        "no test set in common: a has test; named has other": (a, run(tmp_path / "named", {"other": (rows, tuned)})),
        "a was measured without its base": (a,),
    }
    (tmp_path / "x").mkdir()
    for said, runs in cases.items():
        assert said in refusal(*runs)
    assert "unknown metric 'acuracy'" in refusal(*two, metrics=["acuracy"])
    assert "names no metric" in refusal(*two, metrics=[])


def test_another_reference_for_the_same_question_is_refused_by_place(tmp_path: Path, two: tuple[Path, Path]) -> None:
    rows = labelled(120)
    rows[7] = Row({**rows[7].value, "label": "down"}, "fixed.jsonl:8")
    corrected = run(tmp_path / "c", {"test": (rows, {"tuned": classified(rows, right_but(5))})})
    said = refusal(two[0], corrected)
    assert "1 rows of test have other references in c than in a" in said
    assert "test.jsonl:8 expects 'up', fixed.jsonl:8 'down'" in said


def test_a_question_asked_twice_is_two_rows(tmp_path: Path) -> None:
    rows = [*labelled(20), *labelled(20)]
    a, b = (
        run(tmp_path / n, {"test": (rows, {"tuned": classified(rows, right_but(k))})}) for n, k in (("a", 3), ("b", 7))
    )
    assert compare(a, b).shared[0].rows == 40


def test_answers_that_were_not_kept_are_counted_as_left_out(tmp_path: Path) -> None:
    rows = labelled(50)
    a = run(tmp_path / "a", {"test": (rows, {"tuned": classified(rows, right_but(3))})}, keep=20)
    b = run(tmp_path / "b", {"test": (rows, {"tuned": classified(rows, right_but(7))})})
    (shared,) = compare(a, b).shared
    assert (shared.rows, dict(shared.left_out)) == (20, {"a": 30, "b": 30})


def test_damaged_answers_are_refused_by_line(two: tuple[Path, Path]) -> None:
    path = two[1] / "predictions" / "test.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"key": 3}\n', *lines[5:]]))
    assert "test.jsonl:5 is damaged: it lacks 'where'" in refusal(*two)


# ---------------------------------------------------------------- as it is shown


def shown(comparison: Comparison, page: Path | None = None) -> str:
    console = Console(width=80, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        show_comparison(comparison, page, console)
    return capture.get()


def test_the_tables_fit_80_columns_with_long_names_too(tmp_path: Path) -> None:
    rows = labelled(50)
    names = ("smollm2-135m-lora-rank-64-epochs-3", "smollm2-135m-lora-rank-8-epochs-12")
    runs = [run(tmp_path / name, {"test": alone(rows, 3 + i)}) for i, name in enumerate(names)]
    text = shown(compare(*runs))
    table = text[: text.index("[low, high]")]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("undecided", "±", " rows", "4 tests", "accuracy", "smollm2-135m-…"):
        assert word in table
    assert "--open" in text


def test_a_metrics_name_stays_on_one_line(tmp_path: Path) -> None:
    rows = asked(40)
    runs = [
        run(tmp_path / n, {"test": (rows, {"tuned": written(rows, lambda _: "x", nats=k)})}, None, True)
        for n, k in (("recipe", 9), ("further", 4))
    ]
    text = shown(compare(*runs))
    table = text[: text.index("[low, high]")]
    assert max(map(len, table.splitlines())) <= 80
    for metric in ("exact_match", "perplexity"):
        assert any(line.split()[:1] == [metric] for line in table.splitlines()), table


def test_json_has_everything_and_no_infinity(tmp_path: Path) -> None:
    rows = asked(1)
    a, b = (
        run(tmp_path / n, {"test": (rows, {"tuned": written(rows, str, nats=k)})}, None)
        for n, k in (("a", 1), ("b", 2))
    )
    found = json.loads(json.dumps(compare(a, b).to_json(), allow_nan=False))
    loss = next(test for test in found["tests"] if test["metric"] == "loss")
    assert {loss[name] for name in ("low", "high", "p", "rows_needed", "detectable")} == {None}
    assert loss["reason"] == "no interval: 1 row, and it takes 5"
    assert found["models"] == {"a": {"run": str(a), "model": "tuned"}, "b": {"run": str(b), "model": "tuned"}}
    assert found["shared"] == [{"data": "test", "rows": 1, "left_out": {"a": 0, "b": 0}, "cluster": None, "tests": 2}]


def test_one_row_of_a_loss_has_no_limits_and_says_so(tmp_path: Path) -> None:
    rows = asked(1)
    a, b = (
        run(tmp_path / n, {"test": (rows, {"tuned": written(rows, str, nats=k)})}, None)
        for n, k in (("a", 1), ("b", 2))
    )
    found = compare(a, b, metrics=["loss"])
    for text in (shown(found), comparison_page(found)):
        text = text.replace('<span class="whole">', "")
        assert "Cannot tell b from a: loss 0.500 against 0.250" in " ".join(text.split())
        assert "no interval: 1 row, and it takes 5" in " ".join(text.split())
        assert "inf" not in text.split("<script")[0].replace("information", "")


def test_the_sentence_is_that_of_the_first_metric_and_names_what_speaks_against_it(two: tuple[Path, Path]) -> None:
    """c errs less often, and is told so; its errors cost more, and that is said beside it."""
    rows = labelled(90)
    bolder = run(two[0].parent / "c", {"test": (rows, {"tuned": classified(rows, right_but(6), sure=1 - 1e-9)})})
    sentence = " ".join(shown(compare(two[0], bolder, metrics=["accuracy", "loss"])).split())
    assert "c is better than a: accuracy 83.3% against 66.7%, +16.7 points (95% interval" in sentence
    assert "By loss, c is worse." in sentence


def test_a_metric_in_which_both_stand_at_the_same_end_is_passed_over(tmp_path: Path) -> None:
    rows = asked(30)
    texts: dict[str, Callable[[int], str]] = {"a": lambda i: "no", "b": lambda i: f"{i} or more"}
    a, b = (run(tmp_path / n, {"test": (rows, {"tuned": written(rows, f)})}, None) for n, f in texts.items())
    assert "b is better than a: token F1" in " ".join(shown(compare(a, b)).split())
    level, of = (right_but(5), right_but(5, 1)), labelled(30)
    a, b = (
        run(tmp_path / f"level-{n}", {"test": (of, {"tuned": classified(of, f, sure)})})
        for n, f, sure in zip("ab", level, (0.6, 0.9), strict=True)
    )
    assert "30 rows do not tell level-b from level-a: accuracy" in " ".join(shown(compare(a, b)).split())


def test_the_page_says_what_the_tests_say_and_runs_nothing_of_the_rows(tmp_path: Path, two: tuple[Path, Path]) -> None:
    page = comparison_page(compare(*two))
    for said in ("b is better than a: accuracy 9", "90 rows that all answered (30 of a, 30 of b left out)", "4 tests"):
        assert said in page
    hostile = "</script><script>document.title=1</script>"
    rows = [
        Row({"messages": [{"role": "user", "content": hostile}, {"role": "assistant", "content": "x"}]}, "t:1"),
        *asked(20),
    ]
    a, b = (
        run(tmp_path / n, {"test": (rows, {"tuned": written(rows, lambda i: hostile)})}, None) for n in ("<b>", "plain")
    )
    page = comparison_page(compare(a, b))
    assert "<script>document" not in page
    assert "<h3><b>" not in page
    assert page.count("&lt;b&gt;") > 2


def test_a_notebook_shows_the_tables(two: tuple[Path, Path]) -> None:
    found = tunesmith.compare(*two)
    assert isinstance(found, tunesmith.Comparison)
    for word in ("accuracy", "better", "90 rows"):
        assert word in found._repr_html_()
