"""What the keys of a recipe are made of: bounds of values, their meaning, and models that refuse unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]
Above0 = Annotated[float, Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.001, le=1000)]  # how much something counts
Heat = Annotated[float, Field(ge=0.01, le=10)]  # a temperature; beyond, all is certain or all is chance
Text = Annotated[str, Field(min_length=1)]


def key(default: Any, meaning: str, example: Any, otherwise: str = "") -> Any:
    """A key that may be left out. `otherwise`: where its value comes from then, if not from `default`.

    Errors, `tunesmith schema` and docs/recipes.md say what stands here.
    """
    said: Any = {"description": meaning, "examples": [example]}
    if otherwise:
        said["json_schema_extra"] = {"otherwise": otherwise}
    return Field(default_factory=default, **said) if callable(default) else Field(default, **said)


class Strict(BaseModel):
    """Unknown keys are refused; values are frozen once read. Null is as leaving a key out, whatever else it may be."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = cast("dict[str, Any]", given)
        return {name: value for name, value in kept.items() if value is not None or cls._takes_null(name)}

    @classmethod
    def _takes_null(cls, name: str) -> bool:
        """Whether null says something of its own there, or is left for pydantic to refuse."""
        known = cls.model_fields.get(name)
        return known is None or known.is_required() or type(None) in get_args(known.annotation)


class Choice(BaseModel):
    """A registered name with its options: `lora`, or `{name: lora, rank: 16}`.

    The options are checked by the model that the named thing declares beside itself.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Text

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _as_choice(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Named = Annotated[Choice, BeforeValidator(_as_choice, json_schema_input_type=str | Choice)]

# It becomes part of a file's name, so it must not lead out of the run's folder.
SET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SetName = Annotated[str, Field(pattern=SET_NAME, description="a name of letters, digits, dots, dashes and underscores")]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[Text], BeforeValidator(_as_list, json_schema_input_type=Text | list[Text])]
