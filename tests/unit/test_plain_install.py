"""An installation without extras has all that it needs: nothing else is imported on the way to a run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

IMPORTS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ImportError(f"{name} comes with no plain installation")

sys.meta_path.insert(0, Refuse())
from tunesmith import api, cli
from tunesmith.evaluation import METRICS
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.trackers import TRACKERS
for registry in (METRICS, METHODS, OBJECTIVES, TRACKERS):
    assert list(registry)
"""

OWN = ("tunesmith", "torchao")  # whose extras are for who develops them: with torchao's, all that we test with


def distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def needed() -> set[str]:
    """What pip installs with tunesmith alone; extras of what it needs count too, so nothing is refused wrongly."""
    found, left = set[str](), ["tunesmith"]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            asked = requires(name) or []
        except PackageNotFoundError:
            continue
        left += [distribution(r) for r in asked if name not in OWN or "extra ==" not in r]
    return found


def test_a_plain_installation_finds_every_metric_method_objective_and_tracker() -> None:
    there = needed()
    refused = [
        module
        for module, distributions in packages_distributions().items()
        if not there & {name.lower().replace("_", "-") for name in distributions}
    ]
    assert "lm_eval" in refused or "hypothesis" in refused  # else nothing is tried
    done = subprocess.run(
        [sys.executable, "-c", f"refused = set({refused!r})\n{IMPORTS}"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
