"""The command line over tiny models: every verb, what it prints, and how it fails."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli import main
from tunesmith.cli.arguments import VERBS

COLOURS = ("red", "green", "blue", "black", "white", "brown")
METRIC = """
from typing import ClassVar

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import quotient


@METRICS.register("words_answered")
class AnswerLength:
    name: ClassVar[str] = "words_answered"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[str] = "mean"
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    def __init__(self, labels):
        pass

    def statistics(self, prediction):
        return (float(len(prediction.output)), 1.0)

    def aggregate(self, sums):
        return quotient(sums)
"""


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(*words: str | Path) -> Done:
    """One command in this process, its output caught."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    """A folder with data and a recipe for each of both models."""
    folder = tmp_path_factory.mktemp("project")
    chat = [{"prompt": f"colour {i}?", "completion": COLOURS[i % 6]} for i in range(40)]
    write_rows(folder / "chat.jsonl", chat)
    write_rows(folder / "test.jsonl", [{"prompt": f"which {i}?", "completion": COLOURS[i % 6]} for i in range(6)])
    write_rows(folder / "ask.jsonl", [{"prompt": "colour 1?"}, {"prompt": "colour 2?"}])
    write_rows(
        folder / "labels.jsonl", [{"text": f"a {COLOURS[i % 2]} {i}", "label": COLOURS[i % 2]} for i in range(30)]
    )
    (folder / "chat.yaml").write_text(
        f"model: {tiny_llama}\ndata: {{train: chat.jsonl, validation: 0.1, test: test.jsonl}}\nobjective: sft\n"
        "method: {name: lora, rank: 2}\ntrain: {max_steps: 4, batch_size: 8}\nevaluate: {max_new_tokens: 4}\n"
    )
    (folder / "labels.yaml").write_text(
        f"model: {tiny_bert}\ndata: {{train: labels.jsonl, validation: 0.2}}\nobjective: classify\nmethod: head\n"
        "train: {epochs: 2}\n"
    )
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Done:
    return call("train", project / "chat.yaml", "method.rank=4", "--out", project / "chat-run", "seed=3")


@pytest.fixture(scope="module")
def run(project: Path, trained: Done) -> Path:
    assert trained.code == 0, trained.err
    return project / "chat-run"


@pytest.fixture(scope="module")
def classifier(project: Path) -> Path:
    done = call("train", project / "labels.yaml", "--out", project / "labels-run", "--json")
    assert done.code == 0, done.err
    return project / "labels-run"


# ---------------------------------------------------------------- help


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "rich", "tunesmith.api")
    code = (
        "import sys; from tunesmith.cli import main; code = main(['--help']); "
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begun < 2.0
    assert done.stderr.strip() == "[]"
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_json_and_debug(verb: str) -> None:
    done = call(verb, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert "--debug" in done.out


# ---------------------------------------------------------------- verbs


def test_plan_shows_what_training_will_do_in_80_columns(project: Path) -> None:
    done = call("plan", project / "chat.yaml")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    for word in ("licence", "train", "validation", "duplicates", "micro-batch", "resume", "learning_rate", "plan "):
        assert word in done.out
    assert "⟦" in done.out
    assert "<|im_end|>⟧" in done.out
    assert not (project / "runs").exists()


def test_plan_as_json_has_the_hash_that_the_run_records(project: Path, run: Path) -> None:
    planned = call("plan", project / "chat.yaml", "method.rank=4", "seed=3", "--json").json
    assert planned["hash"] == json.loads((run / "plan.json").read_text())["hash"]
    assert planned["hash"] != call("plan", project / "chat.yaml", "method.rank=4", "--json").json["hash"]


def test_train_prints_plain_lines_and_ends_with_results_and_the_next_commands(trained: Done, run: Path) -> None:
    assert trained.code == 0, trained.err
    assert "\x1b" not in trained.out
    for text in ("step 1/4", "step 4/4", "smoothed", "tokens/s", "GiB", "expected", "answered", "validation after"):
        assert text in trained.out
    assert "measured on test" in trained.out
    assert f"model:  {run / 'model'}" in trained.out
    assert f"tunesmith predict {run}" in trained.out
    recipe = (run / "recipe.yaml").read_text()
    assert "rank: 4" in recipe
    assert "seed: 3" in recipe


def test_train_as_json_puts_nothing_but_json_on_stdout(project: Path) -> None:
    done = call("train", project / "chat.yaml", "train.max_steps=1", "--json", "--out", project / "json-run")
    assert done.code == 0, done.err
    assert done.json["run"] == str(project / "json-run")
    assert {record["model"] for record in done.json["records"]} == {"base", "tuned"}
    assert "step 1/1" in done.err


def test_a_result_without_test_set_says_so(classifier: Path) -> None:
    done = call("evaluate", classifier)
    assert "warning: there is no test set" in done.out
    assert "majority" in done.out


def test_resume_of_a_finished_run_shows_its_result_and_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = call("resume", run, "--json")
    assert done.code == 0, done.err
    assert done.json["records"] == json.loads((run / "evaluation.json").read_text())
    assert done.json["effects"] == json.loads((run / "comparison.json").read_text())
    record = {"model", "data", "group", "metric", "value", "low", "high", "n", "reason", "signature"}
    assert all(set(entry) == {*record, "in_train", "in_validation"} for entry in done.json["records"])
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_stopped_by_a_signal_exits_75_and_goes_on_to_the_same_numbers(
    project: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = project / "stopped-run"
    stop_at(monkeypatch, "step", signal.SIGTERM)
    words = (project / "chat.yaml", "method.rank=4", "seed=3", "--out", stopped)
    done = call("train", *words)
    monkeypatch.undo()
    assert done.code == 75
    assert is_two_lines(done)
    assert f"tunesmith resume {stopped}" in done.err
    assert call("resume", stopped).code == 0
    assert (stopped / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    for name in ("evaluation.json", "comparison.json"):
        assert (stopped / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_measuring_is_obeyed_at_once(
    project: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = project / f"measuring-{number.name}"
    stop_at(monkeypatch, "evaluating", number)
    done = call("train", project / "chat.yaml", "train.max_steps=1", "--out", stopped)
    monkeypatch.undo()
    assert done.code == 75
    assert is_two_lines(done)
    assert not (stopped / "evaluation.json").exists()
    assert call("resume", stopped, "--json").code == 0


@pytest.mark.parametrize("where", ["step", "evaluating"])
def test_a_cross_validation_stopped_by_a_signal_goes_on_by_the_same_command(
    project: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("crossval", project / "chat.yaml", "train.max_steps=1", "data.validation=null", "data.test=null")
    words = (*words, "--folds", "2", "--out", project / f"crossval-{where}")
    stop_at(monkeypatch, where, signal.SIGTERM)
    done = call(*words)
    monkeypatch.undo()
    assert done.code == 75, done.err
    assert is_two_lines(done)
    assert "remedy: go on with the same command" in done.err
    assert call(*words, "--json").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_base_loads_leaves_nothing(
    project: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, mine = project / f"loading-{number.name}", project / f"empty-{number.name}"
    mine.mkdir()
    for folder in (stopped, mine):
        stop_at(monkeypatch, "loading", number)
        done = call("train", project / "chat.yaml", "train.max_steps=1", "--out", folder)
        monkeypatch.undo()
        assert done.code == code
        assert is_two_lines(done)
        assert "nothing was left half done; run it again" in done.err
    assert not stopped.exists()
    assert call("train", project / "chat.yaml", "train.max_steps=1", "--out", mine).code == 0  # the user's own folder


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str, number: signal.Signals) -> None:
    """A signal to this process at the first event or phase called `where`."""
    from tunesmith.report.live import View

    sent: list[int] = []
    shown = View.listen
    if number == signal.SIGINT:  # a job in the background of a script is started with it ignored
        signal.signal(number, signal.default_int_handler)

    def listen(self: View, event: str, data: Mapping[str, Any]) -> None:
        shown(self, event, data)
        if where in (event, data.get("name")) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(View, "listen", listen)


def test_predict_writes_a_line_a_row(project: Path, run: Path) -> None:
    done = call("predict", run, "--input", project / "test.jsonl", "--max-new-tokens", "3")
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["reference"] for answer in answers] == list(COLOURS)
    assert [answer["where"] for answer in answers] == [f"test.jsonl:{i}" for i in range(1, 7)]


def test_predict_needs_no_answers_and_writes_a_file_whole(project: Path, run: Path) -> None:
    output = project / "answers.jsonl"
    done = call("predict", run, "--input", project / "ask.jsonl", "--output", output, "--json")
    assert done.json == {"run": str(run), "rows": 2, "output": str(output)}
    assert [json.loads(line)["reference"] for line in output.read_text().splitlines()] == [None, None]


def test_answers_do_not_replace_the_rows_that_they_are_of(project: Path, run: Path) -> None:
    before = (project / "test.jsonl").read_bytes()
    done = call("predict", run, "--input", project / "test.jsonl", "--output", project / "." / "test.jsonl")
    assert done.code == 2
    assert "is the file of the rows, which the answers would replace" in done.err
    assert (project / "test.jsonl").read_bytes() == before


def test_labels_that_the_model_does_not_know_are_counted_and_told(project: Path, classifier: Path) -> None:
    copy = project / "strange"
    shutil.copytree(classifier, copy)
    rows = [json.loads(line) for line in (project / "labels.jsonl").read_text().splitlines()[:4]]
    write_rows(project / "strange.jsonl", [*rows, {"text": "new", "label": "never seen"}])
    done = call("evaluate", copy, "--data", project / "strange.jsonl")
    assert done.code == 0, done.err
    told = "have labels that the model does not know, so they count as wrong"
    assert f"warning: 1 of 5 rows of strange {told}" in done.out
    assert f"1 of these 5 rows {told}" in call("report", copy, "--format", "md").out


def test_predict_writes_rows_for_another_model_to_learn_from(project: Path, run: Path, classifier: Path) -> None:
    done = call("predict", run, "--input", project / "test.jsonl", "--rows", "--json")
    rows = done.json["predictions"]
    answers = call("predict", run, "--input", project / "test.jsonl", "--json").json["predictions"]
    whole = [answer for answer in answers if answer.get("finished", True)]
    assert [row["messages"][-1] for row in rows] == [
        {"role": "assistant", "content": answer["output"]} for answer in whole
    ]
    assert all(row["messages"][0]["role"] == "user" for row in rows)
    cut = call("predict", run, "--input", project / "test.jsonl", "--rows", "--max-new-tokens", "1")
    assert "6 answers were cut off, and their rows left out: test.jsonl:1, " in cut.err
    assert cut.out == ""
    done = call("predict", classifier, "--input", project / "labels.jsonl", "--rows")
    assert (done.code, "a model for classify gives none" in done.err) == (2, True)
    left = call("predict", run, "--input", project / "test.jsonl", "--rows", "--max-new-tokens", "1", "--json").json
    assert left["left_out"] == [f"test.jsonl:{i}" for i in range(1, 7)]


def test_predict_of_a_classifier_gives_probabilities_that_sum_to_one(project: Path, classifier: Path) -> None:
    answers = call("predict", classifier, "--input", project / "labels.jsonl", "--json").json["predictions"]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert max(answer["probabilities"], key=answer["probabilities"].get) == answer["output"]


def test_evaluate_on_other_rows_adds_their_records(project: Path, run: Path) -> None:
    copy = project / "evaluated"
    shutil.copytree(run, copy)
    write_rows(project / "more.jsonl", [{"prompt": f"more {i}?", "completion": "red"} for i in range(3)])
    done = call("evaluate", copy, "--data", project / "more.jsonl", "--metrics", "loss, exact_match", "--json")
    assert done.code == 0, done.err
    added = [record for record in done.json["records"] if record["data"] == "more"]
    assert [(r["model"], r["metric"], r["n"]) for r in added] == [
        (model, metric, 3) for model in ("base", "tuned") for metric in ("loss", "exact_match")
    ]
    alone = call("evaluate", copy, "--data", project / "more.jsonl", "--no-base", "--json").json
    assert {r["model"] for r in alone["records"] if r["data"] == "more"} == {"tuned"}
    assert {r["in_train"] for r in alone["records"]} == {0}


def test_rows_that_the_run_was_trained_on_are_counted_and_told(project: Path, run: Path) -> None:
    copy = project / "seen"
    shutil.copytree(run, copy)
    seen = [{"prompt": f"COLOUR  {i}?", "completion": "red"} for i in range(40)]  # nine of ten; the others validate
    write_rows(project / "seen.jsonl", [*seen, {"prompt": "new?", "completion": "red"}])
    done = call("evaluate", copy, "--data", project / "seen.jsonl")
    assert done.code == 0, done.err
    told = "36 of 41 rows of seen stand in the training rows too"
    assert f"warning: {told}" in done.out
    assert "4 of 41 rows of seen stand in the validation rows too" in done.out
    records = call("evaluate", copy, "--json").json["records"]
    assert {(r["in_train"], r["in_validation"]) for r in records if r["data"] == "seen"} == {(36, 4)}
    page = call("report", copy, "--format", "md").out
    assert told.replace("rows of seen", "rows").replace("36 of", "36 of these") in page
    assert "36 of which it was trained on, 4 of which also chose the checkpoint" in page
    assert "4 of these 41 rows are validation rows" in page
    for name in ("train.keys", "validation.keys"):
        (copy / name).unlink()  # a run of before they were kept
    unknown = call("evaluate", copy, "--data", project / "seen.jsonl", "--json").json["records"]
    assert {(r["in_train"], r["in_validation"]) for r in unknown if r["data"] == "seen"} == {(None, None)}


def test_evaluate_on_one_row_knows_no_spread_and_says_so(project: Path, run: Path) -> None:
    copy = project / "one-row"
    shutil.copytree(run, copy)
    write_rows(project / "one.jsonl", [{"prompt": "one?", "completion": "red"}])
    done = call("evaluate", copy, "--data", project / "one.jsonl")
    assert done.code == 0, done.err
    assert "loss (tuned) on one: no interval: 1 row, and it takes 5" in done.out


def contents(run: Path, *besides: str) -> dict[str, bytes]:
    """The files of a run but those that measuring writes."""
    paths = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] not in besides]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def test_evaluate_leaves_the_training_as_it_was(project: Path, run: Path) -> None:
    copy = project / "untouched"
    shutil.copytree(run, copy)
    write_rows(project / "later.jsonl", [{"prompt": f"later {i}?", "completion": "red"} for i in range(3)])
    measured = ("evaluation.json", "comparison.json", "details.json", "predictions", "report.html")
    before, records = contents(copy, *measured), json.loads((copy / "evaluation.json").read_text())
    words = ["evaluate", copy, "--data", project / "later.jsonl", "--name", "week-2"]
    assert call(*words, "--keep", "2").code == 0
    after = contents(copy, *measured)
    cards = {"model/MODEL_CARD.md", "model/README.md"}  # they list what was measured
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == cards
    added = json.loads((copy / "evaluation.json").read_text())
    assert [record for record in added if record["data"] != "week-2"] == records
    (copy / "evaluation.json").write_text(json.dumps(sorted(added, key=lambda record: record["data"] != "week-2")))
    page = call("report", copy, "--format", "md").out  # measured first or not, the recipe's own set leads
    assert 0 < page.index("## Before and after: test") < page.index("## Before and after: week-2")
    (copy / "evaluation.json").write_text(json.dumps(added))
    assert {record["n"] for record in added if record["data"] == "week-2"} == {3}
    kept = copy / "predictions" / "week-2.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    assert call(*words, "--keep", "all").code == 0
    assert len(kept.read_text().splitlines()) == 3
    write_rows(project / "later.jsonl", [{"prompt": f"others {i}?", "completion": "red"} for i in range(3)])
    refused = call(*words)
    assert refused.code == 2
    assert "was measured on other rows under the name 'week-2'" in refused.err
    assert len(kept.read_text().splitlines()) == 3
    assert call(*words[:-1], "week-3", "--keep", "0").code == 0
    assert not (copy / "predictions" / "week-3.jsonl").exists()


@pytest.fixture(scope="module")
def rival(project: Path) -> Path:
    done = call("train", project / "chat.yaml", "train.learning_rate=0.02", "--out", project / "rival-run", "seed=3")
    assert done.code == 0, done.err
    return project / "rival-run"


def test_compare_tests_two_runs_on_the_rows_that_both_answered(
    project: Path, run: Path, rival: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [contents(path) for path in (run, rival)]
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))
    done = call("compare", run, rival)
    assert done.code == 0, done.err
    assert "rival-run against chat-run" in done.out
    assert "test: 6 rows that all answered" in done.out
    page = project / "compared.html"
    found = call("compare", run, rival, "--metrics", "loss", "--base", "--out", page, "--json").json
    assert found["page"] == str(page)
    stored = {
        (path.name, record["metric"]): record["value"]
        for path in (run, rival)
        for record in json.loads((path / "evaluation.json").read_text())
        if record["model"] == "tuned"
    }
    tests = {(test["before"], test["after"]): test for test in found["tests"]}
    assert set(tests) == {("chat-run", "rival-run"), ("base", "chat-run"), ("base", "rival-run")}
    gap = stored["rival-run", "loss"] - stored["chat-run", "loss"]
    assert tests["chat-run", "rival-run"]["difference"] == pytest.approx(gap, rel=1e-6)
    assert "rival-run against chat-run on test" in page.read_text()
    done = call("compare", run, rival, "--open")
    assert opened == [Path(done.out.splitlines()[-1].removeprefix("page: ")).resolve().as_uri()]
    assert [contents(path) for path in (run, rival)] == before


def test_models_lists_the_catalog() -> None:
    found = {model["name"]: model for model in call("models", "--json").json}
    assert found["smollm2-135m-instruct"]["licence"] == "Apache-2.0"
    text = call("models").out
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in found)


def test_schema_is_that_of_a_recipe() -> None:
    schema = call("schema").json
    assert schema["title"] == "tunesmith recipe"
    assert "lora" in json.dumps(schema["properties"]["method"])
    assert call("schema", "--json").json == schema


def test_a_plugin_registers_a_metric_that_a_recipe_uses(project: Path) -> None:
    plugin = project / "length.py"
    plugin.write_text(METRIC)
    words = (project / "chat.yaml", "train.max_steps=1", "evaluate.metrics=[words_answered]")
    planned = call("plan", *words, "--plugin", plugin, "--json")
    assert planned.json["metrics"] == ["words_answered"]
    done = call("train", *words, "--plugin", plugin, "--out", project / "plugin-run", "--json")
    assert done.code == 0, done.err
    assert {record["metric"] for record in done.json["records"]} == {"words_answered"}
    manifest = json.loads((project / "plugin-run" / "manifest.json").read_text())
    assert list(manifest["plugins"]) == ["length.py"]


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("raise ValueError('boom')", r"--plugin .*odd\.py:\d+ fails: ValueError: boom\nremedy: mend the file"),
        ("return (float('nan'), 1.0)", r"odd_words has no finite number for a row of .*\nremedy: mend the metric"),
    ],
)
def test_a_metric_of_a_plugin_that_fails_is_told_before_training(project: Path, does: str, told: str) -> None:
    body = METRIC.replace("return (float(len(prediction.output)), 1.0)", does).replace("words_answered", "odd_words")
    (project / "odd.py").write_text(body.replace("odd_words", f"odd_words_{len(does)}"))
    words = ["train", project / "chat.yaml", f"evaluate.metrics=[odd_words_{len(does)}]"]
    done = call(*words, "--plugin", project / "odd.py", "--out", project / "odd-run")
    assert done.code == 2
    assert re.search(told.replace("odd_words", r"odd_words_\d+"), done.err), done.err
    assert not (project / "odd-run").exists()


# ---------------------------------------------------------------- failures


def is_two_lines(done: Done) -> bool:
    """A line of cause and one of remedy are the last things on stderr (a slow machine tells of waiting before)."""
    kinds = [line.partition(": ")[0] for line in done.err.splitlines()]
    return kinds[-2:] == ["error", "remedy"] and kinds.count("error") == 1 and "Traceback" not in done.err


WRONG: dict[str, tuple[int, str, list[str]]] = {
    "no recipe": (2, "no file", ["plan", "{project}/chta.yaml"]),
    "no recipe given": (2, "RECIPE", ["train"]),
    "unknown key": (2, "learning_rate", ["plan", "{project}/chat.yaml", "train.learning_rat=1"]),
    "no override": (2, "key=value", ["plan", "{project}/chat.yaml", "epochs"]),
    "empty data": (2, "empty.jsonl", ["plan", "{project}/chat.yaml", "data.train={project}/empty.jsonl"]),
    "leaking test": (3, "stand in train", ["plan", "{project}/chat.yaml", "data.test={project}/chat.jsonl"]),
    "pickled model": (3, "pickle", ["plan", "{project}/chat.yaml", "model={project}/pickled"]),
    "one class": (2, "label", ["plan", "{project}/labels.yaml", "data.train={project}/one-class.jsonl"]),
    "unknown metric": (2, "exact_match", ["plan", "{project}/chat.yaml", "evaluate.metrics=[exact_mach]"]),
    "run exists": (2, "holds a run", ["train", "{project}/chat.yaml", "--out", "{run}"]),
    "folder is full": (2, "not empty", ["train", "{project}/chat.yaml", "--out", "{project}"]),
    "no run to resume": (2, "not a run", ["resume", "{project}"]),
    "no run to evaluate": (2, "there is no folder", ["evaluate", "{project}/nowhere"]),
    "no model to ask": (2, "no model", ["predict", "{project}", "--input", "{project}/ask.jsonl"]),
    "no input": (2, "nothing.jsonl", ["predict", "{run}", "--input", "{project}/nothing.jsonl"]),
    "no folder for output": (
        2,
        "--output",
        ["predict", "{run}", "--input", "{project}/ask.jsonl", "--output", "/no/f"],
    ),
    "no token": (2, "at least 1", ["predict", "{run}", "--input", "{project}/ask.jsonl", "--max-new-tokens", "0"]),
    "no number": (2, "at least 1", ["predict", "{run}", "--input", "{project}/ask.jsonl", "--max-new-tokens", "x"]),
    "no plugin": (2, "--plugin", ["plan", "{project}/chat.yaml", "--plugin", "{project}/none.py"]),
    "broken plugin": (2, "ZeroDivisionError", ["schema", "--plugin", "{project}/broken.py"]),
    "nothing to compare": (2, "RUN", ["compare"]),
    "no run to compare": (2, "there is no folder", ["compare", "{run}", "{project}/nowhere"]),
    "itself to compare": (2, "given twice", ["compare", "{run}", "{run}"]),
    "no set of both": (2, "was not measured on 'late'", ["compare", "{run}", "--data", "late"]),
    "a page into a folder": (2, "is a folder", ["compare", "{run}", "--out", "{project}"]),
    "a page into no folder": (2, "no folder /no for --out", ["compare", "{run}", "--out", "/no/page.html"]),
    "answers to keep of nothing": (2, "--keep", ["evaluate", "{run}", "--keep", "3"]),
    "some answers to keep": (2, "`all`", ["evaluate", "{run}", "--data", "{project}/ask.jsonl", "--keep", "some"]),
    "metrics of nothing": (2, "--data", ["evaluate", "{run}", "--metrics", "loss"]),
    "unknown verb": (2, "did you mean train?", ["trian"]),
    "unknown flag": (2, "did you mean --json?", ["models", "--jsn"]),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_two_lines_and_an_exit_code(case: str, as_json: bool, project: Path, run: Path) -> None:
    (project / "empty.jsonl").write_text("")
    (project / "broken.py").write_text("1 / 0\n")
    write_rows(project / "one-class.jsonl", [{"text": f"text {i}", "label": "red"} for i in range(9)])
    pickled = project / "pickled"
    if not pickled.exists():
        model = next(line for line in (project / "chat.yaml").read_text().splitlines() if line.startswith("model"))
        shutil.copytree(model.removeprefix("model: "), pickled)
        (pickled / "model.safetensors").unlink()
        (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, text, words = WRONG[case]
    done = call(*(word.format(project=project, run=run) for word in words), *(["--json"] if as_json else []))
    assert done.code == code, done.err
    if as_json:
        assert set(done.json) == {"error", "remedy", "exit_code"}
        assert done.json["exit_code"] == code
        assert text in done.json["error"] + done.json["remedy"]
    else:
        assert is_two_lines(done), done.err
        assert text in done.err
        assert done.out == ""


def test_several_problems_are_a_line_each(project: Path) -> None:
    done = call("plan", project / "chat.yaml", "train.epoch=1", "sed=3")
    assert done.code == 2
    assert [line.partition(":")[0] for line in done.err.splitlines()] == ["error", "error", "remedy"]


def test_a_held_run_is_out_of_a_resource(run: Path) -> None:
    from tunesmith.rundir import RunDir

    with RunDir(run).hold():
        done = call("resume", run)
    assert done.code == 4
    assert is_two_lines(done)
    assert str(os.getpid()) in done.err


def test_an_unfinished_run_has_no_model_to_ask(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = project / "unfinished"
    stop_at(monkeypatch, "step", signal.SIGINT)
    assert call("train", project / "chat.yaml", "--out", unfinished).code == 75
    monkeypatch.undo()
    done = call("predict", unfinished, "--input", project / "ask.jsonl")
    assert done.code == 2
    assert f"`tunesmith resume {unfinished}`" in done.err
    done = call("evaluate", unfinished)
    assert (done.code, done.out) == (2, "")
    assert f"{unfinished} is not finished" in done.err
    assert f"`tunesmith resume {unfinished}`" in done.err


def test_a_mistyped_name_is_told_with_its_line(project: Path) -> None:
    text = (project / "chat.yaml").read_text()
    (project / "typo.yaml").write_text(text.replace("name: lora", "name: loar"))
    line = 1 + text[: text.index("name: lora")].count("\n")
    done = call("plan", project / "typo.yaml")
    assert done.code == 2
    assert done.err.startswith(f"error: typo.yaml:{line}: unknown method 'loar'\nremedy: did you mean 'lora'?")
    assert call("plan", project / "chat.yaml", "objective=sfft").err.startswith(
        "error: command line: unknown objective"
    )


RAISED: list[tuple[Callable[[], BaseException], int, str]] = [
    (KeyboardInterrupt, 130, "interrupted"),
    (MemoryError, 4, "out of memory"),
    (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 4, "memory"),
    (lambda: OSError(errno.ENOSPC, "No space left on device", "/there"), 4, "the disk is full while writing /there"),
    (lambda: OSError(errno.EROFS, "Read-only file system", "/there"), 4, "/there: Read-only file system"),
    (lambda: ValueError("first line\nsecond line"), 1, "tunesmith failed: ValueError: first line"),
]


@pytest.mark.parametrize(("make", "code", "text"), RAISED)
def test_whatever_is_raised_ends_in_two_lines(
    make: Callable[[], BaseException], code: int, text: str, project: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise make()

    monkeypatch.setattr("tunesmith.api.predict", fails)
    words = ("predict", run, "--input", project / "ask.jsonl")
    done = call(*words)
    assert done.code == code
    assert is_two_lines(done), done.err
    assert text in done.err
    debugged = call(*words, "--debug")
    assert "Traceback" in debugged.err
    assert debugged.err.endswith(done.err)


def test_a_name_with_an_escape_sequence_does_not_reach_the_terminal(tmp_path: Path) -> None:
    done = call("plan", f"{tmp_path}/\x1b[2Jrecipe.yaml")
    assert done.code == 2
    assert "\x1b" not in done.err
    assert "\\x1b[2J" in done.err


def test_a_reader_who_leaves_ends_the_command_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
