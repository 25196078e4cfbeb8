"""docs/recipes.md: every key of a recipe, and what is registered under the names that it may hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pages import code, page, table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.evaluation import METRICS
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import Recipe
from tunesmith.recipe_problems import spellings
from tunesmith.recipe_schema import describe
from tunesmith.registry import Registry
from tunesmith.trackers import TRACKERS
from tunesmith.yaml_text import write_yaml

REGISTERED = ("objective", "method")  # keys whose options are listed by name
HEADS = {"lm": "the base's own output", "pooled": "a fresh head"}
INTRODUCTION = """
A recipe is a YAML file of few keys. Everything that is left out gets a default, which `tunesmith plan` prints with its
reason. Any key can be set on the command line: `tunesmith train recipe.yaml train.epochs=1 method.rank=8`; `null`
unsets one. `tunesmith schema` prints the JSON schema of what follows, for editors.

```yaml
model: smollm2-135m-instruct
data: {train: tickets.jsonl, validation: 0.1, test: tickets-test.jsonl}
objective: sft
method: {name: lora, rank: 16}
train: {epochs: 3, learning_rate: 1e-3}
```

`1e-4` is a number, a key given twice is an error, and an unknown key is an error that names its line and the nearest
key. YAML's tags, merge keys and second documents are not read.
"""


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models of keys that a field's type is made of; the options of a registered name are not among them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_config.get("extra") == "forbid":
            yield annotation
        return
    for argument in get_args(annotation):
        yield from models_in(argument)


def sections(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The model of every set of keys, with the path of the key that holds it."""
    yield above, model
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from sections(inner, f"{above}.{name}" if above else name)


def default_of(field: FieldInfo) -> str:
    """What stands in the place of a key that is left out."""
    if isinstance(field.json_schema_extra, dict) and "otherwise" in field.json_schema_extra:
        return str(field.json_schema_extra["otherwise"])
    if field.is_required():
        return "**needed**"
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "the defaults of its keys"
    return "none" if value is None else code(write_yaml(value, one_line=True))


def keys_table(model: type[BaseModel], *, of_recipe: bool = True) -> str:
    """A row for each key of a model."""
    schema = model.model_json_schema()
    rows: list[list[str]] = []
    for name, field in model.model_fields.items():
        words = describe(schema["properties"][name], schema)
        if model is Recipe and name in REGISTERED:
            words = "a name, or a set of keys (name, and the name's options)"
        row = [code(name), words, default_of(field), field.description or ""]
        if of_recipe:
            row.append(code(f"{name}: {write_yaml(field.examples[0], one_line=True)}") if field.examples else "")
        rows.append(row)
    return table(["key", "is", "left out", "means", *(["example"] if of_recipe else [])], rows)


def _keys() -> str:
    parts: list[str] = []
    for path, model in sections(Recipe):
        parts += [f"### `{path}`" if path else "### A recipe", first_lines(model), keys_table(model)]
    return "\n\n".join(parts)


def first_lines(thing: Any) -> str:
    """A docstring, the lines of each paragraph joined."""
    text = inspect.cleandoc(thing.__doc__ or "").replace("<", "\\<").replace(" * ", " \\* ")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def builtin(registry: Registry[Any]) -> list[str]:
    """The names that tunesmith itself registers; a plugin's are not in this page."""
    return [name for name in registry if registry.get(name).__module__.startswith("tunesmith.")]


def _options(thing: Any) -> str:
    options: type[BaseModel] = thing.Options
    return keys_table(options, of_recipe=False) if options.model_fields else "It has no options."


def _objectives() -> str:
    parts: list[str] = []
    for name in builtin(OBJECTIVES):
        objective = OBJECTIVES.get(name)
        needs = objective.needs
        facts = (
            f"Reads rows of the kinds {_list(sorted(needs.formats))}; bases: {_list(sorted(needs.kinds))}.\n"
            f"Measured unless the recipe names others: {_list(needs.metrics)}."
        )
        parts += [f"### `{name}`", _sentence(needs.summary), first_lines(objective), facts, _options(objective)]
    return "\n\n".join(parts)


def _methods() -> str:
    parts: list[str] = []
    for name in builtin(METHODS):
        method = METHODS.get(name)
        facts = method.facts
        said = (
            f"Bases: {_list(sorted(facts.kinds))}. Serves {' and '.join(HEADS[h] for h in sorted(facts.heads))}.\n"
            f"Learning rate if left out: {facts.learning_rate:g} ({facts.learning_rate_source})."
        )
        parts += [f"### `{name}`", _sentence(facts.summary), first_lines(method), said, _options(method)]
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _list(names: Iterable[str]) -> str:
    return ", ".join(code(name) for name in names)


def _spellings() -> str:
    known = sorted(spellings().items())
    renamed = [[code(theirs), code(ours), note] for theirs, (ours, note) in known if ours]
    unneeded = [[code(theirs), "", note] for theirs, (ours, note) in known if not ours]
    said = "An error that meets one of these words gives the key to use here."
    return f"{said}\n\n{table(['their word', 'here', 'note'], [*renamed, *unneeded])}"


def make() -> str:
    """The whole page."""
    parts = {
        "Keys": _keys(),
        "Objectives": _objectives(),
        "Methods": _methods(),
        "Metrics": f"For `evaluate.metrics`: {_list(builtin(METRICS))}. [metrics.md](metrics.md) says what each is.",
        "Trackers": f"For `report_to`: {_list(builtin(TRACKERS))}. docs/tracking.md says what each is sent.",
        "Words of other tools": _spellings(),
    }
    return page("Recipes", INTRODUCTION, *(f"## {title}\n\n{part}" for title, part in parts.items()))
