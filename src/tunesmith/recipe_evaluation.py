"""The part of a recipe that says what is measured, and how answers are written and tested for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tunesmith.recipe_keys import Fraction, Heat, Names, Positive, Strict, Text, key

LEAST_OF_GROUP = 20


def _as_numbers(value: Any) -> Any:
    return [value] if isinstance(value, int | float) else value


def _once(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


Temperature = Literal[0] | Heat
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Temperatures = Annotated[list[Temperature], Field(min_length=1)]
Shares = Annotated[list[Share], Field(min_length=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
# A number alone is short for a list of it, and errors say what either must be.
TemperatureOrMore = Annotated[
    Temperatures, BeforeValidator(_as_numbers, json_schema_input_type=Temperature | Temperatures)
]
ShareOrMore = Annotated[Shares, BeforeValidator(_as_numbers, json_schema_input_type=Share | Shares)]
CountOrMore = Annotated[Counts, BeforeValidator(_as_numbers, json_schema_input_type=Count | Counts)]


class Code(Strict):
    """Answers that are programs, run behind what the rows hold, in a sandbox."""

    tests: Annotated[
        Text,
        Field(
            description="a column of Python that runs behind each answer; the answer is right where it comes to its "
            "end without an exception",
            examples=["test"],
        ),
    ]
    before: Text | None = key(None, "a column of Python that answers go on from", "prompt", "none")
    entry_point: Text | None = key(
        None, "a column that names a function, which `check` of the tests is called with", "entry_point", "none"
    )
    samples: Positive = key(1, "answers drawn for each row; 1 is the most probable one", 20)
    temperature: Heat = key(0.8, "that several answers are drawn at", 0.2)

    @property
    def columns(self) -> list[str]:
        return [column for column in (self.tests, self.before, self.entry_point) if column]


class Conformal(Strict):
    """Sets of labels that hold the right one as often as is asked for. A number alone is short for its `coverage`."""

    coverage: Annotated[Fraction, Field(description="how often the right label is in the set", examples=[0.9])]
    sets: Literal["lac", "aps"] = key(
        "lac",
        "which labels: lac, the probable ones, as few as can be; aps, the first ones, hard and easy rows alike",
        "aps",
    )


def _as_conformal(value: Any) -> Any:
    return {"coverage": value} if isinstance(value, int | float) else value


Conformity = Annotated[Conformal, BeforeValidator(_as_conformal, json_schema_input_type=Fraction | Conformal)]


class Decoding(Strict):
    """How answers are drawn: every setting of these is measured, and the best one is the model's own."""

    metric: Annotated[Text, Field(description="by which metric settings are told apart (below)", examples=["rouge_l"])]
    temperature: TemperatureOrMore = key(
        lambda: [0.0, 0.3, 0.7, 1.0], "temperatures; at 0 the most probable token is taken each time", [0, 0.5]
    )
    top_p: ShareOrMore = key(
        lambda: [1.0], "shares of the probability that is drawn from, the most probable first", [0.9]
    )
    top_k: CountOrMore = key(lambda: [0], "numbers of the most probable tokens that are drawn from; 0 is all", [0, 40])
    limit: Positive | None = key(None, "at most so many validation rows, drawn with the seed", 200, "all")


class Evaluate(Strict):
    """What is measured on the test sets, or on the validation rows where there is none."""

    metrics: list[str] | None = key(None, "metrics by name (below)", ["accuracy", "macro_f1"], "the objective's")
    limit: Positive | None = key(None, "at most so many rows of each set, drawn with the seed", 500, "all")
    keep: Annotated[int, Field(ge=0)] | None = key(
        None, "answers of each set that are written to the run's predictions", 100, "all"
    )
    base: bool = key(True, "whether the base (or what stands for it) is measured on the same rows", False)
    max_new_tokens: Positive | None = key(
        None, "the longest answer", 128, "half as long again as the longest trained answer, at most 1024"
    )
    by: Annotated[Names, AfterValidator(_once)] = key(
        list, "columns whose values are groups that are measured too", ["language"]
    )
    smallest_group: Positive | None = key(
        None, "rows that a group of `by` must have; smaller ones are named and not judged", 50, str(LEAST_OF_GROUP)
    )
    calibrate: Literal["temperature", "vector", "isotonic"] | None = key(
        None,
        "how probabilities of labels are made truer, fitted to the validation rows and saved with the model: "
        "temperature changes no answer; vector (a weight and a bias for each label) and isotonic (a step function for "
        "each) may",
        "temperature",
        "not at all",
    )
    conformal: Conformity | None = key(
        None,
        "how often the right label is to be in a set of labels that comes with each answer (split conformal); the "
        "threshold is of the validation rows, of half of them beside `calibrate`",
        0.9,
        "there are no sets",
    )
    cluster: Text | None = key(
        None, "a column whose equal values mark rows of one source, which intervals count as such", "author", "none"
    )
    decoding: Decoding | None = key(
        None,
        "which temperature, top-p and top-k do best on the validation rows; the model answers so from then on",
        {"metric": "rouge_l", "temperature": [0, 0.5, 1.0], "top_p": [0.9, 1.0]},
        "the most probable token is taken each time",
    )
    code: Code | None = key(None, "how answers that are programs are tested (`pass_at_1`)", {"tests": "test"}, "never")

    @property
    def least_of_group(self) -> int:
        return self.smallest_group or LEAST_OF_GROUP

    @property
    def groups(self) -> list[str]:
        """The columns that tell rows apart in the results."""
        return list(dict.fromkeys([*self.by, *([self.cluster] if self.cluster else [])]))

    @property
    def tags(self) -> list[str]:
        """The columns that rows to be measured must keep."""
        return list(dict.fromkeys([*self.groups, *(self.code.columns if self.code else [])]))

    @property
    def choosing_tags(self) -> list[str]:
        """The columns that validation rows must keep where they are not measured: they choose, and form no groups."""
        return [column for column in self.tags if column == self.cluster or column not in self.by]
