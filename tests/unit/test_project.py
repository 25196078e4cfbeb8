"""The house rules that a machine can check: sizes, names, borders and where upstream's verbs are called."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "tunesmith").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def calls(tree: ast.AST) -> set[str]:
    """The names of all methods and module functions called with a dot: `loss.backward()` gives backward."""
    return {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}


def test_there_are_sources() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("verb", ["generate", "apply_chat_template", "backward"])
def test_upstreams_verbs_are_called_in_one_file(verb: str) -> None:
    others = {"generate": {"src/tunesmith/data/template_worker.py"}}  # a jinja template generates text
    callers = {name_of(path) for path, tree in TREES.items() if verb in calls(tree)} - others.get(verb, set())
    assert len(callers) <= 1


def test_calls_are_seen() -> None:
    assert calls(ast.parse("model.generate(x)\ntorch.autograd.backward(y)\nours()")) == {"generate", "backward"}


def test_every_file_says_its_reason_first() -> None:
    silent = [name_of(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    late = [name_of(path) for path in SOURCES if not path.read_text(encoding="utf-8").startswith(('"""', 'r"""'))]
    assert not silent + late


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "base"}
    assert not [name_of(path) for path in SOURCES if path.stem in empty or path.parent.name in empty]


def test_files_and_functions_stay_short() -> None:
    long_files = {name_of(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    long_functions = {
        f"{name_of(path)}:{node.lineno} {node.name}": lines
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 60
    }
    assert not long_files
    assert not long_functions


def test_the_loop_can_be_read_aloud() -> None:
    loop = ROOT / "src" / "tunesmith" / "loop.py"
    if not loop.exists():
        pytest.skip("there is no loop yet")
    assert len(loop.read_text(encoding="utf-8").splitlines()) < 150


def test_the_architecture_names_every_module_and_no_other() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", table, flags=re.MULTILINE))
    modules = {path.relative_to(ROOT / "src" / "tunesmith").as_posix() for path in SOURCES}
    assert named == {name for name in modules if not name.endswith("__init__.py")}


def test_data_files_parse() -> None:
    tables = sorted((ROOT / "src" / "tunesmith").rglob("*.yaml"))
    assert tables
    for table in tables:
        assert YAML(typ="safe", pure=True).load(table), name_of(table)


def test_nothing_is_left_to_do_and_nothing_exits_from_inside() -> None:
    """A failure that a user can cause is a TunesmithError: only the command line turns it into an exit."""
    found = [
        f"{name_of(path)}:{node.lineno} raises {word.id}"
        for path, tree in TREES.items()
        if path.parent.name != "cli" and path.name != "__main__.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        for word in ast.walk(node.exc or node)
        if isinstance(word, ast.Name) and word.id in ("Exception", "NotImplementedError", "SystemExit")
    ]
    assert not found


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_of_one_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:work|farm|home|tmp/v)/|\.lib" + "rary/")
    text = (".py", ".md", ".toml", ".yaml", ".txt", ".json", ".sh", "")
    found = [
        f"{name_of(path)}:{number}"
        for path in tracked()
        if path.suffix in text
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if places.search(line)
    ]
    assert not found


def test_no_private_key_or_pickle_is_kept_in_the_repository() -> None:
    refused = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".pem", ".key"}
    assert not [name_of(path) for path in tracked() if path.suffix in refused]


def test_constraints_pin_everything_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert names == sorted(set(names))
    pinned = set(names)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^    "([A-Za-z0-9._-]+?)(?:\[\w+\])?(?:[><=].*)?",$', project, flags=re.MULTILINE)
    wanted = {name.lower().replace("_", "-") for name in named if not name.startswith("tunesmith")}
    assert {"torch", "transformers", "pytest"} <= wanted <= pinned
