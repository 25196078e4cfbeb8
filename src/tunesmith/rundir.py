"""The run directory: what a run writes, so that a kill at any instant leaves it whole.

Every byte goes through `write_file` (aside, fsync, rename) or `Journal` (append; cut back to the
checkpoint's length on resume), so there are three places where a disk can fail.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout

from tunesmith.errors import InputError, ResourceError

LOCK, HOLDER = ".lock", ".holder.json"
TRAIN_KEYS = "train.keys"  # of what each training row shows the model, 16 bytes a row, sorted
FOLDS = "folds"  # the folder of a cross-validation's folds, and the name of all their answers as one set
CROSSVAL = "crossval.json"  # what a cross-validation found in its folds
VALIDATION_KEYS = "validation.keys"  # likewise
BEFORE_MANIFEST = ("recipe.yaml", "plan.json", TRAIN_KEYS, VALIDATION_KEYS)  # what a run writes before it has begun
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_bytes(handle: BinaryIO, content: bytes | memoryview) -> None:
    """The one place where a run's bytes are written."""
    handle.write(content)


def sync_file(handle: BinaryIO) -> None:
    """The one place where a file is forced to disk."""
    handle.flush()
    os.fsync(handle.fileno())


def rename(source: Path, target: Path) -> None:
    """The one place where something made aside takes its name."""
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(what: str) -> Generator[None]:
    """Turns a full or failing disk into exit code 4, naming what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"the disk is full while writing {what}",
                "free space and run `tunesmith resume`; the previous checkpoint is intact",
            ) from error
        raise ResourceError(
            f"cannot write {what}: {error.strerror or error}", "check the folder's rights and the disk"
        ) from error


def write_file(path: Path, content: bytes | memoryview, *, shared: bool = False) -> None:
    """Replaces `path` by `content`: readers see the old file or the new one, never a part.

    `shared`: several processes may write it at once, as in the cache; the last one's stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    with disk_errors(str(path)):
        with open(aside, "wb") as handle:
            write_bytes(handle, content)
            sync_file(handle)
        rename(aside, path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """`write_file` of readable JSON; NaN and infinity are errors."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    write_file(path, text.encode(), shared=shared)


def read_text(path: Path) -> str:
    """The text of a file that tunesmith wrote; one that is not there is refused by name."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", f"check that {path.parent} is a run of tunesmith") from error


def read_json(path: Path) -> Any:
    """The JSON of a file that tunesmith wrote; a damaged one is refused by name."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}", "restore it, or start the run again") from error


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """`read_json` of an object; one that lacks any of `keys` is refused as damaged."""
    found = read_json(path)
    held = cast("dict[str, Any]", found if isinstance(found, dict) else {})
    lacking = [key for key in keys if key not in held]
    if lacking:
        raise InputError(f"{path} is damaged: it lacks {', '.join(lacking)}", "restore it, or start the run again")
    return held


def check_free(path: Path) -> None:
    """InputError where something new would take the place of a file, or of a folder that holds something."""
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError(f"{path} exists and is not empty", "give another path, or empty it")
    elif path.exists():
        raise InputError(f"{path} is a file that exists already", "give another path")


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def replace_folder(path: Path) -> Generator[Path]:
    """Gives an empty folder aside; on leaving it takes the name `path`, replacing what was there.

    Its files are fsynced first, and readable by whom the umask lets (safetensors writes for the owner alone).
    Where the body fails, `path` stays as it was and nothing is left aside.
    """
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(str(path)):
        aside.mkdir(parents=True)
        try:
            yield aside
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        mode = aside.stat().st_mode & 0o666
        for file in sorted(p for p in aside.rglob("*") if p.is_file()):
            if file.stat().st_mode & 0o666 != mode:
                file.chmod(mode)
            with open(file, "rb+") as handle:
                sync_file(handle)
        for folder in sorted(p for p in [aside, *aside.rglob("*")] if p.is_dir()):
            sync_folder(folder)
        swap(aside, path)


def swap(aside: Path, path: Path) -> None:
    """Gives the folder `aside` the name `path`; what had it is kept under another name until then."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        rename(path, old)
    rename(aside, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(parent: Path) -> None:
    """Mends what kills left in `parent`: between the two renames of a `swap`, or something half made or half gone."""
    for old in parent.glob(".*.old"):
        path = parent / old.name.removeprefix(".").removesuffix(".old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            rename(old, path)
    for left in [*parent.glob(".*.part"), *parent.glob(".*.gone")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


class Journal:
    """A file of JSON lines that is only appended to, and can be cut back to an earlier length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: BinaryIO = open(path, "ab")  # noqa: SIM115  # closed by close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; not forced to disk until `sync`."""
        with disk_errors(str(self.path)):
            write_bytes(self._handle, (json.dumps(record, allow_nan=False) + "\n").encode())
            self._handle.flush()

    def sync(self) -> int:
        """Forces the lines to disk and returns the file's length in bytes."""
        with disk_errors(str(self.path)):
            sync_file(self._handle)
        return self._handle.tell()

    def cut(self, length: int) -> None:
        """Drops everything after `length` bytes."""
        if self.path.stat().st_size < length:
            raise InputError(f"{self.path} is shorter than its checkpoint says", "restore it, or start the run again")
        with disk_errors(str(self.path)):
            os.truncate(self.path, length)
            sync_file(self._handle)
            self._handle.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._handle.close()


class RunDir:
    """One run's folder, held by one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    @contextmanager
    def hold(self) -> Generator[None]:
        """Holds the run for this process, whole again after a kill; another process is refused, naming the holder.

        The lock is the operating system's, so it frees itself when its holder dies. A folder that was made here is
        taken away again where an error or a signal ends its run before it has begun.
        """
        with disk_errors(str(self.path)):
            made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / HOLDER
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0.2)
        except Timeout as error:
            who = _holder(holder)
            raise ResourceError(
                f"{self.path} is held by {who}", "wait for it or stop it, then run this again"
            ) from error
        try:
            write_json(
                holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            )
            with disk_errors(str(self.path)):
                for parent in (self.path, self.checkpoints, self.model):
                    recover(parent)
            yield
        except BaseException:
            if made and is_unbegun(self.path):
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def journal(self, name: str) -> Journal:
        return Journal(self.path / name)

    @staticmethod
    def open(path: Path) -> RunDir:
        """The run at `path`; a folder that is no run is refused."""
        if not (path / "manifest.json").is_file():
            if is_unbegun(path) and (path / LOCK).exists():
                raise InputError(
                    f"{path} was stopped before its run began, so there is nothing to go on from",
                    f"start it again: `tunesmith train RECIPE --out {path}`",
                )
            if not path.exists():
                raise InputError(f"there is no folder {path}", "give the folder that `tunesmith train` printed")
            inside = sorted(str(found.parent) for found in path.glob("*/manifest.json"))
            raise InputError(
                f"{path} is not a run of tunesmith (it has no manifest.json)",
                f"give one in it, such as {inside[0]}" if inside else "give the folder that `tunesmith train` printed",
            )
        return RunDir(path)


def free_folder(name: str) -> Path:
    """runs/<name>, or the first of -2, -3, ... that is free."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def is_unbegun(path: Path) -> bool:
    """Whether nothing is in the folder, or only what a run stopped before its manifest left there."""
    names = {p.name for p in path.iterdir()} if path.is_dir() else set[str]()
    ours = {LOCK, HOLDER, *BEFORE_MANIFEST, *(f".{name}.part" for name in (HOLDER, *BEFORE_MANIFEST, "manifest.json"))}
    return not names or (LOCK in names and names <= ours)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process that is just starting"
