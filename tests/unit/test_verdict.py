"""The verdict claims what the paired test shows, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.report.before_after import facts_of, headline, tables
from tunesmith.report.results import reasons
from tunesmith.report.verdict import Verdict, difference, value, verdicts


def record(model: str, metric: str, number: float, n: int = 400, data: str = "test", **more: Any) -> dict[str, Any]:
    found = {"model": model, "data": data, "metric": metric, "value": number, "n": n, "group": "all"}
    return {**found, "low": number - 0.05, "high": number + 0.05, **more}


def effect(
    metric: str, moved: float, low: float | None, high: float | None, p: float, data: str = "test"
) -> dict[str, Any]:
    return {"data": data, "metric": metric, "difference": moved, "low": low, "high": high, "p": p}


def judged(records: list[dict[str, Any]], effects: list[dict[str, Any]], **more: Any) -> Verdict:
    given: dict[str, Any] = {"finished": True, "steps": (9, 9), "detectable": {}, **more}
    return verdicts(tables(records, effects), **given)[0]


def pair(metric: str, before: float, after: float, model: str = "base", **more: Any) -> list[dict[str, Any]]:
    return [record(model, metric, before, **more), record("tuned", metric, after, **more)]


@pytest.mark.parametrize(
    ("metric", "before", "after", "low", "high", "p", "standing"),
    [
        ("accuracy", 0.5, 0.6, 0.05, 0.15, 1e-5, "Better"),
        ("accuracy", 0.6, 0.5, -0.15, -0.05, 1e-5, "Worse"),
        ("accuracy", 0.5, 0.6, -0.01, 0.21, 0.07, "No better"),
        ("accuracy", 0.5, 0.4, -0.21, 0.01, 0.07, "No better"),
        ("accuracy", 0.5, 0.5, -0.01, 0.01, 1.0, "No better"),
        ("loss", 2.0, 1.0, -1.1, -0.9, 5e-4, "Better"),  # less of a loss is more
        ("loss", 1.0, 2.0, 0.9, 1.1, 5e-4, "Worse"),
        ("accuracy", 0.5, 0.6, -0.001, 0.2, 0.049, "No better"),  # p and interval do not agree: nothing is claimed
        ("accuracy", 0.5, 0.6, 0.001, 0.2, 0.051, "No better"),
        ("loss", 2.0, 1.0, None, None, 0.001, "No better"),  # one row has no interval
    ],
)
def test_better_and_worse_need_the_test_and_the_interval(
    metric: str, before: float, after: float, low: float | None, high: float | None, p: float, standing: str
) -> None:
    found = judged(pair(metric, before, after), [effect(metric, after - before, low, high, p)])
    assert found.standing == standing
    assert found.sentence.startswith(f"{standing} than its base: {metric}")
    assert "400 test rows" in found.sentence
    assert ("chance alone could explain" in found.sentence) == (standing == "No better")


def test_a_metric_without_a_test_is_passed_over_or_told_as_one_that_cannot_tell() -> None:
    why = "no interval: class 'x' has 1 row, so all rows are worth 3.9; 10 are needed"
    silent = {**effect("macro_f1", 0.2, None, None, 0.0), "p": None, "reason": why}
    (alone,) = tables(pair("macro_f1", 0.5, 0.7), [silent])
    assert (alone.lines[0].standing, alone.lines[0].corrected) == ("cannot tell", "cannot tell")
    assert alone.lines[0].notes == [f"difference: {why}"]
    told = judged(pair("macro_f1", 0.5, 0.7), [silent])
    assert (told.standing, told.tone) == ("Cannot tell", "caution")
    assert told.sentence == (
        f"Cannot tell: macro F1 is 0.700 against 0.500 on 400 test rows, and these do not carry a test ({why})."
    )
    both = pair("macro_f1", 0.5, 0.7) + pair("accuracy", 0.5, 0.6)
    other = judged(both, [silent, effect("accuracy", 0.1, 0.05, 0.15, 1e-5)])
    assert other.sentence.startswith("Better than its base: accuracy")
    assert f"These rows do not carry a test of macro F1 ({why})." in other.caveats


def test_what_is_not_there_beside_others_has_a_reason() -> None:
    """Of a fold's most frequent label no probabilities are kept, and macro F1 is not tested against any."""
    records = pair("accuracy", 0.5, 0.6, "majority") + pair("macro_f1", 0.2, 0.6, "majority")
    records += [record("tuned", "roc_auc", 0.9), *pair("acc,none", 0.2, 0.3, "majority")]
    found = {
        line.metric.name: line.notes for line in tables(records, [effect("accuracy", 0.1, 0.0, 0.2, 0.01)])[0].lines
    }
    assert found["accuracy"] == found["acc,none"] == []
    assert found["macro_f1"] == [
        "difference: not tested, as random guesses beat its counterpart (most frequent label) by macro_f1"
    ]
    assert found["roc_auc"] == ["most frequent label: not measured, as its answers do not hold what that takes"]
    assert tables(records, [])[0].lines[1].notes == [], "where nothing is compared, nothing is missing"
    cosine = pair("accuracy", 0.5, 0.6, "cosine") + pair("macro_f1", 0.2, 0.6, "cosine")
    assert tables(cosine, [effect("accuracy", 0.1, 0.0, 0.2, 0.01)])[0].lines[1].notes == [], "no guess beats that"
    assert "roc_auc (majority) on test: not measured" in reasons(records, [])[0]


def test_rows_that_were_trained_on_are_told_and_earn_no_praise() -> None:
    found = judged(pair("accuracy", 0.5, 0.6, in_train=30), [effect("accuracy", 0.1, 0.05, 0.15, 1e-5)])
    assert (found.standing, found.tone) == ("Better on rows it was trained on", "caution")
    assert "on 400 test rows, 30 of which it was trained on" in found.sentence
    assert found.caveats[0].startswith("30 of these 400 rows stand in the training rows too")
    for apart in (0, None):
        clean = judged(pair("accuracy", 0.5, 0.6, in_train=apart), [effect("accuracy", 0.1, 0.05, 0.15, 1e-5)])
        assert (clean.standing, clean.tone) == ("Better", "better")
        assert "trained on" not in clean.sentence


def test_effect_interval_p_and_n_are_in_the_sentence() -> None:
    found = judged(pair("accuracy", 0.126, 0.782, model="majority"), [effect("accuracy", 0.656, 0.553, 0.736, 1e-22)])
    assert found.sentence == (
        "Better than always answering the most frequent label: accuracy rose from 12.6% to 78.2% on 400 test rows, "
        "a difference of +65.6 points (95% interval +55.3 to +73.6, p < 0.001)."
    )
    assert any("A base without a trained head" in caveat for caveat in found.caveats)


def test_few_rows_and_validation_rows_are_said() -> None:
    few = judged(pair("accuracy", 0.2, 0.9, n=12), [effect("accuracy", 0.7, 0.3, 0.9, 0.008)])
    assert "only 12 test rows" in few.sentence
    assert any("large differences" in caveat for caveat in few.caveats)
    own = judged(pair("accuracy", 0.2, 0.9, data="validation"), [effect("accuracy", 0.7, 0.6, 0.8, 1e-9, "validation")])
    assert (own.standing, own.tone) == ("Better on validation rows", "caution")
    assert "which also chose the checkpoint" in own.sentence


def test_what_was_not_compared_measured_or_finished_is_called_so() -> None:
    alone = judged([record("tuned", "accuracy", 0.9)], [])
    assert alone.standing == "Not compared"
    assert "accuracy of the tuned model is 90.0% on 400 test rows (95% interval 85.0% to 95.0%)" in alone.sentence
    assert judged([], []).standing == "Not measured"
    going = judged([], [], finished=False, steps=(3, 9))
    assert going.sentence.startswith("Unfinished: 3 of 9 steps are done")


def test_a_base_that_was_measured_and_not_tested_is_told_with_its_value() -> None:
    whole = {"low": None, "high": None, "reason": "no interval: lm-eval makes it of all rows at once"}
    found = judged(pair("exact_match", 0.0, 0.0, data="gen") + pair("bleu", 0.25, 0.3, n=3, data="gen", **whole), [])
    assert (found.standing, found.tone) == ("Not tested", "")
    assert found.sentence == (
        "Not tested: BLEU of the tuned model is 0.300, that of its base 0.250, on only 3 rows of gen; there is no test "
        "of the difference: lm-eval makes it of all rows at once."
    )
    plain = judged(pair("accuracy", 0.5, 0.6, "majority"), [])
    assert "that of always answering the most frequent label 50.0%, on 400 test rows" in plain.sentence
    assert plain.sentence.endswith("there is no test of the difference.")


def test_a_metric_that_is_tested_speaks_before_one_that_is_not() -> None:
    records = pair("macro_f1", 0.2, 0.6, "majority") + pair("accuracy", 0.5, 0.6, "majority")
    found = judged(records, [effect("accuracy", 0.1, 0.05, 0.15, 1e-5)])
    assert found.sentence.startswith("Better than always answering the most frequent label: accuracy rose")
    assert "There is no test of macro F1: random guesses beat its counterpart (most frequent label) by macro_f1." in (
        found.caveats
    )
    assert not any("same end" in caveat for caveat in found.caveats)


def test_rows_of_folds_are_told_to_be_held_out() -> None:
    given = pair("accuracy", 0.5, 0.6, data="folds"), [effect("accuracy", 0.1, 0.05, 0.15, 1e-5, "folds")]
    told = "on 400 rows, each answered by a model that was trained without it, a difference"
    assert told in judged(*given, crossval=True).sentence
    assert "on 400 rows of folds, a difference" in judged(*given).sentence, "a set of that name is no cross-validation"


def test_rows_that_could_have_shown_a_difference_are_said_where_none_was_seen() -> None:
    nothing = [effect("accuracy", 0.01, -0.02, 0.04, 0.6)]
    found = judged(pair("accuracy", 0.5, 0.51), nothing, detectable={("test", "accuracy"): 0.043})
    assert any("4.3 points or more" in caveat for caveat in found.caveats)
    assert not any("4.3" in c for c in judged(pair("accuracy", 0.5, 0.51), nothing).caveats)


def test_a_metric_at_the_same_end_for_both_gives_way_to_the_next() -> None:
    records = pair("exact_match", 0.0, 0.0) + pair("token_f1", 0.2, 0.5)
    effects = [effect("exact_match", 0.0, -0.01, 0.01, 1.0), effect("token_f1", 0.3, 0.2, 0.4, 5e-4)]
    found = judged(records, effects)
    assert found.sentence.startswith("Better than its base: token F1 rose from 0.200 to 0.500")
    assert any("same end of exact match" in caveat for caveat in found.caveats)
    both = judged(pair("exact_match", 1.0, 1.0), [effect("exact_match", 0.0, -0.01, 0.01, 1.0)])
    assert both.sentence.startswith("No better than its base: exact match stayed at 100%")


def test_each_set_has_a_verdict_of_its_own() -> None:
    records = pair("accuracy", 0.5, 0.6) + pair("accuracy", 0.5, 0.4, data="more")
    effects = [effect("accuracy", -0.1, -0.2, -0.05, 1e-3, "more"), effect("accuracy", 0.1, 0.05, 0.2, 1e-3)]
    found = verdicts(tables(records, effects), True, (9, 9), {})
    assert [(v.data, v.standing) for v in found] == [("test", "Better"), ("more", "Worse")]
    assert "400 rows of more" in found[1].sentence


def test_an_unknown_metric_is_not_judged() -> None:
    found = judged(pair("of_a_plugin", 0.5, 0.6), [effect("of_a_plugin", 0.1, 0.05, 0.2, 1e-3)])
    assert found.standing == "Not judged"
    assert headline(tables(pair("of_a_plugin", 0.5, 0.6), [])[0].lines) is None


def test_groups_have_no_test_and_classes_are_no_lines() -> None:
    records = [
        *pair("accuracy", 0.5, 0.6),
        *pair("accuracy", 0.5, 0.7, group="shop=north"),
        record("tuned", "recall", 0.5, group="label=up"),
    ]
    found = tables(records, [effect("accuracy", 0.1, 0.05, 0.2, 1e-3)])
    assert [(table.group, [line.standing for line in table.lines]) for table in found] == [
        ("all", ["better"]),
        ("shop=north", [""]),
    ]


def test_in_a_table_only_the_verdicts_metric_keeps_its_own_p() -> None:
    records = pair("accuracy", 0.5, 0.6) + pair("loss", 1.0, 0.9)
    found = [
        effect(metric, moved, *sorted((moved / 2, 2 * moved)), 0.04) | {"p_holm": 0.08}
        for metric, moved in (("accuracy", 0.1), ("loss", -0.1))
    ]
    (table,) = tables(records, found)
    assert [line.standing for line in table.lines] == ["better", "better"]
    assert [line.corrected for line in table.lines] == ["no better", "no better"]
    assert [table.said(line) for line in table.lines] == ["better", "no better"]


def test_numbers_are_written_as_their_metric_is_spoken_of() -> None:
    accuracy, loss = facts_of("accuracy"), facts_of("loss")
    assert value(accuracy, 0.5) == "50.0%"
    assert difference(accuracy, -0.051) == "−5.1 points"  # noqa: RUF001
    assert value(loss, 2.5) == "2.500"
    assert difference(loss, None) == "unknown"
    assert facts_of("rouge_l").title == "ROUGE-L"
    assert facts_of("roc_auc").title == "ROC AUC"
    assert facts_of("loss").says.startswith("Nats per trained token")
