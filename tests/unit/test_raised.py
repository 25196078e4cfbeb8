"""What finds the errors that no test raises: on a small source, and on tunesmith's own."""

from __future__ import annotations

from pathlib import Path

import error_sites
import pytest
import raised

SOURCE = """
from tunesmith.errors import InputError, RefusedError

def first(name):
    if name == "a":
        raise InputError(f"{name} is wrong", "give another")
    raise _refused("gone", name)

def _refused(what, name):
    return RefusedError(f"{name} is {what}", "restore it")
"""


@pytest.fixture
def sites(tmp_path: Path) -> list[error_sites.Site]:
    (tmp_path / "rules.py").write_text(SOURCE)
    return error_sites.find(tmp_path)


def test_a_site_is_a_cause_a_remedy_and_an_exit_code(sites: list[error_sites.Site]) -> None:
    found = [(site.line, site.cause, site.remedy, site.exit_code) for site in sites]
    assert found == [(6, "‹name› is wrong", "give another", "2"), (7, "‹name› is gone", "restore it", "3")]


def test_a_site_is_raised_when_its_line_was_seen(sites: list[error_sites.Site]) -> None:
    assert raised.unraised(sites, [], []) == sites
    assert raised.unraised(sites, [], [("rules.py", 6), ("other.py", 7)]) == sites[1:]
    assert raised.unraised(sites, [], [("rules.py", 10), ("rules.py", 7), ("rules.py", 6)]) == []


def test_what_is_noted_names_the_places_from_the_inside_out(tmp_path: Path) -> None:
    from tunesmith.errors import TunesmithError
    from tunesmith.yaml_text import read_yaml

    kept = TunesmithError.__init__
    raised.record(str(tmp_path / "log"))
    try:
        with pytest.raises(TunesmithError):
            read_yaml("a: 1\na: 2\n", "recipe.yaml")
    finally:
        TunesmithError.__init__ = kept
    missing = [site.place for site in error_sites.find() if site.file == "yaml_text.py"]
    judged = [line for line in raised.judge(tmp_path / "log") if "/yaml_text.py:" in line]
    assert 0 < len(judged) < len(missing)
