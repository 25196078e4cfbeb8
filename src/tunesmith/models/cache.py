"""The model cache: where it lies, and file hashes that are not computed twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); stages are download, convert, verify and wait."""

_CHUNK = 1 << 22


def cache_dir() -> Path:
    """$TUNESMITH_CACHE, or `tunesmith` in the platform's cache folder of this user. Not created."""
    if chosen := os.environ.get("TUNESMITH_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tunesmith"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tunesmith"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


def file_sha256(path: Path, progress: Progress | None = None, *, remember: bool = True) -> str:
    """The file's sha256 in hex, read from a memo when size and both times are unchanged.

    The memo is what makes a second load take milliseconds. The time of the inode's last change is
    part of it, which no `touch` can set back. `remember=False` neither reads nor writes it.
    """
    stat = path.stat()
    if not remember:
        return _hash(path, stat.st_size, progress)
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_dir() / "hashes" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:40]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(memo.read_text())
        if kept["stamp"] == stamp:
            return str(kept["sha256"])
    digest = _hash(path, stat.st_size, progress)
    # A cache that cannot be written costs time, not correctness.
    with contextlib.suppress(OSError):
        write_json(memo, {"path": str(path.absolute()), "stamp": stamp, "sha256": digest})
    return digest


def files_sha256(paths: Iterable[Path], progress: Progress | None = None) -> str:
    """One sha256 for a set of files, in name order.

    A single file keeps its own; several give that of their `sha256sum` listing, so both can be
    checked by hand (`sha256sum *.safetensors | sha256sum`).
    """
    ordered = sorted(paths, key=lambda p: p.name)
    digests = [(file_sha256(p, progress), p.name) for p in ordered]
    if len(digests) == 1:
        return digests[0][0]
    listing = "".join(f"{digest}  {name}\n" for digest, name in digests)
    return hashlib.sha256(listing.encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON aside and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


def _hash(path: Path, size: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress("verify", done, size)
    return digest.hexdigest()
