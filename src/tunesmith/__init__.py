"""tunesmith: one system for the whole life of a fine-tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.adapters import Adapters, load_adapters
    from tunesmith.api import Result, chat, evaluate, export, plan, predict, resume, train
    from tunesmith.comparing import Comparison, compare
    from tunesmith.cross_validating import CrossValidation, crossval
    from tunesmith.events import Callback, StopRun
    from tunesmith.loaded import Loaded, load
    from tunesmith.recipe import Recipe
    from tunesmith.suites import evaluate_suite

__version__ = "0.1.0"
__all__ = [
    "Adapters",
    "Callback",
    "Comparison",
    "CrossValidation",
    "Loaded",
    "Recipe",
    "Result",
    "StopRun",
    "chat",
    "compare",
    "crossval",
    "evaluate",
    "evaluate_suite",
    "export",
    "load",
    "load_adapters",
    "plan",
    "predict",
    "resume",
    "train",
]
_ELSEWHERE = {  # the rest are the verbs of the API
    "Adapters": "adapters",
    "Callback": "events",
    "Comparison": "comparing",
    "CrossValidation": "cross_validating",
    "Loaded": "loaded",
    "Recipe": "recipe",
    "StopRun": "events",
    "compare": "comparing",
    "crossval": "cross_validating",
    "evaluate_suite": "suites",
    "load": "loaded",
    "load_adapters": "adapters",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import tunesmith` costs nothing."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tunesmith.{_ELSEWHERE.get(name, 'api')}"), name)
