"""What a recipe left open, the value that it took, and where that is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.recipe_file import Origin, defaults_taken
from tunesmith.settings import Default

if TYPE_CHECKING:
    from tunesmith.protocols import Method
    from tunesmith.recipe import Recipe


def all_defaults(recipe: Recipe, origin: Origin, resolved: Sequence[Default], method: Method) -> list[Default]:
    """The method's own, those that depended on facts, then those that the recipe's own model filled in."""
    known = {default.key for default in resolved}
    plain = [
        Default(key, value, "the recipe's default")
        for key, value in defaults_taken(recipe, origin).items()
        if key not in known and value is not None and value != {} and value != []
    ]
    return [*_method_defaults(recipe, method), *resolved, *plain]


def _method_defaults(recipe: Recipe, method: Method) -> Iterator[Default]:
    """Options that the recipe leaves open, with where their values are from; those that do nothing are left out."""
    options = method.options
    implied: Mapping[str, tuple[Any, str]] = getattr(options, "implied", {})
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if name in recipe.method.options:
            continue
        if value is None and name in implied:
            yield Default(f"method.{name}", *implied[name])
        elif value not in (None, False, [], {}):
            extra: Any = field.json_schema_extra or {}
            usual = value == field.get_default(call_default_factory=True)
            source = extra.get("source", "the method's default") if usual else "the other options, or the earlier run"
            yield Default(f"method.{name}", value, source)
