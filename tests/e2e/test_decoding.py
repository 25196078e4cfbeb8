"""How answers are drawn is chosen on validation rows: from the recipe to evaluate, predict, chat, export and report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from tunesmith import api
from tunesmith.cli import main
from tunesmith.decoding import judged
from tunesmith.errors import InputError, StoppedError
from tunesmith.events import StopRun
from tunesmith.models.drawing import Setting, of_card, settings
from tunesmith.models.saved import read_card
from tunesmith.recipe_evaluation import Decoding
from tunesmith.recipe_file import parse_recipe
from tunesmith.rundir import sha256_file
from tunesmith.types import Prediction

SWEEP = {"metric": "chrf", "temperature": [0, 1.5], "top_k": [0, 3], "limit": 6}
ASKED = {"decoding": SWEEP, "max_new_tokens": 6, "metrics": ["chrf", "loss"]}


def rows(count: int, start: int) -> list[dict[str, Any]]:
    return [{"prompt": f"colour {i}?", "completion": "red" if i % 2 else "green"} for i in range(start, start + count)]


DATA = {"train": rows(12, 0), "validation": rows(8, 100), "test": rows(5, 200)}


def recipe(base: Path, evaluate: Mapping[str, Any], objective: str = "sft") -> dict[str, Any]:
    return {
        "model": str(base),
        "objective": objective,
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "place": {"device": "cpu", "threads": 1},
        "precision": "fp32",
        "evaluate": dict(evaluate),
    }


@pytest.fixture(scope="module")
def hot() -> Setting:
    return Setting(1.5, 1.0, 3)


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding") / "run"
    api.train(recipe(tiny_llama, ASKED), data=DATA, out=folder)
    return folder


@pytest.fixture(scope="module")
def hot_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, hot: Setting) -> Path:
    """A run that was offered nothing but hot answers, so that it draws them."""
    folder = tmp_path_factory.mktemp("hot") / "run"
    asked = {"metric": "chrf", "temperature": hot.temperature, "top_k": hot.top_k}
    api.train(recipe(tiny_llama, {**ASKED, "decoding": asked, "base": False}), data=DATA, out=folder)
    return folder


def answers(run: Path, name: str = "test", model: str = "tuned") -> list[str]:
    lines = (run / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["answers"][model]["output"] for line in lines]


def test_every_setting_is_measured_for_both_models_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((run / "decoding.json").read_text())
    assert (found["metric"], found["n"], found["seed"]) == ("chrf", 6, 17)
    assert list(found["models"]) == ["tuned", "base"]
    for own in found["models"].values():
        tried = [(one["temperature"], one["top_p"], one["top_k"]) for one in own["tried"]]
        assert tried == [(0, 1, 0), (1.5, 1, 0), (1.5, 1, 3)]
        assert all(one["low"] <= one["value"] <= one["high"] for one in own["tried"])
        assert max(one["difference"] for one in own["tried"]) == 0
    assert main(["evaluate", str(run)]) == 0
    told = capsys.readouterr().out
    assert "ways to draw answers, tuned: chrf of 6 validation rows" in told
    assert "tuned answers greedily: of 3 settings the simplest that 6 validation rows" in told
    assert "\\n" not in told
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoding"] == found
    assert "How answers are drawn" in (run / "report.html").read_text()
    assert "| temperature 1.5, top\\_k 3 |" in str(api.report(run, format="md")).replace("top_k", "top\\_k")
    assert "do_sample=False" in (run / "model" / "MODEL_CARD.md").read_text()


def test_the_choice_is_kept_with_the_model_as_transformers_reads_it(run: Path, hot_run: Path, hot: Setting) -> None:
    told = GenerationConfig.from_pretrained(hot_run / "model")
    assert (told.do_sample, told.temperature, told.top_p, told.top_k) == (True, 1.5, 1.0, 3)
    assert told.max_new_tokens == 6
    assert told.eos_token_id
    greedy = GenerationConfig.from_pretrained(run / "model")
    assert (greedy.do_sample, greedy.temperature) == (False, None)
    assert of_card(read_card(hot_run / "model")).tuned == hot
    assert of_card(read_card(hot_run / "model")).base == Setting()
    assert "do_sample=True, temperature=1.5, top_p=1, top_k=3" in (hot_run / "model" / "MODEL_CARD.md").read_text()


def test_answers_are_drawn_so_from_then_on_and_the_same_again(hot_run: Path, tmp_path: Path) -> None:
    drawn = answers(hot_run)
    assert [p.output for p in api.predict(hot_run, DATA["test"])] == drawn
    api.evaluate(hot_run, DATA["test"], name="again")
    assert answers(hot_run, "again") == drawn
    api.export(hot_run, tmp_path / "copy")
    api.export(hot_run, tmp_path / "merged", merge=True, data=DATA["test"])
    for folder in ("copy", "merged"):
        assert [p.output for p in api.predict(tmp_path / folder, DATA["test"])] == drawn
        assert GenerationConfig.from_pretrained(tmp_path / folder).temperature == 1.5
    chat = api.chat(hot_run)
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.top_k) == (1.5, 1.0, 3)
    assert chat.sampling.changed(temperature=0).temperature == 0


def test_a_combination_has_no_choice_because_nothing_was_tried_with_it(run: Path, hot_run: Path) -> None:
    folder = hot_run.parent / "both"
    assert main(["combine", str(hot_run), f"other={run}", "--to", str(folder)]) == 0
    assert not (folder / "generation_config.json").exists()
    assert api.chat(folder).sampling.temperature == 0


def test_the_base_answers_by_a_choice_of_its_own(tiny_llama: Path, hot_run: Path) -> None:
    """Measured later beside a run that did not measure it, it is greedy."""
    plain = api.evaluate(hot_run, DATA["test"], name="beside")
    assert plain.record("chrf", model="base", data="beside")
    greedy = api.train(recipe(tiny_llama, {"max_new_tokens": 6}), data=DATA, out=hot_run.parent / "greedy")
    assert answers(hot_run, "beside", "base") == answers(greedy.path, "test", "base")


def test_a_run_that_is_stopped_in_the_middle_goes_on_to_the_same_bits(
    run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    def stop(event: str, data: Mapping[str, Any]) -> None:
        if event == "phase" and str(data.get("what", "")).startswith("tuned, temperature 1.5, top_k"):
            raise StopRun

    with pytest.raises(StoppedError, match="resume"):
        api.train(recipe(tiny_llama, ASKED), data=DATA, out=tmp_path / "run", listen=stop)
    assert not (tmp_path / "run" / "model").exists()
    api.resume(tmp_path / "run")
    names = ("decoding.json", "evaluation.json", "predictions/test.jsonl", "model/generation_config.json")
    for name in (*names, "model/adapter_model.safetensors"):
        assert sha256_file(tmp_path / "run" / name) == sha256_file(run / name), name


def answered(right: list[bool]) -> list[Prediction]:
    return [Prediction("yes" if hit else "no", "yes", f"row {i}") for i, hit in enumerate(right)]


def test_within_the_noise_the_simpler_setting_is_taken_and_beyond_it_the_better_one() -> None:
    greedy, warm, hot = Setting(), Setting(0.5), Setting(1.0, 0.9)
    answers = {
        greedy: answered([i < 20 for i in range(60)]),
        warm: answered([i < 24 for i in range(60)]),
        hot: answered([i < 10 for i in range(60)]),
    }
    chosen, tried = judged(answers, "exact_match", 17)
    assert chosen == greedy  # 4 rows more of 60 may be chance
    assert [one.setting for one in tried] == [greedy, warm, hot]
    assert [one.value for one in tried] == pytest.approx([20 / 60, 24 / 60, 10 / 60])
    assert [one.difference for one in tried] == pytest.approx([-4 / 60, 0, -14 / 60])
    assert [one.p for one in tried] == [pytest.approx(0.125), None, pytest.approx(2 * 2 * 0.5**14)]
    answers[warm] = answered([i < 40 for i in range(60)])
    assert judged(answers, "exact_match", 17)[0] == warm
    assert judged(answers, "exact_match", 17, np.arange(60) // 20)[0] == greedy  # three sources show nothing


def test_settings_are_those_of_the_grid_and_greedy_is_one() -> None:
    asked = Decoding(metric="chrf", temperature=[1.0, 0.0, 0.0], top_p=[1.0, 0.9], top_k=[0, 40])
    found = settings(asked)
    assert [str(one) for one in found] == [
        "greedy",
        "temperature 1",
        "temperature 1, top_k 40",
        "temperature 1, top_p 0.9",
        "temperature 1, top_p 0.9, top_k 40",
    ]


def test_what_cannot_be_chosen_is_refused_by_the_plan(tiny_llama: Path, tiny_bert: Path) -> None:
    def refused(match: str, data: dict[str, Any], sweep: Any = SWEEP, base: Path = tiny_llama, to: str = "sft") -> None:
        with pytest.raises(InputError, match=match):
            api.plan(recipe(base, {"decoding": sweep}, to), data=data)

    without = {name: own for name, own in DATA.items() if name != "validation"}
    refused(r"there are no validation rows \(set data\.validation\)", without)
    refused(r"there are no test rows \(set data\.test\)", {name: own for name, own in DATA.items() if name != "test"})
    labelled = {name: [{"text": r["prompt"], "label": r["completion"]} for r in own] for name, own in DATA.items()}
    refused("answers that a model writes", labelled, base=tiny_bert, to="classify")
    texts = {name: [{"text": r["prompt"] + " it is so"} for r in own] for name, own in DATA.items()}
    refused("answers that a model writes", texts, to="pretrain")
    refused("and .* asks for none", texts)
    refused("not of what the model writes", DATA, {**SWEEP, "metric": "perplexity"})
    refused("chrff", DATA, {**SWEEP, "metric": "chrff"})
    refused("rmse is of numbers, and the answer to .* is of texts", DATA, {**SWEEP, "metric": "rmse"})
    refused("tries temperature 0 alone", DATA, {"metric": "chrf", "temperature": 0, "top_k": [1, 5]})


def test_one_setting_is_how_answers_are_drawn_and_the_plan_says_that_none_are_compared(tiny_llama: Path) -> None:
    asked = {"decoding": {"metric": "chrf", "temperature": 0.7}}
    assert "one setting (temperature 0.7)" in api.plan(recipe(tiny_llama, asked), data=DATA).warnings[-1]


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("temperature", -1, "must be 0 or a number of at least 0.01 and at most 10 or a list of at least 1"),
        ("temperature", 1e-9, "must be 0 or a number of at least 0.01 and at most 10 or a list of at least 1"),
        ("temperature", [1, 1000], "decoding.temperature.1 must be 0 or a number of at least 0.01 and at most 10, not"),
        ("top_p", 1.5, "must be a number above 0 and at most 1 or a list of at least 1"),
        ("top_k", 0.5, "must be a whole number of at least 0 or a list of at least 1"),
        ("top_k", [], "must be a whole number of at least 0 or a list of at least 1"),
    ],
)
def test_what_a_number_must_be_is_told_where_a_list_will_do_too(key: str, value: Any, cause: str) -> None:
    given = {**recipe(Path("base"), {"decoding": {**SWEEP, key: value}}), "data": {"train": "rows.jsonl"}}
    with pytest.raises(InputError, match=cause):
        parse_recipe(given)


def test_rows_of_few_sources_choose_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    data = {name: [{**row, "by": f"{i % 3}"} for i, row in enumerate(own)] for name, own in DATA.items()}
    asked = {**ASKED, "cluster": "by", "by": "by", "smallest_group": 1, "base": False}  # its groups choose nothing
    api.train(recipe(tiny_llama, asked), data=data, out=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "decoding.json").read_text())
    assert {tried["reason"] for tried in told["models"]["tuned"]["tried"]} == {"no interval: 3 sources, and it takes 5"}
