"""The report and the card of real runs: honest, harmless, rebuilt when asked for, and never in the run's way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith import api, demo
from tunesmith.cli import main
from tunesmith.report import write
from tunesmith.report.markdown import escaped
from tunesmith.report.summary import summarise

HOSTILE = '</script><img src=x onerror="document.title=1"> | `x` *y* \u202e{{ 7*7 }} &amp; <!--'
WORDS = {"up": "rise climb lift high sky", "down": "fall sink drop low deep", HOSTILE: "odd strange weird curious rare"}


def labelled(count: int, seed: int, shuffled: bool = False) -> list[dict[str, str]]:
    """Texts of three words of their label; shuffled ones have the labels of others."""
    draw = random.Random(seed)
    labels = [list(WORDS)[i % 3] for i in range(count)]
    texts = [" ".join(draw.choices(WORDS[label].split(), k=3)) + f" {seed}.{i}" for i, label in enumerate(labels)]
    if shuffled:
        draw.shuffle(labels)
    shops = ["north", HOSTILE]
    return [{"text": t, "label": k, "shop": shops[i % 2]} for i, (t, k) in enumerate(zip(texts, labels, strict=True))]


def classifier(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "objective": "classify",
        "method": "head",
        "train": {"epochs": 10, "batch_size": 16},
        "precision": "fp32",
        **more,
    }


@pytest.fixture(scope="module")
def classified(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = classifier(tiny_bert, evaluate={"by": "shop"})
    data = {"train": labelled(90, 1), "validation": labelled(30, 2), "test": labelled(60, 3)}
    return api.train(recipe, data=data, out=tmp_path_factory.mktemp("runs") / "classified").path


@pytest.fixture(scope="module")
def chatting(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"colour {i}? {HOSTILE}", "completion": ("red", "green", HOSTILE)[i % 3]} for i in range(30)]
    recipe = {
        "model": str(tiny_llama),
        "objective": "sft",
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 6, "batch_size": 8},
        "precision": "fp32",
        "evaluate": {"max_new_tokens": 4},
    }
    data = {"train": rows[:24], "test": rows[24:]}
    return api.train(recipe, data=data, out=tmp_path_factory.mktemp("runs") / "chatting").path


@pytest.fixture(params=["classified", "chatting"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


class Page(HTMLParser):
    """Elements with their attributes, the text outside of scripts, and the data that the scripts read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = str(dict(attrs).get("id")) if tag == "script" else "style" if tag == "style" else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "page-data":
            self.data += data
        elif not self._inside:
            self.text += data


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def call(*words: str | Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def test_a_finished_run_has_its_report_and_its_card_twice(run: Path) -> None:
    assert (run / "report.html").stat().st_size < 3_000_000
    card = (run / "model" / "MODEL_CARD.md").read_bytes()
    assert card == (run / "model" / "README.md").read_bytes()
    assert b"rank 2" in card or b"head" in card


def test_text_of_others_is_shown_and_does_nothing(run: Path) -> None:
    page = page_of(run)
    assert not {"img", "iframe", "object", "link"} & {
        tag for tag, attributes in page.elements if attributes.get("rel") != "icon"
    }
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    links = [str(a["href"]) for tag, a in page.elements if tag == "a"]
    assert all(link.startswith("#") or link.startswith("https://") for link in links)
    data = json.loads(page.data)
    texts = [text for answers in data["answers"] for text in answers["texts"]]
    assert any(
        '</script><img src=x onerror="document.title=1">' in text and "\\u202e{{ 7*7 }}" in text for text in texts
    )
    assert "\u202e" not in (run / "report.html").read_text(encoding="utf-8")
    assert "49" not in [text for text in texts if HOSTILE[:9] in text]


def test_every_answer_is_there_with_its_outcome(run: Path) -> None:
    (answers,) = json.loads(page_of(run).data)["answers"]
    lines = (run / "predictions" / "test.jsonl").read_text().splitlines()
    assert len(answers["rows"]) == len(lines) == sum(answers["counts"])


def test_what_was_asked_measured_and_used_is_on_the_page(classified: Path) -> None:
    page = page_of(classified)
    ids = [a["id"] for tag, a in page.elements if tag == "section"]
    assert ids == ["verdict", "results", "answers", "classes", "training", "data", "plan", "environment", "again"]
    verdict = summarise(classified).verdicts[0]
    assert verdict.sentence in page.text
    for shown in (
        "macro F1",
        "test by shop",
        "60 rows",
        "gradient norm",
        "train.learning_rate",
        "train.sequence_length",
        "3 labels",
    ):
        assert shown in page.text, shown
    plan = json.loads((classified / "plan.json").read_text())
    for digest in (plan["hash"], plan["base"]["sha256"], plan["audit"]["train"]["files"][0]["sha256"]):
        assert digest in page.text


def test_a_metric_whose_rows_carry_no_interval_says_so_everywhere(classified: Path) -> None:
    why = "no interval: 60 rows in 15 bins of confidence; 200 are needed"
    records = [r for r in json.loads((classified / "evaluation.json").read_text()) if r["group"] == "all"]
    assert {(r["low"], r["high"], r["reason"]) for r in records if r["metric"] == "ece"} == {(None, None, why)}
    assert all(r["reason"] is None and r["low"] is not None for r in records if r["metric"] == "accuracy")
    effects = {e["metric"]: e for e in json.loads((classified / "comparison.json").read_text())}
    assert [effects["ece"][key] for key in ("low", "high", "p", "p_holm")] == [None] * 4
    assert "1,000 are needed to compare" in effects["ece"]["reason"]
    assert f"ECE, tuned: {why}." in page_of(classified).text
    card = (classified / "model" / "MODEL_CARD.md").read_text()
    assert f"ECE, tuned: {escaped(why)}" in card
    assert "ECE (no interval, n = 60)" in card
    brief = call("report", classified, "--format", "md")[1]
    assert brief.count(f"- ECE, tuned: {escaped(why)}") == 1
    assert "- ECE, difference: no interval" in brief
    assert "\n\nIn brackets: " in brief  # else Markdown makes it part of the list's last item


def test_what_was_given_is_not_told_as_a_default(classified: Path) -> None:
    told = {default["key"] for default in json.loads((classified / "plan.json").read_text())["defaults"]}
    assert not {"model", "data.train", "data.test.test", "method.name", "train.epochs", "evaluate.by"} & told
    assert {"train.learning_rate", "seed"} <= told


def test_what_is_trained_is_marked(chatting: Path) -> None:
    html = (chatting / "report.html").read_text(encoding="utf-8")
    shown = re.search(r'<pre class="shown.*?</pre>', html, re.DOTALL)
    assert shown
    assert re.search(r"<mark>(red|green|&lt;/script&gt;.*?)&lt;\|im_end\|&gt;", shown[0], re.DOTALL)


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    files = [run / "report.html", run / "model" / "MODEL_CARD.md"]
    before = [file.read_bytes() for file in files]
    assert call("report", run) == (0, f"{run / 'report.html'}\n", "")
    assert [file.read_bytes() for file in files] == before


def test_shuffled_labels_are_no_better_than_the_most_frequent_one(tiny_bert: Path, tmp_path: Path) -> None:
    standings: list[str] = []
    for shuffled in (False, True):
        data = {"train": labelled(120, 1, shuffled), "test": labelled(150, 3, shuffled)}
        result = api.train(classifier(tiny_bert), data=data, out=tmp_path / str(shuffled))
        assert result.report is not None
        verdict = summarise(result.path).verdicts[0]
        standings.append(verdict.standing)
        assert verdict.sentence in page_of(result.path).text
        assert verdict.sentence.startswith(f"{verdict.standing} than always answering the most frequent label")
        assert (
            f"**{verdict.standing}.** {escaped(verdict.sentence)}"
            in (result.path / "model" / "MODEL_CARD.md").read_text()
        )
    assert standings == ["Better", "No better"]


@pytest.mark.slow
def test_shuffled_labels_of_the_demo_are_no_better(model_cache: Path, tmp_path: Path) -> None:
    rows = demo.rows(quick=True)
    for split in rows.values():
        labels = [row["label"] for row in split]
        random.Random(5).shuffle(labels)
        for row, label in zip(split, labels, strict=True):
            row["label"] = label
    result = api.train(demo.recipe(quick=True), data=rows, out=tmp_path / "shuffled")
    assert summarise(result.path).verdicts[0].standing == "No better"


def test_the_verb_prints_the_path_the_markdown_or_json(run: Path, tmp_path: Path) -> None:
    (run / "report.html").unlink()
    code, out, _ = call("report", run, "--json")
    assert code == 0
    assert json.loads(out) == {"run": str(run), "format": "html", "path": str(run / "report.html")}
    assert (run / "report.html").is_file()
    code, text, _ = call("report", run, "--format", "md")
    assert code == 0
    assert text.startswith("# tiny-")
    assert escaped(summarise(run).verdicts[0].sentence) in text
    assert "<img" not in text
    assert json.loads(call("report", run, "--format", "md", "--json")[1])["text"] == text
    assert call("report", run, "--format", "md", "--out", tmp_path / "r.md") == (0, f"{tmp_path / 'r.md'}\n", "")
    assert (tmp_path / "r.md").read_text() == text
    assert call("report", run, "--out", tmp_path / "r.html")[0] == 0
    assert (tmp_path / "r.html").read_bytes() == (run / "report.html").read_bytes()


def test_open_asks_the_browser_for_the_page(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(asked.append(url)))
    code, _, err = call("report", chatting, "--open")
    assert (code, asked) == (0, [(chatting / "report.html").resolve().as_uri()])
    assert "open the file yourself" in err
    assert call("report", chatting, "--open", "--format", "md")[0] == 2


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    code, _, err = call("report", tmp_path)
    assert code == 2
    assert "is not a run of tunesmith" in err


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("plan.json", "{}", "is damaged: it lacks meaning"),
        ("manifest.json", "[]", "is damaged: it lacks libraries"),
        ("recipe.yaml", None, "is missing"),
        ("predictions/test.jsonl", '{"key": "a"}', "test.jsonl:1 is damaged: it lacks 'where'"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    classified: Path, tmp_path: Path, name: str, content: str | None, cause: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(classified, run)
    page = (run / "report.html").read_bytes()
    (run / name).unlink() if content is None else (run / name).write_text(content)
    code, _, err = call("report", run)
    assert code == 2
    assert cause in err
    assert "remedy: " in err
    assert (run / "report.html").read_bytes() == page


def test_its_commands_name_the_recipe_that_is_there(classified: Path) -> None:
    _, text, _ = call("report", classified, "--format", "md")
    (planned,) = re.findall(r"^tunesmith plan (\S+) +# must say plan", text, re.MULTILINE)
    assert (classified.parent / planned).is_file()


def test_more_rows_renew_report_and_card(chatting: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(chatting, run)
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"which {i}?", "completion": "red"}) + "\n" for i in range(4)))
    api.evaluate(run, more)
    assert "more, 4 rows" in page_of(run).text
    assert "4 rows of more" in (run / "model" / "MODEL_CARD.md").read_text()
    assert [answers["data"] for answers in json.loads(page_of(run).data)["answers"]] == ["test", "more"]


def test_a_report_that_is_missing_or_old_comes_with_resume(chatting: Path, tmp_path: Path) -> None:
    run = tmp_path / "chatting"
    shutil.copytree(chatting, run)
    expected = (run / "report.html").read_bytes()
    (run / "model" / "README.md").unlink()
    for age in (None, -60):  # not there; older than what was measured
        (run / "report.html").unlink()
        if age is not None:
            (run / "report.html").write_text("old")
            os.utime(run / "report.html", (time.time() + age,) * 2)
            (run / "evaluation.json").touch()
        api.resume(run)
        assert (run / "report.html").read_bytes() == expected
    assert (run / "model" / "README.md").is_file()


def test_a_report_that_cannot_be_drawn_is_said_and_loses_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(summary: Any) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(write, "run_page", fail)
    for split, rows in (("train", labelled(30, 1)), ("test", labelled(9, 2))):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**classifier(tiny_bert), "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, out, err = call("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0
    assert "warning: the run is whole, but its report could not be drawn (RuntimeError: no ink)" in err
    assert "report: none" in out
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert json.loads(call("evaluate", tmp_path / "run", "--json")[1])["report"] is None
    monkeypatch.undo()
    assert call("report", tmp_path / "run")[0] == 0
    assert api.evaluate(tmp_path / "run").report == tmp_path / "run" / "report.html"


def test_a_run_that_was_stopped_has_a_report_on_request(tiny_bert: Path, tmp_path: Path) -> None:
    def stop(event: str, data: Any) -> None:
        if event == "step" and data["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    from tunesmith.errors import StoppedError

    with pytest.raises(StoppedError):
        api.train(classifier(tiny_bert), data={"train": labelled(30, 1)}, out=tmp_path / "run", listen=stop)
    api.report(tmp_path / "run")
    assert "Unfinished: 3 of 20 steps are done" in page_of(tmp_path / "run").text
    assert not (tmp_path / "run" / "model").exists()
    api.resume(tmp_path / "run")
    assert "Not measured: there is no test set and no validation set" in page_of(tmp_path / "run").text


# ------------------------------------------------------------------ the card


def blocks(run: Path, base: Path) -> list[str]:
    """The card's Python, with this run's folder and base in place of the paths that a reader fills in."""
    text = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [
        b.replace("path/to/this/folder", str(run / "model")).replace(f"path/to/{base.name}", str(base)) for b in found
    ]


def outcome(code: str, question: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.replace('"..."', repr(question)), "card", "exec"), {})
    return out.getvalue().strip()


def test_the_card_is_one_of_the_hub(run: Path) -> None:
    from huggingface_hub import ModelCard

    text = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    records = [
        r for r in json.loads((run / "evaluation.json").read_text()) if (r["model"], r["group"]) == ("tuned", "all")
    ]
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [
        (r["metric"], pytest.approx(r["value"], rel=1e-5)) for r in records
    ]
    assert all(f"n = {r['n']}" in result.metric_name for r, result in zip(records, data.eval_results, strict=True))
    assert data.tags[0] == "tunesmith"
    assert (data.library_name, data.pipeline_tag) in (
        ("peft", "text-generation"),
        ("transformers", "text-classification"),
    )
    assert data.language is None
    assert data.license is None  # a folder without a licence has none that could be told
    assert str(run) not in text
    assert str(run.parent) not in text


def test_the_cards_code_gives_the_models_answers(classified: Path, tiny_bert: Path) -> None:
    ours, alone = blocks(classified, tiny_bert)
    for question in ("rise climb", "low deep sink", "weird odd"):
        expected = api.predict(classified, [{"text": question}])[0].output
        assert outcome(ours, question).startswith(expected)
        assert outcome(alone, question) == expected


def test_the_code_of_an_adapters_card_gives_its_answers(chatting: Path, tiny_llama: Path) -> None:
    ours, alone = blocks(chatting, tiny_llama)
    expected = api.predict(chatting, [{"prompt": "colour 3?"}])[0].output.strip()
    assert outcome(ours, "colour 3?") == expected
    assert outcome(alone, "colour 3?") == expected


def test_the_code_of_a_whole_models_card_gives_its_answers(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "full", "precision": "fp32"}
    rows = [{"prompt": f"colour {i}?", "completion": "red"} for i in range(12)]
    more = {"train": {"max_steps": 4, "learning_rate": 0.01}, "evaluate": {"max_new_tokens": 4}}
    run = api.train({**recipe, **more}, data={"train": rows}, out=tmp_path / "run").path
    expected = api.predict(run, [{"prompt": "colour 3?"}])[0].output.strip()
    assert [outcome(block, "colour 3?") for block in blocks(run, tiny_llama)] == [expected] * 2


def test_the_code_of_a_classifier_by_adapter_gives_its_answers(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = classifier(tiny_llama, method={"name": "lora", "rank": 2}, train={"max_steps": 6, "learning_rate": 0.01})
    run = api.train(recipe, data={"train": labelled(30, 1), "test": labelled(6, 2)}, out=tmp_path / "run").path
    for question in ("rise climb", "low deep sink"):
        expected = api.predict(run, [{"text": question}])[0].output
        assert [outcome(block, question).split("{")[0].strip() for block in blocks(run, tiny_llama)] == [
            expected.split("{")[0].strip()
        ] * 2


def test_known_bases_have_their_hub_name_and_licence(classified: Path) -> None:
    from dataclasses import replace

    from huggingface_hub import ModelCard

    from tunesmith.models.catalog import catalog
    from tunesmith.report.model_card import model_card

    summary = summarise(classified)

    def card(name: str, licence: str | None) -> Any:
        plan = {**summary.plan, "base": {**summary.plan["base"], "name": name, "licence": licence}}
        known = catalog().licences.get(licence or "")
        text = model_card(replace(summary, plan=plan, licence=known), "peft")
        return text, ModelCard(text).data

    text, data = card("smollm2-135m-instruct", "Apache-2.0")
    assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "AutoModel.from_pretrained(resolve('smollm2-135m-instruct').folder)" in text
    text, data = card("meta-llama/Llama-3.1-8B-Instruct", "LicenseRef-Llama-3.1")
    assert (data.base_model, data.license) == ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1")
    assert "forbids some uses" in text
    text, data = card("someone/base", "CC-BY-4.0")
    assert (data.license, data.to_dict()["license_name"]) == ("other", "cc-by-4.0")


def test_a_card_says_how_adapterhub_loads_a_bottleneck_adapter(classified: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from huggingface_hub import ModelCard

    from tunesmith.report.model_card import library_of, model_card

    summary = summarise(classified)

    def use(model_type: str) -> str:
        (tmp_path / "adapter.safetensors").touch()
        plan = {**summary.plan, "base": {**summary.plan["base"], "model_type": model_type}}
        return model_card(replace(summary, plan=plan), library_of(tmp_path, model_type))

    text = use("bert")
    assert ModelCard(text).data.library_name == "adapters"
    assert "model.load_adapter(folder, use_safetensors=True, set_active=True)\nmodel.eval()" in text
    assert "adapters.init(model)\n" in text
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")
    assert "adapters.init(model, interface=interface)" in use("qwen3")
    assert "No other library loads a bottleneck adapter of falcon models." in use("falcon")


# ------------------------------------------------------------------ in a browser


def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def drawn(page: Path, place: Path, *more: str) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
    words: Sequence[str] = (
        browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={place / 'profile'}",
        "--virtual-time-budget=3000",
        "--enable-logging=stderr",
        *more,
        "--dump-dom",
        page.resolve().as_uri(),
    )
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
def test_scripts_run_without_an_error_and_hostile_rows_stay_text(run: Path, tmp_path: Path) -> None:
    document, log = drawn(run / "report.html", tmp_path)
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    page = Page(document)
    assert "img" not in {tag for tag, _ in page.elements}
    assert "<title>1</title>" not in document
    assert len(re.findall(r'<li class="(?:label|prose)">', document)) >= 6
    assert 'aria-pressed="true"' in document


PHONE = """<iframe src="report.html" width="390" height="844"></iframe>
<script>
const lines = (cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map((box) => box.top)).size;
};
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach((one) => (one.open = true));
  const names = [...page.querySelectorAll(".wrap th.text")].filter((cell) => /^\\w+$/.test(cell.textContent));
  document.body.textContent = JSON.stringify({
    wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    torn: names.filter((cell) => lines(cell) > 1).map((cell) => cell.textContent),
    names: names.map((cell) => cell.textContent),
    shades: [...page.querySelectorAll(".wrap")].filter((one) => one.scrollWidth > one.clientWidth).map((one) => {
      const style = getComputedStyle(one);
      return [style.backgroundAttachment, style.backgroundImage.split("linear-gradient").length - 1];
    }),
  });
};
</script>"""


@pytest.mark.slow
def test_on_a_phone_the_page_stays_in_its_window_and_names_stay_whole(run: Path, tmp_path: Path) -> None:
    """Run and a second set are called by a word wider than the window; intervals and a signature are long, too."""
    named = tmp_path / ("long" * 30)
    shutil.copytree(run, named)
    for name in ("evaluation.json", "comparison.json"):
        own = [{**r, "low": -1234.5, "high": 1234.5} for r in json.loads((named / name).read_text())]
        other = [{**r, "data": named.name, "signature": "case:mixed|" * 9} for r in own]
        (named / name).write_text(json.dumps(own + other))
    assert main(["report", str(named)]) == 0
    (named / "phone.html").write_text(PHONE)
    document, _ = drawn(named / "phone.html", tmp_path, "--allow-file-access-from-files")
    found = json.loads(Page(document).text)
    assert found["wide"] == 0
    assert found["torn"] == []
    covers_and_shades = ["local, local, scroll, scroll", 4]
    assert found["shades"] == [covers_and_shades] * len(found["shades"]), "a table scrolls and does not show it"
    assert ("north" in found["names"]) == bool(found["shades"]) == (run.name == "classified")
