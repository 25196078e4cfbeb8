"""What README and docs/ tell a reader to run is run, with tiny models in place of the real ones."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tunesmith import compat
from tunesmith.cli import main
from tunesmith.data.formats import FORMATS, rows
from tunesmith.data.read import read
from tunesmith.recipe import Data
from tunesmith.recipe_problems import find_problems
from tunesmith.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ("red", "green", "blue")


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """Each fenced block of a language: what stands behind the language's name, and its text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def write_rows(path: Path, kept: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


@pytest.fixture
def stand_in(nameable: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In an empty folder: a text with tiny models in place of those that it names."""
    monkeypatch.chdir(tmp_path)

    def replaced(text: str) -> str:
        return text.replace("smollm2-135m-instruct", str(nameable)).replace("all-minilm-l6-v2", str(tiny_bert))

    return replaced


def test_every_example_of_the_python_api_runs(stand_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("docs/api.md", "python")
    assert len(found) >= 8
    names: dict[str, Any] = {}
    for number, (_, text) in enumerate(found, 1):
        exec(compile(stand_in(text), f"docs/api.md, example {number}", "exec"), names)
    said = capsys.readouterr().out
    for word in ("stopped after step 3, as asked", "unknown method 'lorra'", "did you mean 'lora'?"):
        assert word in said


# ---------------------------------------------------------------- README


@pytest.fixture
def project(stand_in: Any, tmp_path: Path) -> Path:
    """README's recipe beside data as it names them; one short epoch."""
    recipe = next(text for _, text in blocks("README.md", "yaml") if text.startswith("model:"))
    assert len(recipe.splitlines()) == 5
    (tmp_path / "recipe.yaml").write_text(stand_in(recipe))
    asked = [{"prompt": f"Colour {i}?", "completion": COLOURS[i % 3]} for i in range(60)]
    for name, part in (("tickets", asked[:48]), ("tickets-test", asked[48:54]), ("more", asked[54:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    write_rows(tmp_path / "new.jsonl", [{"prompt": "Colour 61?"}])
    return tmp_path


def commands(page: str) -> list[list[str]]:
    """The words of each `tunesmith ...` line of a page's blocks, comments left out."""
    lines = [line for _, text in blocks(page, "") for line in text.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["tunesmith"]]


def test_every_command_of_the_readme_runs_in_its_order(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    found = commands("README.md")
    verbs = {words[0] for words in found}
    assert verbs >= {"plan", "train", "resume", "evaluate", "predict", "export", "chat", "report"}
    for words in found:
        if compat.gguf_remedy() and any(word.endswith(".gguf") for word in words):
            continue  # refused with transformers 5.17
        for name in words[1:3] if words[0] == "compare" else ():
            shutil.copytree("runs/recipe", name)
        monkeypatch.setattr("sys.stdin", io.StringIO("Where is my parcel?\n"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        assert code == 0, f"{words}: {err.getvalue()}"
        assert out.getvalue(), words
    assert [Path(page).name for page in opened] == ["compare.html", "report.html"]
    assert (project / "runs" / "recipe" / "report.html").is_file()


def test_the_python_of_the_readme_runs(stand_in: Any) -> None:
    import tunesmith

    kept = [{"prompt": f"Colour {i}?", "completion": COLOURS[i % 3]} for i in range(30)]
    earlier = {"model": stand_in("smollm2-135m-instruct"), "objective": "sft", "method": "lora", "train": {"epochs": 1}}
    tunesmith.train(earlier, data={"train": kept[:24], "test": kept[24:]}, out="runs/earlier")
    for _, text in blocks("README.md", "python"):
        names: dict[str, Any] = {"rows": kept[:24], "held_out": kept[24:]}
        exec(compile(stand_in(text), "README.md", "exec"), names)
        assert names["answers"][0].where == "rows[0]"


def test_make_has_every_target_that_a_page_names() -> None:
    pages = " ".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "CONTRIBUTING.md"))
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, flags=re.MULTILINE))
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["demo"], ["demo", "--quick"]])
def test_the_demo_runs(words: list[str], stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import demo

    real, kept = demo.recipe, demo.rows

    def short(quick: bool) -> dict[str, Any]:
        asked = real(quick)
        train = {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 4}
        evaluate = {**asked.get("evaluate", {}), "limit": 4, **({} if quick else {"max_new_tokens": 4})}
        return {**asked, "model": stand_in(asked["model"]), "train": train, "evaluate": evaluate}

    def few(quick: bool) -> dict[str, Any]:
        return {split: found[: 60 if quick else 12] for split, found in kept(quick).items()}

    monkeypatch.setattr(demo, "recipe", short)
    monkeypatch.setattr(demo, "rows", few)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    assert "measured on test" in out.getvalue()


# ---------------------------------------------------------------- docs/data.md


SAMPLES = [("jsonl", *block) for block in blocks("docs/data.md", "jsonl")] + [
    ("csv", *block) for block in blocks("docs/data.md", "csv")
]


def test_every_format_has_a_sample() -> None:
    assert {said.strip() for _, said, _ in SAMPLES} == {f"format={name}" for name in FORMATS}


@pytest.mark.parametrize(("kind", "said", "text"), SAMPLES)
def test_every_sample_is_read_as_what_it_is_said_to_be(kind: str, said: str, text: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{kind}").write_text(text)
    columns = {"text": "body", "label": "queue"} if kind == "csv" else {}
    named = "passage" if "passage" in said else None  # a corpus is named, never guessed
    found, kept = rows(read(f"rows.{kind}", tmp_path), named, columns)
    assert f"format={found}" == said.strip()
    assert len(list(kept)) == len(text.strip().splitlines()) - (kind == "csv")


@pytest.mark.parametrize("text", [text for _, text in blocks("docs/data.md", "yaml")])
def test_every_recipe_of_the_data_page_is_right(text: str) -> None:
    assert find_problems(read_yaml(text, "data.md").value, Data) == []


@pytest.mark.parametrize("text", [text for _, text in blocks("docs/data.md", "yaml") if "template" in text])
def test_the_template_of_the_data_page_trains(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tunesmith

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "tickets.jsonl", [{"prompt": f"Colour {i}?", "completion": "red"} for i in range(8)])
    data = read_yaml(text, "data.md").value
    planned = tunesmith.plan({"model": str(tiny_llama), "objective": "sft", "method": "lora", "data": data})
    assert "".join(piece for piece, trained in planned.shown if trained) == "red<|im_end|>"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for name in re.findall(r"docs/[a-z]+\.md", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
