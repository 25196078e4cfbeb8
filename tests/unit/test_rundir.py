"""What a run writes, killed at every write, sync and rename; the journal; and the lock between real processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith import rundir, training
from tunesmith.data.checks import as_keys
from tunesmith.errors import InputError, ResourceError
from tunesmith.recipe_file import parse_recipe
from tunesmith.rundir import Journal, RunDir

HOLDER = """
import sys, time
from pathlib import Path
from tunesmith.rundir import RunDir
with RunDir(Path(sys.argv[1])).hold():
    print("held", flush=True)
    time.sleep(60)
"""


class KilledError(BaseException):
    """Stands for the end of the process."""


def killed_at(monkeypatch: pytest.MonkeyPatch, place: str, number: int, *, after: bool) -> Callable[[], int]:
    """The process ends at call `number` of `rundir.<place>`, before it or after; returns the count of calls."""
    real = getattr(rundir, place)
    calls: list[int] = []

    def dying(*given: Any) -> None:
        calls.append(1)
        if len(calls) == number and not after:
            raise KilledError
        if len(calls) == number and place == "write_bytes":
            given[0].write(given[1][: len(given[1]) // 2])  # a part of it reached the file
            given[0].flush()
            raise KilledError
        real(*given)
        if len(calls) == number:
            raise KilledError

    monkeypatch.setattr(rundir, place, dying)
    return lambda: len(calls)


# ---------------------------------------------------------------- files and folders


@pytest.mark.parametrize("place", ["write_bytes", "sync_file", "rename", "sync_folder"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("old", [b"old content", None])
def test_a_reader_sees_the_old_file_or_the_new_one(
    place: str, after: bool, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.json"
    if old is not None:
        path.write_bytes(old)
    calls = killed_at(monkeypatch, place, 1, after=after)
    with pytest.raises(KilledError):
        rundir.write_file(path, b"something new")
    assert calls() == 1
    renamed = place == "sync_folder" or (place == "rename" and after)
    assert (path.read_bytes() if path.exists() else None) == (b"something new" if renamed else old)
    monkeypatch.undo()
    rundir.write_file(path, b"next")  # what the kill left behind is in nobody's way
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert path.read_bytes() == b"next"


def test_the_bytes_are_forced_to_disk_before_the_file_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for place in ("write_bytes", "sync_file", "rename", "sync_folder"):
        real = getattr(rundir, place)
        monkeypatch.setattr(rundir, place, lambda *given, place=place, real=real: (seen.append(place), real(*given))[1])
    rundir.write_file(tmp_path / "f", b"x")
    assert seen == ["write_bytes", "sync_file", "rename", "sync_folder"]
    seen.clear()
    with rundir.replace_folder(tmp_path / "d") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_bytes(b"a")
        (folder / "b").write_bytes(b"b")
    assert seen == ["sync_file"] * 2 + ["sync_folder"] * 2 + ["rename", "sync_folder"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    for place in ("sync_file", "sync_folder", "rename"):
        killed_at(monkeypatch, place, 1, after=False)
        with suppress(KilledError), rundir.replace_folder(target) as folder:
            (folder / "a").write_bytes(b"a")
            (folder / "b").write_bytes(b"b")
        monkeypatch.undo()
        assert not target.exists()
    with rundir.replace_folder(target) as folder:
        assert not list(folder.iterdir())  # nothing of the killed ones
        (folder / "a").write_bytes(b"a")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "a"]


def test_a_folder_is_replaced_only_when_its_successor_is_done(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with rundir.replace_folder(target) as folder:
        (folder / "old").write_bytes(b"old")

    class OwnError(Exception):
        pass

    with suppress(OwnError), rundir.replace_folder(target) as folder:
        (folder / "half").write_bytes(b"half")
        raise OwnError
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]
    with rundir.replace_folder(target) as folder:
        (folder / "new").write_bytes(b"new")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_killed_between_its_renames_a_folder_is_found_again(
    number: int, after: bool, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)

    def replace(content: str) -> None:
        with rundir.replace_folder(run.model) as folder:
            (folder / "a").write_text(content)

    replace("old")
    killed_at(monkeypatch, "rename", number, after=after)
    with pytest.raises(KilledError):
        replace("new")
    monkeypatch.undo()
    (tmp_path / ".plan.json.part").write_text("{")
    (run.checkpoints / ".step-000002.gone").mkdir(parents=True)
    if resumed:
        with run.hold():
            assert not list(tmp_path.rglob(".*.part"))
            assert not list(tmp_path.rglob(".*.gone"))
            assert (run.model / "a").read_text() == ("new" if number == 2 and after else "old")
    replace("next")
    assert (run.model / "a").read_text() == "next"
    assert not list(tmp_path.glob(".model.*"))


@pytest.mark.parametrize(
    ("code", "cause"),
    [(errno.ENOSPC, "the disk is full while writing"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "Read-only")],
)
def test_a_disk_that_refuses_is_a_lack_of_resources(
    code: int, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*given: Any) -> None:
        raise OSError(code, os.strerror(code))

    for place in ("write_bytes", "sync_file", "rename"):
        (tmp_path / "f").write_bytes(b"old")
        monkeypatch.setattr(rundir, place, refusing)
        with pytest.raises(ResourceError, match=cause) as error:
            rundir.write_file(tmp_path / "f", b"new")
        assert error.value.exit_code == 4
        assert str(tmp_path / "f") in error.value.cause
        assert (tmp_path / "f").read_bytes() == b"old"
        monkeypatch.undo()


def test_json_is_read_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rundir.write_json(path, {"a": [1, 0.1, "é", None]})
    assert rundir.read_json(path) == {"a": [1, 0.1, "é", None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        rundir.write_json(path, {"a": float("inf")})
    assert rundir.read_json(path) == {"a": [1, 0.1, "é", None]}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a\.json is damaged"):
        rundir.read_json(path)
    with pytest.raises(InputError, match=r"b\.json is missing"):
        rundir.read_json(tmp_path / "b.json")


@pytest.mark.parametrize(("content", "lacks"), [("[]", "a, b, c"), ("3", "a, b, c"), ('{"a": 1}', "b, c")])
def test_a_record_that_lacks_something_is_damaged(content: str, lacks: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        rundir.read_record(path, "a", "b", "c")
    assert error.value.cause == f"{path} is damaged: it lacks {lacks}"
    path.write_text('{"a": 1, "b": null, "c": 2}')
    assert rundir.read_record(path, "a", "b", "c") == {"a": 1, "b": None, "c": 2}


def test_nothing_is_told_to_empty_a_file(tmp_path: Path) -> None:
    rundir.check_free(tmp_path / "new")
    rundir.check_free(tmp_path)
    file = tmp_path / "train.csv"
    file.write_text("text,label")
    for path, cause, remedy in (
        (file, f"{file} is a file that exists already", "give another path"),
        (tmp_path, f"{tmp_path} exists and is not empty", "give another path, or empty it"),
    ):
        with pytest.raises(InputError) as error:
            rundir.check_free(path)
        assert (error.value.cause, error.value.remedy) == (cause, remedy)


def test_a_run_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there is no folder {tmp_path / 'typo'}"):
        RunDir.open(tmp_path / "typo")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_is_saved_is_readable_by_whom_the_umask_lets(umask: int, mode: int, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with rundir.replace_folder(tmp_path / "model") as folder:
            save_file({"w": torch.ones(2)}, folder / "model.safetensors")  # for its owner alone
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {mode}


def test_a_hash_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert rundir.sha256_file(tmp_path / "abc") == expected


# ---------------------------------------------------------------- the journal


def test_a_journal_is_cut_back_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append({"step": 1})
    length = journal.sync()
    assert length == path.stat().st_size == len('{"step": 1}\n')
    journal.append({"step": 2})
    with open(path, "ab") as handle:
        handle.write(b'{"step": 3, "lo')  # the kill came in the middle of a line
    journal.close()
    resumed = Journal(path)
    resumed.cut(length)
    resumed.append({"step": 2, "again": True})
    assert resumed.sync() == path.stat().st_size
    resumed.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]


def test_a_line_is_there_for_readers_at_once(tmp_path: Path) -> None:
    journal = RunDir(tmp_path).journal("metrics.jsonl")
    journal.append({"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 0.5}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"loss": float("nan")})
    journal.close()


def test_a_journal_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1})
    with pytest.raises(InputError, match=r"metrics\.jsonl is shorter than its checkpoint says"):
        journal.cut(13)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    journal.close()


def test_a_full_disk_stops_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    journal = Journal(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(rundir, "write_bytes", full)
    with pytest.raises(ResourceError, match=r"full while writing .*metrics\.jsonl"):
        journal.append({"step": 1})
    journal.close()


# ---------------------------------------------------------------- the lock


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_within_a_second_by_name(holder: Any, tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        pytest.raises(ResourceError, match=rf"is held by process {holder.pid} on .* since 20") as error,
        RunDir(tmp_path / "run").hold(),
    ):
        pass
    assert time.monotonic() - start < 1
    assert error.value.exit_code == 4
    assert holder.poll() is None


def test_the_lock_frees_itself_when_its_holder_is_killed(holder: Any, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with RunDir(tmp_path / "run").hold():
        assert rundir.read_json(tmp_path / "run" / ".holder.json")["pid"] == os.getpid()


def test_the_lock_is_given_back_also_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunDir(tmp_path / "run").hold():
        raise KeyError
    with RunDir(tmp_path / "run").hold():
        pass
    assert not (tmp_path / "run" / ".holder.json").exists()


def test_only_a_run_is_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        RunDir.open(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    rundir.write_json(run / "manifest.json", {})
    assert RunDir.open(run).model == run / "model"
    with pytest.raises(InputError) as caught:
        RunDir.open(tmp_path)
    assert caught.value.remedy == f"give one in it, such as {run}"


def test_a_run_stopped_before_its_manifest_gives_way_to_a_new_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.hold():
        rundir.write_file(run.path / "recipe.yaml", b"model: x")
        (run.path / ".plan.json.part").write_bytes(b"{")
    assert rundir.is_unbegun(run.path)
    with pytest.raises(InputError, match="stopped before its run began"):
        RunDir.open(run.path)
    (run.path / "notes.txt").write_text("mine")
    assert not rundir.is_unbegun(run.path)


def test_all_that_is_written_before_the_manifest_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_manifest", killed)
    recipe = parse_recipe({"model": "m", "data": {"train": "t"}, "objective": "sft", "method": "lora"})
    plan: Any = SimpleNamespace(to_json=dict)
    assets: Any = SimpleNamespace(prepared=SimpleNamespace(keys=as_keys(b"0" * 16), validation_keys=as_keys(b"")))
    run = RunDir(tmp_path / "run")
    with run.hold(), pytest.raises(KeyboardInterrupt):
        training.begin(run, recipe, plan, assets, {})
    assert {p.name for p in run.path.iterdir()} >= set(rundir.BEFORE_MANIFEST)
    assert rundir.is_unbegun(run.path)


def test_a_recipe_of_the_users_own_is_not_taken_for_what_a_run_left(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x")
    assert not rundir.is_unbegun(tmp_path)


def test_several_processes_may_write_one_file_of_the_cache(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tunesmith import rundir
for i in range(300):
    rundir.write_json(Path({str(tmp_path / "speed.json")!r}), {{"at": i}}, shared=True)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(p.communicate()[1], p.returncode) for p in running] == [("", 0)] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]
    assert rundir.read_record(tmp_path / "speed.json", "at") == {"at": 299}
