"""The Python API in a real kernel: plan, train, results and predictions, drawn in the notebook's cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

CELLS = (
    """
import tunesmith
rows = [{"prompt": f"colour {i}?", "completion": "red" if i % 2 else "green <b>"} for i in range(16)]
recipe = tunesmith.Recipe.model_validate({
    "model": MODEL, "objective": "sft", "method": "lora", "data": {"train": "given"},
    "train": {"max_steps": 3, "batch_size": 4}, "precision": "fp32", "evaluate": {"max_new_tokens": 4},
})
data = {"train": rows[:12], "test": rows[12:]}
plan = tunesmith.plan(recipe, data=data)
""",
    'result = tunesmith.train(recipe, data=data, out="run")',
    "result",
    'print(tunesmith.predict(result.path, [{"prompt": "colour 3?"}])[0].where)',
)


@pytest.fixture(scope="module")
def outputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, object]]]:
    place = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(cell.replace("MODEL", json.dumps(str(tiny_llama)))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    return [cell["outputs"] for cell in notebook.cells]


def html_of(outputs: list[dict[str, object]]) -> str:
    return "".join(str(o["data"].get("text/html", "")) for o in outputs if "data" in o)  # type: ignore[attr-defined]


def test_a_plan_is_drawn(outputs: list[list[dict[str, object]]]) -> None:
    assert "trainable" in html_of(outputs[0])


def test_a_run_is_one_picture_that_is_drawn_over(outputs: list[list[dict[str, object]]]) -> None:
    drawn = [o for o in outputs[1] if o["output_type"] == "display_data"]
    assert len(drawn) == 1
    assert "training: 3 steps" in html_of(drawn)
    assert "green <b>" not in html_of(drawn)


def test_results_are_a_table(outputs: list[list[dict[str, object]]]) -> None:
    table = html_of(outputs[2])
    for shown in ("exact_match", "perplexity", "tuned", "run: <code>"):
        assert shown in table


def test_predictions_come_back_as_values(outputs: list[list[dict[str, object]]]) -> None:
    assert [o.get("text") for o in outputs[3]] == ["rows row 0\n"]
