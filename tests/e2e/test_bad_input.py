"""What a stranger may do wrong, through the command line: two lines, the right exit code, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.cli import main


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


def call(*words: str | Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


def told(done: Done) -> tuple[int, str]:
    """The exit code and the cause, once it is seen that a line of cause and one of remedy is all that was said."""
    said = [line for line in done.err.splitlines() if line.startswith(("error: ", "remedy: ", "Traceback"))]
    assert [line.partition(":")[0] for line in said] == ["error", "remedy"], done.err
    return done.code, said[0]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_rows(folder / "chat.jsonl", [{"question": f"q {i}?", "answer": "yes" if i % 2 else "no"} for i in range(20)])
    write_rows(folder / "chat-test.jsonl", [{"question": f"t {i}?", "answer": "yes"} for i in range(4)])
    write_rows(folder / "text.jsonl", [{"text": f"some text {i}"} for i in range(12)])
    write_rows(folder / "text-test.jsonl", [{"text": f"other text {i}"} for i in range(4)])
    write_rows(folder / "labels.jsonl", [{"text": f"a {i}", "label": "ab"[i % 2]} for i in range(12)])
    for name, model, data, rest in (
        (
            "chat",
            tiny_llama,
            "test: chat-test.jsonl, columns: {prompt: question, completion: answer}",
            "objective: sft",
        ),
        ("text", tiny_llama, "test: text-test.jsonl", "objective: sft"),
        ("labels", tiny_bert, "validation: 0.2", "objective: classify"),
    ):
        method = "head" if name == "labels" else "{name: lora, rank: 2}"
        answers = "" if name == "labels" else "evaluate: {max_new_tokens: 4}\n"
        (folder / f"{name}.yaml").write_text(
            f"model: {model}\ndata: {{train: {name}.jsonl, {data}}}\n{rest}\nmethod: {method}\n"
            f"train: {{max_steps: 2, batch_size: 4}}\n{answers}"
        )
    for name in ("code", "code-test"):
        rows = [{"prompt": f"{name} {i}?", "completion": "x = 1", "test": "assert x"} for i in range(9)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "code.yaml").write_text(
        f"model: {tiny_llama}\ndata: {{train: code.jsonl, test: code-test.jsonl}}\nobjective: sft\n"
        "method: {name: lora, rank: 2}\ntrain: {max_steps: 2}\nevaluate: {code: {tests: test}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    done = call("train", project / "chat.yaml", "--out", project / "run")
    assert done.code == 0, done.err
    return project / "run"


def test_plain_text_is_learned_and_measured_by_its_likelihood(project: Path) -> None:
    done = call("train", project / "text.yaml", "--out", project / "text-run", "--json")
    assert done.code == 0, done.err
    assert {record["metric"] for record in json.loads(done.out)["records"]} == {"loss", "perplexity"}
    exported, merged = project / "text-adapter", project / "text-merged"
    assert call("export", project / "text-run", "--to", exported).code == 0
    done = call("export", exported, "--to", merged, "--merge", "--data", project / "text-test.jsonl")
    assert "checked on 4 rows: 100.0%" in done.out, done.err


REFUSED: dict[str, tuple[str, str, str]] = {
    "no probabilities": ("chat", "evaluate.metrics=[ece]", "choices of each row's own, and the answer to"),
    "no answers": ("text", "evaluate.metrics=[exact_match]", "exact_match needs a reference, and"),
    "unknown metric to watch": ("labels", "train.early_stopping.metric=acuracy", "unknown metric 'acuracy'"),
    "sets to watch": ("labels", "train.early_stopping.metric=conformal_coverage", "and sets of labels are made when"),
    "programs that nothing counts": (
        "code",
        "evaluate.metrics=[exact_match]",
        "no metric counts those that pass: exact",
    ),
    "answers beyond the context": ("chat", "evaluate.max_new_tokens=512", "evaluate.max_new_tokens is 512, and"),
    "no room for text": ("labels", "train.sequence_length=2", "2 of 2 tokens are the tokenizer's own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_after_training_is_refused_before(case: str, project: Path, tmp_path: Path) -> None:
    recipe, override, cause = REFUSED[case]
    code, error = told(call("train", project / f"{recipe}.yaml", override, "--out", tmp_path / "run"))
    assert code == 2
    assert cause in error
    assert not (tmp_path / "run").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped bit": ("adapter_model.safetensors", flip, "damaged"),
    "truncated": ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-8]), "damaged"),
    "pickle": ("adapter_model.safetensors", lambda p: p.write_bytes(b"\x80\x04."), "damaged"),
    "gone": ("adapter_model.safetensors", Path.unlink, "missing"),
    "config": ("adapter_config.json", lambda p: p.write_text("{"), "damaged"),
    "card": ("tunesmith.json", lambda p: p.write_text("{}"), "damaged: it lacks base, method, objective, files"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_neither_answers_nor_is_gone_on_from(
    case: str, project: Path, run: Path, tmp_path: Path
) -> None:
    name, damage, wrong = DAMAGE[case]
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / "model" / name)
    for words in (
        ["predict", tmp_path / "run", "--input", project / "text-test.jsonl"],
        ["plan", project / "chat.yaml", f"model={tmp_path / 'run'}"],
    ):
        code, error = told(call(*words))
        assert code == 3
        assert f"{name} is {wrong}" in error


WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "other shape": (lambda w: w[:3].clone(), "model.layers.1.mlp.up_proj.weight is [3, 32], not [64, 32]"),
    "no numbers": (lambda w: torch.full_like(w, float("nan")), "not finite numbers"),
    "8 bits": (lambda w: w.to(torch.int8), "weights of 8 bits, such as model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used_leave_no_run(case: str, project: Path, tiny_llama: Path, tmp_path: Path) -> None:
    change, cause = WEIGHTS[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: change(tensors[name])}, model / "model.safetensors", {"format": "pt"})
    code, error = told(call("train", project / "chat.yaml", f"model={model}", "--out", tmp_path / "run"))
    assert code == 3
    assert cause in error
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_resume_names_what_changed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 17", "seed: 18"))
    code, error = told(call("resume", tmp_path / "run"))
    assert code == 3
    assert error.endswith("cannot go on as it began: train.seed was 17, is 18")


def test_answers_end_where_the_context_does(project: Path, run: Path) -> None:
    write_rows(project / "long.jsonl", [{"prompt": "x" * n} for n in (440, 100)] + [{"prompt": "x" * 100}])
    done = call("predict", run, "--input", project / "long.jsonl", "--max-new-tokens", "100000")
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert answers[1]["output"] == answers[2]["output"]
    assert all(answer["finished"] is False for answer in answers)
    write_rows(project / "longer.jsonl", [{"prompt": "hi"}, {"prompt": "x" * 600}])
    code, error = told(call("predict", run, "--input", project / "longer.jsonl"))
    assert code == 2
    assert "longer.jsonl:2: a prompt has" in error


def test_rows_to_answer_may_have_the_columns_of_the_recipe_or_the_usual_ones(project: Path, run: Path) -> None:
    outputs: list[str] = []
    for name, row in (("own", {"question": "q 1?"}), ("usual", {"prompt": "q 1?"})):
        write_rows(project / f"{name}.jsonl", [row])
        done = call("predict", run, "--input", project / f"{name}.jsonl")
        assert done.code == 0, done.err
        outputs.append(json.loads(done.out)["output"])
    assert outputs[0] == outputs[1]


@pytest.fixture(scope="module")
def classifier(project: Path) -> Path:
    done = call("train", project / "labels.yaml", "--out", project / "classifier")
    assert done.code == 0, done.err
    return project / "classifier"


def test_blank_labels_are_labels_that_are_not_known(project: Path, classifier: Path) -> None:
    (project / "new.csv").write_text("text,label\na 1,b\na 2,\n")
    done = call("predict", classifier, "--input", project / "new.csv")
    assert done.code == 0, done.err
    assert [json.loads(line)["reference"] for line in done.out.splitlines()] == ["b", None]


def test_an_exported_classifier_is_measured_as_the_run_is(project: Path, classifier: Path) -> None:
    exported = project / "exported-classifier"
    assert call("export", classifier, "--to", exported).code == 0
    measured: list[list[dict[str, Any]]] = []
    for model in (classifier, exported):
        done = call("evaluate", model, "--data", project / "labels.jsonl", "--json")
        assert done.code == 0, done.err
        measured.append([r for r in json.loads(done.out)["records"] if r["model"] == "tuned" and r["data"] == "labels"])
    assert [(r["metric"], r["value"]) for r in measured[0]] == [(r["metric"], r["value"]) for r in measured[1]]


MISMATCHED: dict[str, tuple[list[str], str]] = {
    "text to a model that answers": (["predict", "{run}", "--input", "text-test.jsonl"], "asks nothing of a model"),
    "labels to a model that answers": (["evaluate", "{run}", "--data", "labels.jsonl"], "no column 'question'"),
    "a question to a classifier": (["predict", "{classifier}", "--input", "ask.jsonl"], "no text to be read"),
    "questions to a classifier": (["evaluate", "{classifier}", "--data", "chat-test.jsonl"], "no known format"),
    "no labels to measure by": (["evaluate", "{classifier}", "--data", "text.jsonl"], "accuracy needs a reference"),
    "lists of labels to a model that gives one": (
        ["evaluate", "{classifier}", "--data", "lists.jsonl"],
        "lists.jsonl:1: this row has a list of labels, and the training rows have one label each",
    ),
    "unknown metric": (
        ["evaluate", "{classifier}", "--data", "labels.jsonl", "--metrics", "f2"],
        "unknown metric 'f2'",
    ),
    "columns of no corpus": (
        ["predict", "{classifier}", "--input", "labels.jsonl", "--corpus-columns", "id=doc"],
        "--corpus-columns is given, and no file that it is of",
    ),
    "columns that are no pairs": (
        ["predict", "{classifier}", "--input", "labels.jsonl", "--corpus-columns", "doc"],
        "it must be names and columns, as in id=doc_id,text=body",
    ),
    "no metric": (["evaluate", "{classifier}", "--data", "labels.jsonl", "--metrics", ","], "it names none"),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_rows_that_a_model_cannot_read_are_refused_before_it_runs(
    case: str, project: Path, run: Path, classifier: Path
) -> None:
    words, cause = MISMATCHED[case]
    write_rows(project / "ask.jsonl", [{"prompt": "q?"}])
    write_rows(project / "lists.jsonl", [{"text": "a 1", "labels": ["a"]}])
    given = [str(project / word) if word.endswith(".jsonl") else word for word in words]
    done = call(*(word.format(run=run, classifier=classifier) for word in given))
    code, error = told(done)
    assert code == 2
    assert cause in error
    assert "evaluating" not in done.out


def test_a_plugin_that_ends_the_program_does_not_end_ours(project: Path) -> None:
    (project / "leaves.py").write_text("raise SystemExit(7)\n")
    code, error = told(call("plan", project / "chat.yaml", "--plugin", project / "leaves.py"))
    assert code == 2
    assert "fails: SystemExit" in error
