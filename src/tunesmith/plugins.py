"""The user's own Python files, which register methods, objectives or metrics that recipes then name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from tunesmith import rundir
from tunesmith.errors import InputError

PLUGIN = "tunesmith_plugin_"  # begins the name of a module that is such a file
_LOADED: dict[Path, str] = {}  # sha256 of each plugin that this process has run


def load_plugins(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Runs the user's files, which register names that recipes use; their sha256 by name."""
    hashes: dict[str, str] = {}
    for path in map(Path, paths):
        spec = importlib.util.spec_from_file_location(f"{PLUGIN}{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise InputError(f"--plugin {path} is not a Python file", "give the path of a .py file")
        hashes[path.name] = rundir.sha256_file(path)
        if _LOADED.get(path.resolve()) == hashes[path.name]:
            continue  # what it registers is there since an earlier call of this process
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except (Exception, SystemExit) as error:
            raise InputError(f"--plugin {path} fails: {type(error).__name__}: {error}", "mend the file") from error
        _LOADED[path.resolve()] = hashes[path.name]
    return hashes
