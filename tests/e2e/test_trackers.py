"""The trackers' own libraries, writing on this machine: a run is killed, gone on with, and read back as they read it.

Each library is tested where it is installed: `pip install tensorboard wandb mlflow-skinny sqlalchemy alembic trackio`.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tunesmith import api
from tunesmith.rundir import read_json

# MLflow keeps runs in SQLite through these two, which its small package leaves out.
NEEDED = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
INSTALLED = [name for name, modules in NEEDED.items() if all(find_spec(module) for module in modules)]
STEPS = 6
ROWS = [{"prompt": f"colour {i}?", "completion": ("red", "green")[i % 2]} for i in range(26)]
PLOTTED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
# Killed in step 6, where the last checkpoint stands at 4: step 5 is taken again.
KILLED = """
import json, os, signal, sys, time
from tunesmith import api

def listen(event, data):
    if event == "step" and data["step"] == 6:
        time.sleep(1.5)  # trackio writes what it was given every half second
        os.kill(os.getpid(), signal.SIGKILL)

asked = json.load(open(sys.argv[1]))
api.train(asked["recipe"], data=asked["data"], out=asked["out"], listen=listen)
"""


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{' and '.join(NEEDED[name])} not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Path]:
    """A run that all installed trackers follow, killed and gone on with."""
    if not INSTALLED:
        pytest.skip("no tracker is installed")
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_PROJECT", "colours")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("TUNESMITH_CACHE", os.environ["TUNESMITH_CACHE"])
        recipe = {
            "model": str(tiny_llama),
            "objective": "sft",
            "method": {"name": "lora", "rank": 2},
            "train": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.01, "save_every": 4, "evaluate_every": 4},
            "evaluate": {"max_new_tokens": 2, "metrics": ["exact_match", "loss"]},
            "precision": "fp32",
            "place": {"device": "cpu", "threads": 1},
            "report_to": INSTALLED,
        }
        data = {"train": ROWS[:16], "validation": ROWS[16:20], "test": ROWS[20:]}
        out = folder / "colours"
        (folder / "asked.json").write_text(json.dumps({"recipe": recipe, "data": data, "out": str(out)}))
        killed = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(folder / "asked.json")], capture_output=True, text=True
        )
        assert killed.returncode == -9, killed.stderr
        assert not (out / "evaluation.json").exists()
        keys = {name: entry["key"] for name, entry in read_json(out / "trackers.json").items()}
        api.resume(out)
        after = read_json(out / "trackers.json")
        assert {name: entry["key"] for name, entry in after.items()} == keys
        assert all(entry["finished"] for entry in after.values()), after
        yield out


@pytest.fixture(scope="module")
def truth(run: Path) -> dict[str, dict[int, float]]:
    """What metrics.jsonl says, by the names that trackers are given."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        kind = "validation" if "validation" in line else "train"
        for name, value in line.get("validation", line).items():
            found.setdefault(f"{kind}/{name}", {})[line["step"]] = value
    assert list(found["train/loss"]) == list(range(1, STEPS + 1))
    assert list(found["validation/loss"]) == [4, 6]
    return found


def check_points(found: dict[str, list[tuple[int, float]]], truth: dict[str, dict[int, float]]) -> None:
    """Every step once, with the run's own numbers; times and memory do not repeat, so only their steps are compared."""
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "validation/loss"):
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in truth[name].items()], name
    for name in (f"train/{plotted}" for plotted in PLOTTED):
        assert Counter(step for step, _ in found[name]) == Counter(range(1, STEPS + 1)), name


def results(run: Path) -> dict[str, Any]:
    return next(r for r in read_json(run / "evaluation.json") if r["model"] == "tuned" and r["metric"] == "loss")


@needs("tensorboard")
def test_tensorboard(run: Path, truth: dict[str, dict[int, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    check_points({tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}, truth)
    tuned = results(run)
    for part in ("value", "low", "high", "n"):
        name = "evaluation/test/tuned/loss" + ("" if part == "value" else f"/{part}")
        assert [e.value for e in accumulator.Scalars(name)] == [pytest.approx(tuned[part], rel=1e-6)]
    texts = {
        tag: accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in accumulator.Tags()["tensors"]
    }
    assert "| train.learning_rate | 0.01 |" in texts["recipe/text_summary"]
    assert f"| run_folder | {run} |" in texts["recipe/text_summary"]
    assert "| test | all | tuned | loss |" in texts["evaluation/text_summary"]
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["train.learning_rate"].number_value == 0.01
    assert session.hparams["method.name"].string_value == "lora"


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline file: blocks of 32 KiB, each piece with checksum, length and kind before it."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record in one piece, or its last
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@needs("wandb")
def test_wandb(run: Path, truth: dict[str, dict[int, float]]) -> None:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")  # that of the killed process was of no use any more
    records = list(wandb_records(file))
    begun = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    key = read_json(run / "trackers.json")["wandb"]["key"]
    assert {(one.run_id, one.display_name, one.project) for one in begun} == {(key, "colours", "colours")}
    config = {update.key: json.loads(update.value_json) for update in begun[0].config.update}
    assert (config["train.learning_rate"], config["run_folder"]) == (0.01, str(run))

    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name in row:
            if name.startswith(("train/", "validation/")):
                found.setdefault(name, []).append((row["_step"], row[name]))
    check_points(found, truth)

    summary = {i.key: json.loads(i.value_json) for record in records for i in record.summary.update if i.key}
    tuned = results(run)
    assert summary["evaluation/test/tuned/loss"] == pytest.approx(tuned["value"])
    assert summary["evaluation/test/tuned/loss/low"] == pytest.approx(tuned["low"])
    names = {entry.path for record in records for entry in record.artifact.manifest.contents}
    assert {"evaluation.json", "comparison.json"} <= names


@needs("wandb")
def test_wandb_keeps_files_that_were_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.tracked import Outcome, TrackedRun
    from tunesmith.trackers import TRACKERS

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-k1"
    folder.mkdir(parents=True)
    about = TrackedRun("colours", tmp_path, {}, "k1", 4)
    for sent in (True, False):
        marker = folder / "run-k1.wandb.synced"
        marker.touch() if sent else marker.unlink()
        tracker = TRACKERS.get("wandb")(about)
        tracker.finish(Outcome("stopped", 4))
        assert folder.exists() == sent
        assert tracker.held("train") == (None if sent else 0)


@needs("mlflow")
def test_mlflow(run: Path, truth: dict[str, dict[int, float]]) -> None:
    client: Any = importlib.import_module("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name("tunesmith")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("colours", "FINISHED")
    assert found.data.params["train.learning_rate"] == "0.01"
    assert found.data.params["run_folder"] == str(run)
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    points = {name: sorted((m.step, m.value) for m in history) for name, history in histories.items()}
    check_points(points, truth)
    tuned = results(run)
    for part in ("value", "low", "high", "n"):
        name = "evaluation/test/tuned/loss" + ("" if part == "value" else f"/{part}")
        assert points[name] == [(STEPS, pytest.approx(tuned[part]))]
    kept = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"evaluation.json", "comparison.json"} <= kept


@needs("trackio")
def test_trackio(run: Path, truth: dict[str, dict[int, float]]) -> None:
    trackio: Any = importlib.import_module("trackio")
    key = read_json(run / "trackers.json")["trackio"]["key"]
    assert key.startswith("colours-")
    (listed,) = trackio.Api().runs("tunesmith")
    assert listed.name == key
    assert listed.config["train.learning_rate"] == 0.01
    assert listed.config["run_folder"] == str(run)
    found: dict[str, list[tuple[int, float]]] = {}
    for row in trackio.SQLiteStorage.get_logs("tunesmith", key):
        for name, value in row.items():
            found.setdefault(name, []).append((row["step"], value))
    check_points(found, truth)
    tuned = results(run)
    assert found["evaluation/test/tuned/loss"] == [(STEPS, pytest.approx(tuned["value"]))]
    (kept,) = trackio.SQLiteStorage.get_artifacts("tunesmith")
    files = [run / "evaluation.json", run / "comparison.json"]
    assert (kept["name"], kept["size_bytes"]) == (f"results-{key}", sum(file.stat().st_size for file in files))


@pytest.mark.parametrize("name", list(NEEDED))
def test_every_tracker_is_either_tested_here_or_refused_by_the_plan(name: str, tiny_llama: Path) -> None:
    from tunesmith.errors import InputError
    from tunesmith.trackers import TRACKERS

    tracker = TRACKERS.get(name)
    recipe = {"model": str(tiny_llama), "objective": "sft", "method": "lora", "report_to": name}
    if find_spec(tracker.module) is not None:
        assert api.plan(recipe, data={"train": ROWS}).hash
        return
    with pytest.raises(InputError) as refused:
        api.plan(recipe, data={"train": ROWS})
    assert f"pip install {tracker.package}" in refused.value.remedy
