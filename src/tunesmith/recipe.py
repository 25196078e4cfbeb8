"""The typed recipe: what the user asks for, and nothing else. Defaults that depend on facts are None here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Unknown keys are refused; values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class TrainingSet(Strict):
    """One of several sets that are mixed.

    `weight`: how often each row is seen in an epoch (2 twice, 0.5 every other epoch half of them);
    `limit`: at most so many rows, drawn with the recipe's seed.
    """

    path: Text
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    limit: Positive | None = None
    format: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)


def _as_set(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Mixed = Annotated[TrainingSet, BeforeValidator(_as_set, json_schema_input_type=str | TrainingSet)]


class Data(Strict):
    """Where rows come from and what may be wrong with them."""

    train: Annotated[Text | Annotated[list[Mixed], Field(min_length=1)], Field(examples=["rows.jsonl"])]
    validation: Text | Fraction | None = None
    test: Text | dict[SetName, Text] | None = None
    format: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    template: str | None = None
    allow: list[Literal["leaks", "masked", "truncated", "unknown_labels"]] = Field(default_factory=list)


class EarlyStopping(Strict):
    """Stop when the validation metric has not improved by `min_delta` for `patience` evaluations."""

    patience: Positive = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    metric: str | None = None


class Train(Strict):
    """How long and how fast. `batch_size` counts examples a step, `batch_tokens` tokens a step."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    batch_size: Positive | None = None
    batch_tokens: Positive | None = None
    micro_batch_size: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    recompute: bool | None = None
    sequence_length: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["adamw"] = "adamw"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    save_every: Positive | None = None
    evaluate_every: Positive | None = None
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Train:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other; keep one (null unsets the other)")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens exclude each other; keep one (null unsets the other)")
        return self


class Place(Strict):
    """Where the run happens; none of it changes what the run means."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Positive | None = None
    workers: Positive = 1


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[Text], BeforeValidator(_as_list, json_schema_input_type=Text | list[Text])]


class Evaluate(Strict):
    """What is measured on the test sets. `keep`: answers written to the run for each set, null for all.

    `by`: columns whose values are groups to measure too; `cluster`: the column whose equal rows have one source.
    """

    metrics: list[str] | None = None
    limit: Positive | None = None
    keep: Annotated[int, Field(ge=0)] | None = None
    base: bool = True
    max_new_tokens: Positive | None = None
    by: Names = Field(default_factory=list)
    cluster: Text | None = None

    @property
    def tags(self) -> list[str]:
        """The columns that rows to be measured must keep."""
        return list(dict.fromkeys([*self.by, *([self.cluster] if self.cluster else [])]))


class Recipe(Strict):
    """A whole run. See docs/recipes.md for every key."""

    model: Annotated[Text, Field(examples=["smollm2-135m-instruct"])]
    data: Annotated[Data, Field(examples=["{train: rows.jsonl}"])]
    objective: Annotated[Named, Field(examples=["sft"])]
    method: Annotated[Named, Field(examples=["lora"])]
    train: Train = Field(default_factory=Train)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    place: Place = Field(default_factory=Place)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    report_to: Names = Field(default_factory=list)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17
    out: Path | None = None
