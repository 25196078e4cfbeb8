"""The Python API in a real kernel: plan, train, results and predictions, drawn in the notebook's cells."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tunesmith.methods import METHODS

CELLS = (
    """
import tunesmith
rows = [{"prompt": f"colour {i}?", "completion": "red" if i % 2 else "green <b>"} for i in range(16)]
recipe = {
    "model": MODEL, "objective": "sft", "method": "lora", "precision": "fp32",
    "train": {"max_steps": 3, "batch_size": 4}, "evaluate": {"max_new_tokens": 4},
}
data = {"train": rows[:12], "test": rows[12:]}
""",
    "plan = tunesmith.plan(recipe, data=data)",
    "plan",
    'heard = []\nresult = tunesmith.train(recipe, data=data, out="run", listen=lambda event, _: heard.append(event))',
    "result",
    'print(tunesmith.predict(result.path, [{"prompt": "colour 3?"}])[0].where, heard.count("step"))',
    'tunesmith.plan({**recipe, "method": "lorra"}, data=data)',
)
Output = dict[str, object]


@pytest.fixture(scope="module")
def outputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Output]]:
    """What each cell shows, but for the libraries' warnings on stderr."""
    place = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(cell.replace("MODEL", json.dumps(str(tiny_llama)))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        notebook, timeout=600, allow_errors=True, resources={"metadata": {"path": str(place)}}
    ).execute()
    return [[o for o in cell["outputs"] if o.get("name") != "stderr"] for cell in notebook.cells]


def html_of(output: Output) -> str:
    return str(output["data"].get("text/html", ""))  # type: ignore[attr-defined]


def test_a_plan_is_drawn_once_below_its_progress(outputs: list[list[Output]]) -> None:
    assert [o["output_type"] for o in outputs[1]] == ["display_data", "display_data"]
    progress, plan = map(html_of, outputs[1])
    assert progress == ""
    assert plan.count("train.max_steps") <= 1
    for shown in ("tiny-llama", "micro-batch", "plan "):
        assert shown in plan


def test_a_plan_by_itself_is_one_line(outputs: list[list[Output]]) -> None:
    (shown,) = outputs[2]
    assert str(shown["data"]["text/plain"]).startswith("<Plan ")  # type: ignore[index]


def test_a_run_is_one_picture_that_is_drawn_over(outputs: list[list[Output]]) -> None:
    (drawn,) = outputs[3]
    assert drawn["output_type"] == "display_data"
    assert "training: 3 steps" in html_of(drawn)
    assert "<progress" not in html_of(drawn)
    assert "green <b>" not in html_of(drawn)


def test_results_are_a_table(outputs: list[list[Output]]) -> None:
    (table,) = outputs[4]
    for shown in ("exact_match", "perplexity", "tuned", "run: <code>"):
        assert shown in html_of(table)


def test_predictions_come_back_as_values_and_a_listener_hears_beside_the_picture(outputs: list[list[Output]]) -> None:
    assert [o.get("text") for o in outputs[5]] == ["rows[0] 3\n"]


def test_an_error_ends_in_its_cause_and_remedy(outputs: list[list[Output]]) -> None:
    (error,) = (o for o in outputs[6] if o["output_type"] == "error")
    assert error["ename"] == "InputError"
    known = f"known: {', '.join(METHODS)}; what a file of yours registers, with --plugin FILE"
    assert error["evalue"] == f"unknown method 'lorra' (did you mean 'lora'? {known})"
