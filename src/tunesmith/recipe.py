"""The typed recipe: what the user asks for, and nothing else. Defaults that depend on facts are None here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.recipe_evaluation import Evaluate
from tunesmith.recipe_keys import (
    Above0,
    Fraction,
    Named,
    Names,
    Positive,
    SetName,
    Strict,
    Text,
    Weight,
    key,
)


class TrainingSet(Strict):
    """One of several sets that are mixed. A path alone is short for a set of that path."""

    path: Annotated[Text, Field(description="as `data.train`", examples=["tickets.jsonl"])]
    weight: Weight = key(1.0, "how often each row is seen in an epoch: 2 is twice, 0.5 in every other epoch", 2)
    limit: Positive | None = key(None, "at most so many of its rows, drawn with the seed", 1000, "all")
    format: str | None = key(None, "as `data.format`, for this set alone", "sharegpt", "that of `data`")
    columns: dict[str, str] = key(dict, "as `data.columns`, for this set alone", {"text": "body"}, "those of `data`")


def _as_set(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Mixed = Annotated[TrainingSet, BeforeValidator(_as_set, json_schema_input_type=str | TrainingSet)]


class CorpusFile(Strict):
    """Passages that are searched. A path alone is short for a corpus of that path."""

    path: Annotated[Text, Field(description="as `data.corpus`", examples=["passages.jsonl"])]
    columns: dict[str, str] = key(
        dict, "what your file calls the columns `id` and `text` of a passage", {"id": "doc_id"}, "as named"
    )


Searched = Annotated[CorpusFile, BeforeValidator(_as_set, json_schema_input_type=str | CorpusFile)]


class Fold(Strict):
    """One of several equal parts of the training rows, which judges the result in place of teaching it."""

    number: Annotated[int, Field(ge=0)] = key(
        1, "which part, from 1; 0 is none: all rows teach, and runs of the parts judge the recipe", 2
    )
    of: Annotated[int, Field(ge=2)] = key(5, "how many parts there are", 10)
    by: Text | None = key(None, "a column whose equal values stay in one part", "patient", "rows of one text do")


ALLOWED: Mapping[str, str] = {
    "leaks": "rows of train that stand in a test set are dropped",
    "masked": "rows of train with nothing to learn are dropped",
    "truncated": "rows of train learn answers that are cut",
    "unknown_labels": "held-out rows may have labels that train lacks, which are then never right",
}


class Data(Strict):
    """Where rows come from, and what may be wrong with them. docs/data.md shows every format."""

    train: Annotated[
        Text | Annotated[list[Mixed], Field(min_length=1)],
        Field(
            description="a file, a folder, or a data set's hub id; or a list of sets that are mixed",
            examples=["tickets.jsonl"],
        ),
    ]
    validation: Text | Fraction | None = key(
        None, "rows that choose the best checkpoint: a path, or a fraction drawn from train", 0.1, "there are none"
    )
    test: Text | dict[SetName, Text] | None = key(
        None, "rows that judge the result: a path, or several by name", "tickets-test.jsonl", "there are none"
    )
    fold: Fold | None = key(
        None,
        "a part of train that is a test set in its place, named `fold`: what `tunesmith crossval` sets",
        {"number": 1, "of": 5},
        "train is whole",
    )
    corpus: Searched | None = key(
        None,
        "passages that queries are searched for in, of `text` and, where rows name them, `id`: a file or folder",
        "passages.jsonl",
        "there is none: the passages of the rows",
    )
    format: str | None = key(None, "the format of all rows, by its name in docs/data.md", "alpaca", "detected")
    columns: dict[str, str] = key(
        dict, "what a format calls a column -> what your files call it", {"text": "body", "label": "queue"}, "as named"
    )
    template: str | None = key(
        None,
        "a chat template in place of the model's own: a jinja file, or the template itself",
        "chat.jinja",
        "its own",
    )
    allow: list[Literal["leaks", "masked", "truncated", "unknown_labels"]] = key(
        list,
        "what would stop the run and is accepted. " + ". ".join(f"{word}: {done}" for word, done in ALLOWED.items()),
        ["leaks"],
    )

    @property
    def judged_by_folds(self) -> bool:
        """Whether other runs, of the parts of train, judge this one in place of test rows."""
        return self.fold is not None and self.fold.number == 0


class EarlyStopping(Strict):
    """Ends training when validation no longer improves. `{}` takes every default."""

    patience: Positive = key(3, "evaluations without an improvement after which training ends", 2)
    min_delta: Annotated[float, Field(ge=0)] = key(0.0, "how much better counts as an improvement", 0.001)
    metric: str | None = key(None, "what is watched, and what chooses the best checkpoint", "macro_f1", "`loss`")


BY_LENGTH = "length"


class Curriculum(Strict):
    """Training rows from easy to hard, in the first epochs."""

    by: Text = key(
        BY_LENGTH, "what orders them: `length`, which is in tokens, or the name of a column of numbers", "grade"
    )
    descending: bool = key(False, "the highest first", True)
    epochs: Positive = key(1, "so many epochs are in that order, and those behind them in a random one", 3)


BY_LABEL = "label"


class Balance(Strict):
    """Rows of rare classes seen more often, those of frequent ones less. A column alone is short for `by` it."""

    by: Text = key(BY_LABEL, "what the classes are: `label`, or the name of a column", "language")
    strength: Annotated[float, Field(gt=0, le=1)] = key(
        1.0, "1: all classes come equally often; 0.5: as often as the square roots of their numbers of rows", 0.5
    )


def _as_balance(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


Balanced = Annotated[Balance, BeforeValidator(_as_balance, json_schema_input_type=str | Balance)]


class Train(Strict):
    """How long and how fast."""

    epochs: Above0 | None = key(
        None, "passes over the training rows; not beside `max_steps`", 2.5, "3, or 20 where the base is run only once"
    )
    max_steps: Positive | None = key(None, "optimizer steps in place of epochs", 500, "as many as `epochs` takes")
    batch_size: Positive | None = key(
        None,
        "examples of an optimizer step; not beside `batch_tokens`",
        32,
        "16, or 64 where the base is run only once",
    )
    batch_tokens: Positive | None = key(
        None, "tokens of an optimizer step in place of examples, context counted", 8192, "`batch_size` counts"
    )
    micro_batch_size: Positive | None = key(
        None, "examples that go through the model at once; changes no result", 4, "what fits into free memory"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = key(
        None, "rate of dropout, in the adapter or head and in the base's own layers", 0.1, "0"
    )
    recompute: bool | None = key(
        None, "compute activations twice to save memory; changes no result", False, "only where memory forces it"
    )
    sequence_length: Positive | None = key(
        None, "tokens after which an example is cut", 1024, "the model's context, at most 2048"
    )
    learning_rate: Above0 | None = key(None, "the highest learning rate", 2e-4, "the method's")
    head_learning_rate: Above0 | None = key(
        None, "that of heads that begin anew above a base which trains too", 3e-3, "train.learning_rate"
    )
    schedule: Literal["linear", "cosine", "constant"] = key(
        "linear", "how the learning rate falls after the warm-up", "cosine"
    )
    warmup: Annotated[float, Field(ge=0)] = key(
        0.03, "over which the learning rate rises: below 1 a share of the run, else steps", 100
    )
    weight_decay: Annotated[float, Field(ge=0)] = key(0.0, "decoupled weight decay of AdamW", 0.01)
    optimizer: Literal["adamw", "adamw_8bit"] = key(
        "adamw",
        "what takes the steps; adamw_8bit holds moments in 8 bits, and where precision is bf16 or fp8 the base's own "
        "weights in bf16 if they train: 6 bytes a parameter, its gradient included, in place of 16",
        "adamw_8bit",
    )
    clip: Above0 | None = key(1.0, "the largest norm of a step's gradient; null for no limit", 0.5)
    save_every: Positive | None = key(None, "steps between two checkpoints", 100, "a tenth of the run")
    evaluate_every: Positive | None = key(
        None, "steps between two measurements of the validation rows", 50, "a fifth of the run"
    )
    balance: Balanced | None = key(
        None,
        "how often rows of each class come; an epoch has as many rows as without it",
        "label",
        "each row once in an epoch",
    )
    curriculum: Curriculum | None = key(
        None, "an order of the training rows in place of a random one", {"by": "length"}, "a random one in every epoch"
    )
    early_stopping: EarlyStopping | None = key(None, "when to end before the last step", {"patience": 2}, "never")

    @model_validator(mode="after")
    def _one_of_two(self) -> Train:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other; keep one (null unsets the other)")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens exclude each other; keep one (null unsets the other)")
        return self


class Place(Strict):
    """Where the run happens; none of it changes what the run means."""

    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "auto takes the fastest that is there", "cpu")
    threads: Positive | None = key(None, "threads of the CPU", 4, "the cores that the process may use")
    workers: Positive = key(1, "processes that tokenise and prepare batches", 4)
    compile: bool | None = key(
        None, "torch compiles the layers that no kernel of ours serves; about a minute, on CUDA", True, "where it pays"
    )


class Recipe(Strict):
    """A whole run. Relative paths start at the recipe's folder."""

    model: Annotated[
        Text,
        Field(
            description="the base: a name of `tunesmith models`, a hub id, a folder, a .gguf file; or an earlier run's "
            "folder, to go on from its result",
            examples=["smollm2-135m-instruct"],
        ),
    ]
    data: Annotated[Data, Field(description="the rows", examples=[{"train": "tickets.jsonl"}])]
    objective: Annotated[
        Named, Field(description="what is learned: a name, or a name with its options (below)", examples=["sft"])
    ]
    method: Annotated[
        Named,
        Field(
            description="which parameters train: a name, or a name with its options (below)",
            examples=["lora", {"name": "lora", "rank": 16}],
        ),
    ]
    adapters: Names = key(
        list,
        "adapters of earlier runs, or exported ones, that stay in use and frozen beneath a fresh one that trains; "
        "from the base up",
        ["runs/first"],
    )
    teacher: Text | None = key(
        None,
        "for objectives that learn from another model: its run or folder, or what `model` may name",
        "runs/large",
        "there is none",
    )
    train: Train = key(Train, "how long and how fast", {"epochs": 3, "learning_rate": 2e-4})
    precision: Literal["auto", "fp32", "bf16", "fp8", "int4"] = key(
        "auto",
        "numbers that the base is held and computes in; auto takes what is fastest here, by a probe; int4 holds the "
        "base's linear layers in 4 bits (NF4) and computes in bf16; fp8 multiplies in 8 bits (e4m3), frozen weights "
        "beside low-rank updates or, of method full, weights that train",
        "bf16",
    )
    place: Place = key(Place, "where it runs", {"device": "cpu", "threads": 4})
    evaluate: Evaluate = key(Evaluate, "what is measured", {"metrics": ["exact_match"]})
    report_to: Names = key(list, "trackers that are sent the run's numbers (docs/tracking.md)", ["tensorboard"])
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(17, "of every draw: order, fresh weights, dropout, samples", 3)
    out: Path | None = key(None, "the run's folder", "runs/tickets", "in runs/, named as the recipe file")

    @property
    def training_tags(self) -> list[str]:
        """The columns that training rows must keep."""
        order, classes = self.train.curriculum, self.train.balance
        named = [
            self.objective.options.get("weight_column"),
            order.by if order and order.by != BY_LENGTH else None,
            classes.by if classes and classes.by != BY_LABEL else None,
            self.data.fold.by if self.data.fold else None,
        ]
        return [column for column in named if column]
