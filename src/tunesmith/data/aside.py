"""Folders that are whole or not there: written aside, renamed into place, and checked by hash when opened."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import orjson
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray

from tunesmith.errors import ResourceError

META = "meta.json"
_BUFFER = 2**20


class Sink:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._waiting = bytearray()
        self.bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._waiting += data
        self.bytes += len(data)
        if len(self._waiting) >= _BUFFER:  # many small writes become one of the file and one of the hash
            self._flush()

    def array(self, values: NDArray[Any]) -> None:
        self.write(np.ascontiguousarray(values).tobytes())

    def close(self) -> dict[str, Any]:
        self._flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._stream.close()

    def _flush(self) -> None:
        self._hash.update(self._waiting)
        view = memoryview(self._waiting)
        while view:
            view = view[self._stream.write(view) :]
        self._waiting = bytearray()


class Build:
    """A folder being written: files by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sinks: dict[str, Sink] = {}

    def file(self, name: str) -> Sink:
        self._sinks[name] = Sink(self.folder / name)
        return self._sinks[name]

    @property
    def bytes(self) -> int:
        return sum(sink.bytes for sink in self._sinks.values())

    def finish(self, meta: dict[str, Any]) -> None:
        files = {name: sink.close() for name, sink in self._sinks.items()}
        text = orjson.dumps({**meta, "files": files}, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)
        with (self.folder / META).open("wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        for sink in self._sinks.values():
            sink.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_or_build(path: Path, make: Callable[[Build], dict[str, Any]]) -> dict[str, Any]:
    """The meta data of the folder at `path`; `make` writes its files first where it is absent or damaged.

    One process builds, others wait for it. A build that dies leaves only a folder named .part, which
    the next one removes. ResourceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        meta = verified(path)
        if meta is not None:
            return meta
        part = path.with_name(path.name + ".part")
        for old in (part, path):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir()
        build = Build(part)
        try:
            build.finish(make(build))
            part.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            build.abandon()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"{path.parent}: the disk is full after {build.bytes // 2**20} MB",
                    "free some space, or set TUNESMITH_CACHE to a folder on another disk",
                ) from None
            raise
        except BaseException:
            build.abandon()
            raise
    return read_meta(path)


def verified(path: Path) -> dict[str, Any] | None:
    """The meta data, or None unless every file is there with the bytes that were written."""
    try:
        meta = read_meta(path)
        for name, known in cast("dict[str, dict[str, Any]]", meta["files"]).items():
            if (path / name).stat().st_size != known["bytes"]:
                return None
            with (path / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
                    return None
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    return orjson.loads((path / META).read_bytes())


def fingerprint(meta: dict[str, Any]) -> str:
    """sha256 over the meta data, which holds the sha256 of every file."""
    return hashlib.sha256(orjson.dumps(meta, option=orjson.OPT_SORT_KEYS)).hexdigest()


def mapped(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    """A read-only array over a file: pages of the file, no memory of the process's own."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
