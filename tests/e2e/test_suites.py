"""Standard tasks of lm-evaluation-harness on local data: against that library's own numbers, without the network."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith import api
from tunesmith.cli import main
from tunesmith.suites import evaluate_suite

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install tunesmith[lm-eval]")

COLOURS = ("red", "green", "blue")
TASKS = {
    "choosing": """
task: choosing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}} It is"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: mcc}
metadata: {version: 1.5}
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: test
num_fewshot: 1
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e"], do_sample: false, max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf}
""",
    "reading": """
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "absent": """
task: absent
dataset_path: some/where
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
""",
}


SIGNED = {
    "choosing": ", choosing version 1.5, 0-shot",
    "writing": ", writing, 1-shot",
    "reading": ", reading, 0-shot",
}


def rows(count: int, start: int) -> list[dict[str, Any]]:
    return [{"prompt": f"colour {i}?", "completion": COLOURS[i % 3]} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites") / "run"
    asked = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.05},
        "place": {"device": "cpu", "threads": 1},
        "precision": "fp32",
        "evaluate": {"max_new_tokens": 4, "decoding": {"metric": "chrf", "temperature": [0, 1], "limit": 2}},
    }
    api.train(asked, data={"train": rows(24, 0), "validation": rows(2, 600), "test": rows(3, 300)}, out=folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    made = [
        {
            "question": f"colour {i}?",
            "choices": [" red", " green", " a blue one"],
            "label": i % 3,
            "text": f"The colour {i} is {COLOURS[i % 3]}. " * (40 if i == 5 else 1),
        }
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture(scope="module")
def theirs(run: Path, tiny_llama: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the library itself says of the merged model and of the base."""
    import warnings

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    merged = tmp_path_factory.mktemp("merged") / "model"
    api.export(run, merged, merge=True, data=rows(3, 300))
    names = ["choosing", "writing", "reading"]
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, folder in (("tuned", merged), ("base", tiny_llama)):
            manager = TaskManager(include_path=str(tasks), include_defaults=False)
            own = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
            found[model] = simple_evaluate(own, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    return found


@pytest.mark.parametrize("task", ["choosing", "writing", "reading"])
def test_values_are_those_of_the_library(task: str, run: Path, tasks: Path, theirs: dict[str, Any]) -> None:
    result = evaluate_suite(run, f"lm-eval:{task}", tasks=tasks)
    own = [record for record in result.records if record["data"] == task]
    expected = {
        (model, name): value
        for model in ("tuned", "base")
        for name, value in theirs[model][task].items()
        if "," in name and "stderr" not in name and isinstance(value, float | int)
    }
    assert len(expected) >= 4
    assert {(r["model"], r["metric"]): r["value"] for r in own} == pytest.approx(expected, rel=1e-4)
    assert {r["n"] for r in own} == {24}
    assert all(r["signature"].endswith(SIGNED[task]) for r in own)
    for record in own:
        if record["metric"] in ("mcc,none", "chrf,none"):
            assert record["low"] is None
            assert "of all rows at once" in record["reason"]
        else:
            assert record["low"] <= record["value"] <= record["high"]
    effects = {e["metric"]: e for e in result.effects if e["data"] == task}
    for metric, effect in effects.items():
        assert effect["difference"] == pytest.approx(
            expected["tuned", metric] - expected["base", metric], rel=1e-3, abs=1e-6
        )
        assert 0 <= effect["p"] <= 1
    assert effects


def test_it_is_a_flag_of_evaluate_and_its_numbers_stay(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(run), "--suite", "lm-eval:choosing", "--tasks", str(tasks), "--limit", "6", "--shots", "0"]
    named = "choosing-0shot-first6"  # beside the whole task, as it is asked by default
    assert main([*asked, "--no-base", "--json"]) == 0
    records = [r for r in json.loads(capsys.readouterr().out)["records"] if r["data"] == named]
    assert {(r["model"], r["n"]) for r in records} == {("tuned", 6)}
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert f"measured on {named}" in told
    assert "ways to draw answers" not in told, "a task says itself how its answers are drawn"
    kept = [r for r in json.loads((run / "evaluation.json").read_text()) if r["data"] == named]
    assert {(r["model"], r["n"]) for r in kept} == {("tuned", 6), ("base", 6)}
    assert {r["data"] for r in json.loads((run / "evaluation.json").read_text())} >= {"test", named}
    assert named in (run / "report.html").read_text()
    told = str(api.report(run, format="md"))
    assert f"**No better ({named}).** No better than its base: acc stayed at" in told
    assert "choosing version 1.5, 0-shot" in told


def test_what_cannot_be_measured_is_refused_in_a_line(
    run: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, *flags: str, of: Path = run) -> None:
        assert main(["evaluate", str(of), *flags]) == 2
        said = capsys.readouterr().err
        assert match in said
        assert "Traceback" not in said

    within = ("--tasks", str(tasks))
    refused("did you mean choosing?", "--suite", "lm-eval:chosing", *within)
    refused("the task absent cannot be had here", "--suite", "lm-eval:absent", *within)
    refused("names no task", "--suite", "lm-eval")
    refused("'helm' is no suite\nremedy: known: lm-eval; as in", "--suite", "helm:x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "typo.yaml").write_text("task: typo\nmetric_list: [\n")
    refused("typo.yaml:3:1: ", "--suite", "lm-eval:typo", "--tasks", str(tmp_path / "odd"))
    refused("is no folder", "--suite", "lm-eval:choosing", "--tasks", str(tmp_path / "none"))
    refused("--suite has its own", "--suite", "lm-eval:choosing", "--data", "rows.jsonl")
    refused("how to ask a standard task", "--limit", "3")
    unsafe = TASKS["choosing"].replace("FOLDER", str(tasks)).replace("task: choosing", "task: unsafe")
    (tmp_path / "unsafe.yaml").write_text(unsafe + "unsafe_code: true\n")
    refused("outside of a sandbox", "--suite", "lm-eval:unsafe", "--tasks", str(tmp_path))
    (tmp_path / "functions.py").write_text("def fail(doc, results):\n    raise KeyError('nothing')\n")
    broken = TASKS["choosing"].replace("FOLDER", str(tasks)).replace("task: choosing", "task: broken")
    (tmp_path / "broken.yaml").write_text(broken + "process_results: !function functions.fail\n")
    refused("broken cannot be measured", "--suite", "lm-eval:broken", "--tasks", str(tmp_path))
    odd = TASKS["choosing"].replace("FOLDER", str(tasks)).replace("task: choosing", "task: odd")
    (tmp_path / "odd.yaml").write_text(odd + "output_type: guessing\n")
    refused("remedy: mend the task's YAML file", "--suite", "lm-eval:odd", "--tasks", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused("pip install tunesmith[lm-eval]", "--suite", "lm-eval:choosing", *within)


def test_a_model_that_writes_nothing_is_refused(
    tiny_bert: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "model": str(tiny_bert),
        "objective": "classify",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1},
        "place": {"threads": 1},
        "precision": "fp32",
    }
    labelled = [{"text": row["prompt"], "label": row["completion"]} for row in rows(9, 0)]
    api.train(asked, data={"train": labelled}, out=tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--suite", "lm-eval:choosing", "--tasks", str(tasks)]) == 2
    assert "this model is of kind encoder, trained for classify" in capsys.readouterr().err
