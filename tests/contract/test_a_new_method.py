"""A method in one file with one registration goes through the whole suite; one that breaks a promise does not pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOY = '''
"""Trains the last norm alone."""

from tunesmith.methods import METHODS
from tunesmith.methods.own_weights import OwnWeights
from tunesmith.recipe_keys import Strict
from tunesmith.declared import MethodFacts


@METHODS.register("toy")
class Toy(OwnWeights):
    facts = MethodFacts(
        summary="the last norm",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="snapshot",
        learning_rate=1e-3,
        learning_rate_source="a toy",
    )

    class Options(Strict):
        """None."""

    def chosen(self, policy):
        return {[name for name, _ in policy.model.named_parameters() if "norm" in name.lower()][-1]}
'''
BROKEN = (
    TOY
    + """
    def reference(self, policy):
        from contextlib import nullcontext

        return nullcontext()  # not the base
"""
)
SUITE = Path(__file__).with_name("test_methods.py")


def suite(folder: Path, method: str) -> tuple[int, str]:
    """The suite's exit code and last words for a plugin, on one family of each kind."""
    (folder / "toy.py").write_text(method)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(SUITE),
         "-k", "toy and (llama or bert or t5) and not roberta and not deberta and not modernbert"],
        env={**os.environ, "CONTRACT_PLUGINS": str(folder / "toy.py")}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_method_in_one_file_passes_the_suite(tmp_path: Path) -> None:
    code, said = suite(tmp_path, TOY)
    assert code == 0, said[-3000:]
    assert said.count(".") >= 15  # five promises for each of three families
    assert not re.search(r"failed|error", said)


@pytest.mark.slow
def test_a_method_that_does_not_give_the_base_back_fails(tmp_path: Path) -> None:
    code, said = suite(tmp_path, BROKEN)
    assert code == 1
    assert "test_only_what_is_named_trains_and_the_base_comes_back[toy-llama]" in said
