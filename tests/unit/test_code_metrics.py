"""Programs that models write: HumanEval's own answers pass, mutated ones fail; pass@k is the unbiased estimate."""

from __future__ import annotations

import ast
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith import api, sandbox
from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import read
from tunesmith.evaluation.code_metrics import judged, pass_at_k, program
from tunesmith.evaluation.metrics import applicable, statistics
from tunesmith.evaluation.preflight import check_metrics
from tunesmith.recipe_evaluation import Code
from tunesmith.rundir import read_json
from tunesmith.types import Prediction, Row

TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
HUMANEVAL = Code(tests="test", before="prompt", entry_point="entry_point")


@pytest.fixture
def contained() -> None:
    try:
        sandbox.check()
    except RefusedError as error:
        pytest.skip(str(error))


class Mutant(ast.NodeTransformer):
    """Every value that a function returns is another one."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        given = node.value or ast.Constant(None)
        node.value = ast.Tuple([given, ast.Constant("mutant")], ast.Load())
        return node


def mutated(row: dict[str, str]) -> str:
    """The whole program of a row, its entry point's answers changed."""
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"]:
            Mutant().visit(node)
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_humanevals_own_answers_pass_and_mutated_ones_fail(data_sets: Path, every: int) -> None:
    lines = (data_sets / "humaneval" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    raw = [json.loads(line) for line in lines][::every]
    rows = [Row({"messages": []}, r["task_id"], {c: r[c] for c in HUMANEVAL.columns}) for r in raw]
    for of, passed in ((lambda r: r["canonical_solution"], 1.0), (lambda r: f"```python\n{mutated(r)}\n```", 0.0)):
        found = judged([Prediction("", "", row.where) for row in rows], [[of(r)] for r in raw], rows, HUMANEVAL)
        assert [p.where for p in found if p.scores != {"samples": 1.0, "passed": passed}] == []


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_an_answer_that_passes(samples: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_that_of_the_papers_listing() -> None:
    """1 - prod over i from n - c + 1 to n of (1 - k / i): how Chen et al. compute equation 1."""
    for samples, passed, k in [(200, 3, 100), (20, 20, 10), (50, 0, 10), (100, 7, 1)]:
        chance = 1.0 if samples - passed < k else 1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1))
        assert pass_at_k(samples, passed, k) == pytest.approx(chance)


def ran(where: str, samples: int, passed: int) -> Prediction:
    return Prediction("", None, where, {"samples": float(samples), "passed": float(passed)})


def test_a_metric_of_any_k_is_found_by_its_name() -> None:
    metric = METRICS.get("pass_at_3")([])
    table = statistics(metric, [ran("f:1", 5, 0), ran("f:2", 5, 2)])
    assert float(metric.aggregate(table.sum(0))) == pytest.approx((0 + 1 - 1 / 10) / 2)
    assert metric.name == "pass_at_3"
    assert "pass_at_3" in METRICS
    assert METRICS.get("pass_at_3") is METRICS.get("pass_at_3")
    for wrong in ("pass_at_0", "pass_at_", "pass_at_x"):
        assert wrong not in METRICS
        with pytest.raises(InputError, match="did you mean 'pass_at_1'"):
            METRICS.get(wrong)


def test_k_answers_are_needed_and_tests() -> None:
    with pytest.raises(InputError, match="pass_at_10 needs 10 answers to each row, and f:1 has 2"):
        METRICS.get("pass_at_10")([]).statistics(ran("f:1", 2, 1))
    with pytest.raises(InputError, match="pass_at_1 needs tests, and the answer to f:1 was run with none"):
        METRICS.get("pass_at_1")([]).statistics(Prediction("", None, "f:1"))
    assert applicable(["pass_at_1", "pass_at_10"], [ran("f:1", 2, 1)]) == ["pass_at_1"]
    assert applicable(["pass_at_1"], [Prediction("", None, "f:1")]) == []


@pytest.mark.usefixtures("contained")
def test_what_cannot_be_run_is_told_before_training() -> None:
    row = Row({"messages": TURNS}, "f:1", {"test": "assert f"})
    assert check_metrics(["pass_at_1"], [], "test", [row], None, Code(tests="test")) == ["pass_at_1"]
    with pytest.raises(InputError, match="pass_at_10 needs 10 answers to each row, and f:1 has 5"):
        check_metrics(["pass_at_10"], [], "test", [row], None, Code(tests="test", samples=5))


def test_rows_without_tests_are_told_before_training() -> None:
    rows = [
        Row({"messages": TURNS}, f"f:{n}", {"test": test})
        for n, test in enumerate(["assert x", " \n", "17", "# none", "'a text'", "f()", "and so on'"])
    ]
    with pytest.raises(
        InputError, match=r"4 of 7 rows have no tests \('test'\), so that any answer passes, such as f:1"
    ):
        check_metrics(["pass_at_1"], [], "test", rows, None, Code(tests="test"))


@pytest.mark.usefixtures("contained")
def test_tests_that_are_no_python_are_told_before_training() -> None:
    """Behind the answer that is expected; where that is no program by itself it says nothing of the tests."""

    def row(number: int, answer: str, test: str) -> Row:
        messages = [TURNS[0], {"role": "assistant", "content": answer}]
        return Row({"messages": messages}, f"f:{number}", {"test": test})

    code, fine = Code(tests="test"), [row(1, "x = 1", "assert x"), row(2, "I do not know (", "assert x(")]
    assert check_metrics(["pass_at_1"], [], "test", fine, None, code) == ["pass_at_1"]
    with pytest.raises(InputError, match=r"1 of 3 rows have tests \('test'\) that are no Python .*, such as f:4 \("):
        check_metrics(["pass_at_1"], [], "test", [*fine, row(4, "x = 1", "def check(:")], None, code)
    unanswered = Row({"messages": TURNS[:1]}, "f:3", {"test": "assert x("})
    assert check_metrics([], [], "test", [unanswered], None, code) == []


def test_rows_that_ask_for_no_answer_have_no_programs() -> None:
    with pytest.raises(InputError, match=r"evaluate\.code runs answers that a model writes, and f:2 asks for none"):
        check_metrics([], ["loss"], "test", [Row({"text": "a"}, "f:2")], None, Code(tests="test"))


def test_an_answer_stands_between_the_rows_code_and_its_tests() -> None:
    row = Row({}, "f:1", {"prompt": "def f():\n", "test": "def check(g): assert g() == 1", "entry_point": "f"})
    whole = "def f():\n    return 1\n\n\ndef check(g): assert g() == 1\n\ncheck(f)"
    assert program("    return 1\n", row, HUMANEVAL).split() == whole.split()
    assert (
        program("So:\n```python\n    return 1\n```\nor\n```\n    return 2\n```", row, HUMANEVAL).split()
        == whole.split()
    )
    assert program("x = 1", row, Code(tests="test")) == "x = 1\n\ndef check(g): assert g() == 1"


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("contained")
def test_a_run_is_measured_by_what_its_programs_do(tiny_llama: Path, tmp_path: Path) -> None:
    """The answers of a tiny model are no programs; as the text of a string they are, whose letters the tests count."""
    tests = ['"""', '"""\nassert x is None', '"""\nassert sum(map(ord, x)) % 2']
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}?", "completion": "red", "opens": 'x = r"""\\', "test": tests[i % 3], "kind": str(i % 2)}
        for i in range(6)
    ]
    recipe: dict[str, Any] = {
        "model": str(tiny_llama),
        "data": {"train": "train", "validation": "validation", "test": "test"},
        "objective": "sft",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1, "batch_size": 2, "early_stopping": {"metric": "pass_at_4"}},
        "precision": "fp32",
        "place": {"device": "cpu", "threads": 1},
        "evaluate": {
            "metrics": ["pass_at_1", "pass_at_4"],
            "max_new_tokens": 4,
            "by": ["kind"],
            "smallest_group": 1,
            "base": False,
            "code": {"tests": "test", "before": "opens", "samples": 6, "temperature": 5.0},
        },
    }
    api.train(recipe, data={"train": rows[4:], "validation": rows[3:4], "test": rows[:3]}, out=tmp_path / "run")
    kept = list(read(tmp_path / "run", "test"))
    assert all(row.tags.keys() == {"kind"} for row in kept)
    passed = np.array([row.answers["tuned"].scores["passed"] for row in kept])
    assert passed[:2].tolist() == [6.0, 0.0]
    assert 0 < passed[2] < 6
    records = {r["metric"]: r["value"] for r in read_json(tmp_path / "run" / "evaluation.json") if r["group"] == "all"}
    assert [line["validation"]["pass_at_4"] for line in journal(tmp_path / "run") if "validation" in line] == [1.0]
    for k in (1, 4):
        assert records[f"pass_at_{k}"] == pytest.approx(np.mean([pass_at_k(6, int(count), k) for count in passed]))
