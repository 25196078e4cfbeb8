"""The registry: a name leads to what was registered, a wrong one to the nearest, and packages load themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunesmith.errors import InputError
from tunesmith.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of two variants, each in its own file."""
    folder = tmp_path / "variants"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from tunesmith.registry import Registry\nTHINGS = Registry('thing', 'variants')\n"
    )
    for name in ("apple", "pear"):
        text = f"from variants import THINGS\n@THINGS.register('{name}')\nclass Thing:\n    word = '{name}'\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "variants"
    for module in [m for m in sys.modules if m.partition(".")[0] == "variants"]:
        del sys.modules[module]


def things(package: str) -> Registry[type]:
    import importlib

    registry: Registry[type] = importlib.import_module(package).THINGS
    return registry


def test_variants_are_found_without_being_imported_by_anyone(package: str) -> None:
    registry = things(package)
    assert "variants.apple" not in sys.modules
    assert list(registry) == ["apple", "pear"]
    assert registry.get("pear").word == "pear"  # type: ignore[attr-defined]


def test_an_unknown_name_comes_with_the_nearest(package: str) -> None:
    with pytest.raises(InputError) as caught:
        things(package).get("aple")
    assert caught.value.cause == "unknown thing 'aple'"
    own = "what a file of yours registers, with --plugin FILE"
    assert caught.value.remedy == f"did you mean 'apple'? known: apple, pear; {own}"
    with pytest.raises(InputError) as caught:
        things(package).get("xyzzy")
    assert caught.value.remedy == f"known: apple, pear; {own}"


def test_a_name_that_others_use_is_told_in_a_recipes_words(package: str) -> None:
    """Every hint of the methods is a recipe that is right."""
    import inspect
    import re

    from tunesmith.methods import METHODS
    from tunesmith.recipe import Recipe
    from tunesmith.recipe_file import check_options, parse_recipe
    from tunesmith.yaml_text import read_yaml

    with pytest.raises(InputError) as caught:
        METHODS.get("BitFit")
    assert caught.value.remedy.startswith("write `method: {name: partial, only: biases}`; known: adalora")
    table = Path(inspect.getfile(METHODS.get("lora"))).with_name("other_names.yaml").read_text()
    for name, here in read_yaml(table, "names").value.items():
        assert name not in METHODS
        if not here.startswith("method: "):
            continue
        said = re.sub(r", (with|or) .*", "", here)
        method = read_yaml(said, "hint").value["method"]
        recipe: Recipe = parse_recipe({"model": "m", "data": {"train": "t"}, "objective": "sft", "method": method})
        check_options(recipe.method, METHODS.get(recipe.method.name).Options, "method")


def test_a_metrics_name_in_other_tools_is_told() -> None:
    import inspect

    from tunesmith.evaluation import METRICS
    from tunesmith.yaml_text import read_yaml

    with pytest.raises(InputError) as caught:
        METRICS.get("PR-AUC")
    assert caught.value.remedy.startswith("write `average_precision`; known: accuracy")
    table = Path(inspect.getfile(METRICS.get("accuracy"))).with_name("other_names.yaml").read_text()
    for name, here in read_yaml(table, "names").value.items():
        assert name not in METRICS
        assert here in METRICS


def test_a_name_is_registered_once(package: str) -> None:
    registry = things(package)
    list(registry)

    with pytest.raises(InputError, match="thing 'apple' is registered twice"):
        registry.register("apple")(int)
    apple = registry.get("apple")
    assert registry.register("apple")(apple) is apple


def test_a_variant_that_fails_to_import_is_tried_again(package: str, tmp_path: Path) -> None:
    registry = things(package)
    broken = tmp_path / "variants" / "zebra.py"
    broken.write_text("raise ImportError('no stripes')\n")
    for _ in range(2):  # the second call must not find a registry that silently lacks it
        with pytest.raises(ImportError, match="no stripes"):
            registry.get("apple_pie")
    broken.unlink()
    assert list(registry) == ["apple", "pear"]


@pytest.mark.parametrize(("package_name", "registry"), [("methods", "METHODS"), ("objectives", "OBJECTIVES")])
def test_what_is_registered_describes_itself(package_name: str, registry: str) -> None:
    import importlib

    found = getattr(importlib.import_module(f"tunesmith.{package_name}"), registry)
    assert list(found)
    for name in found:
        item = found.get(name)
        facts = item.facts if package_name == "methods" else item.needs
        assert facts.summary
        assert item.Options.model_config.get("extra") == "forbid", f"{name}.Options: derive from recipe_keys.Strict"
