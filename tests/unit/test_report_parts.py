"""What a report is made of: answers judged and fitted into a page, curves, confusions, findings, Markdown."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import InputError
from tunesmith.report import answers as side_by_side
from tunesmith.report import run_page
from tunesmith.report.answers import OUTCOMES, compact, gather
from tunesmith.report.before_after import tables
from tunesmith.report.classes import classes_of
from tunesmith.report.curves import POINTS, read_training
from tunesmith.report.figures import in_rows
from tunesmith.report.findings import findings
from tunesmith.report.gaps import gap_line, gap_lines, small_line, titled_line
from tunesmith.report.markdown import code, escaped, fenced

PLAN = {"early_stopping": None, "clip": 1.0}


def answer(output: str, nll: float = 1.0, **shares: float) -> dict[str, Any]:
    return {"output": output, "scores": {"nll": nll, "tokens": 2}, "probabilities": shares or None, "finished": True}


def kept(path: Path, rows: list[tuple[str | None, dict[str, dict[str, Any]]]], text: str = "asked") -> Path:
    lines = [
        {
            "key": str(i),
            "shown": str(i),
            "where": f"/data/of/me/test.jsonl:{i}",
            "input": f"{text} {i}",
            "reference": r,
            "tags": {},
            "answers": a,
        }
        for i, (r, a) in enumerate(rows, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_damaged_answer_is_named_by_its_line(tmp_path: Path) -> None:
    path = kept(tmp_path / "p.jsonl", pairs(("a", "b", "a"), ("a", "a", "b")))
    whole = path.read_text()
    for damaged, why in (
        (whole.replace('"where": "/data/of/me/test.jsonl:2", ', ""), "it lacks 'where'"),
        (whole[:-9], "unexpected end of data"),
        (whole[::-1].replace('"denut"', '"rehto"', 1)[::-1], "it has no answer of tuned"),
        (whole[::-1].replace('"esab"', '"rehto"', 1)[::-1], "it has no answer of base"),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match=rf"p\.jsonl:2 is damaged: {why}"):
            gather(path, "test", ["accuracy"], 2)


def pairs(*found: tuple[str | None, str, str]) -> list[tuple[str | None, dict[str, dict[str, Any]]]]:
    return [(reference, {"base": answer(before), "tuned": answer(after)}) for reference, before, after in found]


def test_each_row_is_judged_by_the_first_metric_that_knows_one_row(tmp_path: Path) -> None:
    path = kept(
        tmp_path / "p.jsonl",
        pairs(("a", "b", "a"), ("a", "a", "b"), ("a", "a", "a"), ("a", "b", "c"), (None, "a", "b")),
    )
    found = gather(path, "test", ["macro_f1", "accuracy"], 5)
    assert found is not None
    assert (found.judge, found.before) == ("accuracy", "base")
    assert [a.outcome for a in found.shown] == ["better", "worse", "right", "wrong", "same"]
    assert found.changing is None  # a row that is not judged says nothing of the share that changed
    assert found.shown[0].where == "test.jsonl:1"


def test_a_graded_metric_judges_by_its_direction(tmp_path: Path) -> None:
    rows = [("a", {"base": answer("x", nll=b), "tuned": answer("x", nll=a)}) for b, a in ((2, 1), (1, 2), (1, 1))]
    found = gather(kept(tmp_path / "p.jsonl", rows), "test", ["loss"], 3)  # type: ignore[arg-type]
    assert found is not None
    assert [(a.outcome, a.scores) for a in found.shown] == [
        ("better", (1.0, 0.5)),
        ("worse", (0.5, 1.0)),
        ("same", (0.5, 0.5)),
    ]


def test_answers_of_the_tuned_model_alone_are_right_or_wrong(tmp_path: Path) -> None:
    path = kept(tmp_path / "p.jsonl", [("a", {"tuned": answer("a")}), ("a", {"tuned": answer("b")})])
    found = gather(path, "test", ["accuracy"], 2)
    assert found is not None
    assert found.before is None
    assert [a.outcome for a in found.shown] == ["right", "wrong"]
    assert found.changing == 0.0
    assert gather(tmp_path / "none.jsonl", "test", ["accuracy"], 2) is None


def test_too_many_answers_become_a_sample_of_every_outcome(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    kinds = [("a", "b", "a"), ("a", "a", "b"), ("a", "a", "a"), ("a", "b", "c")]
    rows = pairs(*[kinds[i] for i in draw.choice(4, 5000, p=[0.3, 0.01, 0.6, 0.09])])
    path = kept(tmp_path / "p.jsonl", rows, text="a long question " * 10)
    found = gather(path, "test", ["accuracy"], 5000, budget=200_000)
    assert found is not None
    assert found.sampled
    shown = Counter(a.outcome for a in found.shown)
    assert sum(found.counts.values()) == found.kept == 5000
    assert min(shown.values()) >= min(40, *found.counts.values())
    assert 150_000 < len(json.dumps(compact(found), separators=(",", ":"))) < 220_000
    assert [int(a.where.split(":")[1]) for a in found.shown] == sorted(int(a.where.split(":")[1]) for a in found.shown)
    again = gather(path, "test", ["accuracy"], 5000, budget=200_000)
    assert again == found
    whole = gather(path, "test", ["accuracy"], 5000)
    assert whole is not None
    assert not whole.sampled


def test_compact_rows_give_the_answers_back(tmp_path: Path) -> None:
    rows = [("up", {"majority": answer("down"), "tuned": answer("up", up=0.75, down=0.2, left=0.04, right=0.01)})]
    found = gather(kept(tmp_path / "p.jsonl", rows), "test", ["accuracy"], 1)  # type: ignore[arg-type]
    assert found is not None
    small = compact(found)
    where, asked, reference, before, after, outcome, scores, top, tags = small["rows"][0]
    texts = small["texts"]
    assert [texts[i] for i in (where, asked, reference, before, after)] == [
        "test.jsonl:1",
        "asked 1",
        "up",
        "down",
        "up",
    ]
    assert OUTCOMES[outcome] == "better"
    assert (scores, tags) == ([0.0, 1.0], [])
    assert [(texts[top[i]], top[i + 1]) for i in (0, 2, 4)] == [("up", 75.0), ("down", 20.0), ("left", 4.0)]


def test_a_very_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    path = kept(tmp_path / "p.jsonl", pairs(("a", "b", "x" * 9000)))
    found = gather(path, "test", ["accuracy"], 1)
    assert found is not None
    assert any(t.endswith("… 5,000 more characters") for t in compact(found)["texts"])
    assert side_by_side.LONGEST == 4000


def journal(path: Path, steps: int, *, tail: str = "") -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "epoch": 0.1, "tokens": 9, "loss": 4.0 / step, "learning_rate": 1e-3, "grad_norm": 2.0}
        )
        if step % 4 == 0:
            lines.append({"step": step, "validation": {"loss": abs(step - 8.0) + 1, "accuracy": step / 100}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_curves_hold_every_series_and_the_best_checkpoint(tmp_path: Path) -> None:
    found = read_training(journal(tmp_path, 12, tail='{"step": 13, "lo'), PLAN, higher=False)
    assert (found.steps, found.best, found.stretch) == (12, 8, 1)
    charts = {chart.key: chart for chart in found.charts}
    assert list(charts) == ["loss", "learning_rate", "grad_norm", "accuracy"]
    loss = {series.name: series for series in charts["loss"].series}
    assert loss["each step"].values == [4.0 / step for step in range(1, 13)]
    assert (loss["validation"].steps, loss["validation"].values) == ([4.0, 8.0, 12.0], [5.0, 1.0, 5.0])
    assert charts["grad_norm"].marks == ((1.0, "clipped above"),)
    assert all(0 <= charts["loss"].down(v) <= 100 for s in charts["loss"].series for v in s.values)


def test_a_smooth_curve_is_the_mean_around_each_step_and_keeps_its_ends(tmp_path: Path) -> None:
    found = read_training(journal(tmp_path, 12), PLAN, higher=False)
    raw, smooth = (series.values for series in found.charts[0].series[:2])
    assert smooth[0] == raw[0]
    assert smooth[-1] == pytest.approx(raw[-1])
    assert smooth[5] == pytest.approx(np.mean(raw[3:8]))


def test_the_best_is_chosen_as_the_monitor_chooses_it(tmp_path: Path) -> None:
    stopping = {**PLAN, "early_stopping": {"metric": "accuracy", "min_delta": 0.05, "patience": 3}}
    assert read_training(journal(tmp_path, 12), stopping, higher=True).best == 12
    never = {**PLAN, "early_stopping": {"metric": "accuracy", "min_delta": 0.5, "patience": 3}}
    assert read_training(journal(tmp_path, 12), never, higher=True).best == 4


def test_long_trainings_are_averaged_and_a_wide_loss_is_logarithmic(tmp_path: Path) -> None:
    found = read_training(journal(tmp_path, 2 * POINTS + 1), PLAN, higher=False)
    raw = found.charts[0].series[0]
    assert found.stretch == 3
    assert len(raw.values) == (2 * POINTS + 1 + 2) // 3
    assert (raw.steps[0], raw.values[0]) == (2.0, pytest.approx(np.mean([4.0, 2.0, 4 / 3])))
    assert found.charts[0].logarithmic
    assert not found.charts[1].logarithmic
    middle = (found.charts[0].y.low * found.charts[0].y.high) ** 0.5
    assert found.charts[0].down(middle) == pytest.approx(50, abs=0.02)
    assert json.dumps(found.charts[0].points(), allow_nan=False)


def test_a_run_without_a_step_has_no_curve(tmp_path: Path) -> None:
    found = read_training(tmp_path, PLAN, higher=False)
    assert (found.steps, found.charts, found.best) == (0, [], None)


def test_confusions_are_ordered_and_shaded() -> None:
    counts = [[8, 2, 0], [0, 10, 0], [1, 3, 0]]
    own = {"confusion": {"labels": ["a", "b", "c"], "counts": counts}, "reliability": None}
    records = [
        {
            "data": "test",
            "model": "tuned",
            "metric": "recall",
            "group": f"label={label}",
            "value": v,
            "low": 0,
            "high": 1,
            "n": n,
        }
        for label, v, n in (("a", 0.8, 10), ("b", 1.0, 10), ("c", 0.0, 4))
    ]
    (found,) = classes_of(records, {"test": {"tuned": own}})
    assert found.confusion.pairs == [("c", "b", 3, 4), ("a", "b", 2, 10), ("c", "a", 1, 4)]
    assert [(line.label, line.n) for line in found.lines] == [("c", 4), ("a", 10), ("b", 10)]
    assert found.confusion.shades() == [
        (False, 2, "M1 0h1v1h-1zM0 2h1v1h-1z"),
        (False, 6, "M1 2h1v1h-1z"),
        (True, 6, "M0 0h1v1h-1z"),
        (True, 8, "M1 1h1v1h-1z"),
    ]
    assert found.lines[0].precision is None


def audit(**more: Any) -> dict[str, Any]:
    split = {"truncated": 0, "truncated_answers": 0}
    return {
        "train": split,
        "validation": None,
        "tests": {"test": split},
        "duplicates": 0,
        "dropped": {"shared": 0, "empty": 0, "masked": 0},
        "shared_with_validation": None,
        "shared_with_tests": {"test": {"rows": 0, "of": 9, "train_rows": 0, "places": []}},
        "unknown_labels": {},
        **more,
    }


def test_clean_data_are_called_fine_and_each_fault_is_told() -> None:
    assert all(finding.fine for finding in findings(audit()))
    faults = audit(
        duplicates=3,
        dropped={"shared": 1, "empty": 2, "masked": 0},
        shared_with_tests={"test": {"rows": 1, "of": 9, "train_rows": 1, "places": [["/a/t.jsonl:1", "/a/r.jsonl:5"]]}},
        unknown_labels={"test": {"new": 4}},
        train={"truncated": 2, "truncated_answers": 1, "labels": {"Card": 1, "card": 1200, "top up": 2}},
        contradictions={"rows": 5, "places": [["/a/r.jsonl:2", "/a/r.jsonl:7"]]},
    )
    told = [finding.text for finding in findings(faults) if not finding.fine]
    assert told == [
        "1 row of 9 of test stand in train too, such as t.jsonl:1 = r.jsonl:5; train gave up its 1 row",
        "3 rows of train repeat an earlier one; they are kept",
        "2 rows of train were dropped: they are empty",
        "2 rows of train were cut to train.sequence_length, the answers of 1 among them",
        "5 rows of train show the same as another and have a different answer, such as r.jsonl:2 and r.jsonl:7",
        "labels of train that differ in capitals or spaces alone are two: 'Card' (1), 'card' (1,200)",
        "labels of test that train lacks, so that no answer can be right: new (4)",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "*a*",
        "_a_",
        "[a](b)",
        "`a`",
        "| a |",
        "<img>",
        "a < b <",
        "# a",
        "12. a",
        "- a",
        "> a",
        "a\n\n# b",
        "\\*",
        "~~a~~",
        "&lt;",
    ],
)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    from markdown_it import MarkdownIt

    html = MarkdownIt("gfm-like", {"linkify": False}).render(escaped(text))
    shown = html.removeprefix("<p>").removesuffix("</p>\n")
    assert "<" not in shown
    for written, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(written, character)
    assert shown == " ".join(text.split())


def test_a_p_value_in_markdown_is_readable_as_text() -> None:
    assert escaped("95% interval +1.0 to +2.0, p < 0.001") == "95% interval +1.0 to +2.0, p < 0.001"
    assert escaped("a<b <c> <") == "a&lt;b &lt;c&gt; &lt;"


@given(st.text(alphabet="`a |~\n", max_size=12))
def test_code_in_markdown_holds_any_text(text: str) -> None:
    from markdown_it import MarkdownIt

    line = " ".join(text.split())
    if line and "|" not in line:
        assert MarkdownIt().render(code(text)) == f"<p><code>{line}</code></p>\n"
    block = MarkdownIt().render(fenced(text))
    assert block.count("<pre>") == 1
    assert block.endswith("</code></pre>\n")


def test_every_record_of_a_group_is_in_its_metrics_table_and_rows_without_a_value_are_called_so() -> None:
    """Groups do not all have the same metrics: of one class there is no ROC AUC."""
    places = [("accuracy", ""), ("ece", ""), ("accuracy", "b"), ("roc_auc", "b"), ("ece", "b")]
    records = [
        {"model": "tuned", "data": "test", "metric": metric, "group": f"of={value}", "value": 0.5, "n": 30}
        for metric, value in places
    ]
    found: Any = run_page._groups(SimpleNamespace(tables=tables(records, [])))["test", "of"]
    assert {title: [group for group, _ in lines] for title, lines in found.metrics.items()} == {
        "accuracy": ["(no value)", "b"],
        "ECE": ["(no value)", "b"],
        "ROC AUC": ["b"],
    }
    assert all(line.metric.title == title for title, lines in found.metrics.items() for _, line in lines)
    told = {"metric": "accuracy", "best": "", "worst": "b", "value": 0.1, "low": 0.0, "high": 0.2, "groups": 2}
    assert gap_line(told, {"": 30, "b": 30}).startswith("accuracy is best of (no value), worst of 'b', of 2 groups")
    assert titled_line({**told, "metric": "macro_f1"}, {"": 30, "b": 30}).startswith("macro F1 is best of")
    assert small_line({"small": {"": 1}, "least": 20}) == "not judged, of fewer than 20 rows: (no value) 1"


@pytest.mark.parametrize("low", [0.1, -0.1, None])
def test_a_gap_of_groups_of_few_rows_is_said_to_tell_little(low: float | None) -> None:
    gap = {"metric": "accuracy", "best": "a", "worst": "b", "value": 0.5, "low": low, "high": 0.9, "groups": 3}
    assert gap_line(gap, {"a": 1200, "b": 19, "c": 20}).endswith("; so few rows (1,200 and 19) tell little")
    assert gap_lines([{"data": "test", "column": "of", "gaps": [gap], "small": {}, "judged": {"a": 4, "b": 4}}])[
        0
    ].endswith("; so few rows (4 and 4) tell little")
    assert "tell little" not in gap_line(gap, {"a": 20, "b": 20, "c": 3}), "the third is in neither number"


@pytest.mark.parametrize(("count", "said"), [(0, "0 test rows"), (1, "1 test row"), (1200, "1,200 test rows")])
def test_one_row_is_one(count: int, said: str) -> None:
    assert in_rows(count, "test ") == said
