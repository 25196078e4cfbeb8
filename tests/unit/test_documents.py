"""The generated pages are those of this source, and what they are made of is there: descriptions and examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import documents
import pytest
from pydantic import BaseModel
from recipe_page import builtin, first_lines, sections

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import About
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import Recipe
from tunesmith.recipe_problems import find_problems

REQUIRED = {
    "code": {"tests": "test"},
    "decoding": {"metric": "rouge_l"},
    "conformal": {"coverage": 0.9},
}  # what is not left out of a section
BASE: dict[str, Any] = {"model": "base", "data": {"train": "rows.jsonl"}, "objective": "sft", "method": "lora"}
SECTIONS = dict(sections(Recipe))
OPTIONS = {f"{r.what} {name}": r.get(name).Options for r in (METHODS, OBJECTIVES) for name in builtin(r)}


@pytest.mark.parametrize("name", documents.PAGES)
def test_a_page_is_what_the_source_says(name: str) -> None:
    made = documents.PAGES[name]()
    assert (documents.DOCS / name).read_text(encoding="utf-8") == made, "run `make docs`"


@pytest.mark.parametrize(("where", "model"), [*SECTIONS.items(), *OPTIONS.items()])
def test_every_key_is_described_beside_its_type(where: str, model: type[BaseModel]) -> None:
    silent = [f"{where}.{name}" for name, field in model.model_fields.items() if not field.description]
    assert not silent, "give each Field a description"
    assert first_lines(model)


def test_every_variant_says_what_it_is() -> None:
    for registry in (METHODS, OBJECTIVES, METRICS):
        assert all(first_lines(registry.get(name)) for name in builtin(registry))


@pytest.mark.parametrize("name", builtin(METRICS))
def test_every_metric_says_itself_where_it_is_from_and_what_it_is_for(name: str) -> None:
    """Not the metric that it derives from."""
    about = vars(METRICS.get(name)).get("about")
    assert isinstance(about, About), "give the class its own `about`"
    assert all((about.source, about.library, about.use))


def examples() -> Iterator[tuple[str, Any]]:
    for above, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            for example in field.examples or [None]:
                yield f"{above}.{name}".lstrip("."), example


@pytest.mark.parametrize(("key", "example"), list(examples()))
def test_every_key_of_a_recipe_has_an_example_that_is_right(key: str, example: Any) -> None:
    recipe: dict[str, Any] = {**BASE, "data": dict(BASE["data"])}
    *above, last = key.split(".")
    part: Any = recipe
    if key.startswith("data.train."):
        part = {"path": "rows.jsonl"}
        recipe["data"]["train"] = [part]
    elif key.startswith("data.corpus."):
        part = recipe["data"]["corpus"] = {"path": "passages.jsonl"}
    else:
        for name in above:
            part = part.setdefault(name, dict(REQUIRED.get(name, {})))
    part[last] = example
    assert find_problems(recipe, Recipe) == []
