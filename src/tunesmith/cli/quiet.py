"""Chatter of other libraries is kept off the screen; their errors and our own warnings are not."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager

# Read by the libraries when they are imported, which is after this.
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # else every fork warns
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# torch writes its warnings by handlers of its own; these are of how torchao, which PEFT imports, registers its types.
OF_TORCH = ("torch.utils._pytree",)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what stderr is at the time: a live view puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


@contextmanager
def third_parties_quiet() -> Generator[None]:
    """Inside, only errors of other libraries are shown, and warnings of ours in one line each."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in OF_TORCH:
        logging.getLogger(name).setLevel(logging.ERROR)
    theirs, ours = _Stderr(), _Stderr()
    theirs.setLevel(logging.ERROR)
    ours.setFormatter(logging.Formatter("warning: %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("tunesmith")
    propagated = own.propagate
    root.addHandler(theirs)
    own.addHandler(ours)
    own.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(theirs)
        own.removeHandler(ours)
        own.propagate = propagated
