"""The rows of results.py: what each task is and has to beat, and docs/results.md from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.answers import Answered

LEVEL = 0.01  # below which the paired p-value must be
FOLDS = "five folds"  # rows that were each answered by a model trained without their source


@dataclass(frozen=True, slots=True)
class Task:
    """A row. `metrics`: the first decides, the others are told beside it.

    `rival`: what the tuned model has to beat, in words. `falls_by`: the least share by which the first metric must
    fall. `source`: which rows come from one source, where no column of the recipe says so; `sources` calls them.
    `note`: what must be known to read the row.
    """

    name: str
    title: str
    recipe: str
    model: str
    rival: str
    metrics: tuple[str, ...]
    falls_by: float = 0.0
    source: Callable[[Answered], str] | None = None
    sources: str = "sources"
    note: str = ""


def _article(row: Answered) -> str:
    """xq-21-0 is a paragraph of the article 21."""
    return str(row.reference).split("-")[1]


_ROWS = (
    Task(
        "goemotions",
        "emotions of a text, none to several of 28 (GoEmotions)",
        "goemotions.yaml",
        "all-minilm-l6-v2",
        "TF-IDF + logistic regression, one label against the rest",
        ("micro_f1", "macro_f1"),
        note="The threshold from which on a label is given was chosen on the validation rows, for both models.",
    ),
    Task(
        "vader_rating",
        "sentiment of a tweet from -4 to 4 (VADER)",
        "vader_rating.yaml",
        "all-minilm-l6-v2",
        "TF-IDF + ridge regression",
        ("pearson", "mae"),
    ),
    Task(
        "vader_label",
        "sentiment of a tweet in three classes (VADER)",
        "vader_label.yaml",
        "all-minilm-l6-v2",
        "TF-IDF + logistic regression",
        ("accuracy", "macro_f1"),
    ),
    Task(
        "wnut17",
        "named entities in social media (WNUT 2017)",
        "wnut17.yaml",
        "all-minilm-l6-v2",
        "the tag that each word has most often in training",
        ("entity_f1",),
        note="Posts of one thread or of one author may be among the rows; the data do not say which. The rate was "
        "lowered once, after a run at 4e-4 in bf16 whose loss never fell below that of finding nothing.",
    ),
    Task(
        "xquad",
        "questions answered from a paragraph (XQuAD, English)",
        "xquad.yaml",
        "all-minilm-l6-v2",
        "the sentence that has most of the question's words",
        ("span_f1", "span_exact_match"),
        sources="articles",
        note="A base with an untrained head, which points anywhere, would be easier to beat than that sentence.",
    ),
    Task(
        "xquad_retrieval",
        "the paragraph, of 240, that answers a question (XQuAD)",
        "xquad_retrieval.yaml",
        "all-minilm-l6-v2",
        "the encoder before training",
        ("mrr", "recall_at_10"),
        source=_article,
        sources="articles",
    ),
    Task(
        "covid_pairs",
        "whether two questions ask the same (COVID-QA)",
        "covid_pairs.yaml",
        "all-minilm-l6-v2",
        "the encoder's cosine, with a threshold fitted to the training rows",
        ("accuracy",),
        sources="first questions",
    ),
    Task(
        "scitldr",
        "a paper's abstract in one sentence (SciTLDR)",
        "scitldr.yaml",
        "smollm2-135m-instruct",
        "the base, asked the same",
        ("rouge_l", "rouge_1"),
        note="An answer is measured by the nearest of the row's two to four summaries, and has 60 tokens at most.",
    ),
    Task(
        "nist_sp800_53",
        "the language of security controls (NIST SP 800-53)",
        "nist_sp800_53.yaml",
        "smollm2-135m-instruct",
        "the base",
        ("perplexity",),
        falls_by=0.3,
        sources="families of controls",
        note="Its perplexity has to fall by 30% too. Of the other texts it saw none, before or after.",
    ),
    Task(
        "distilled",
        "customers' messages as JSON (the demo), by 8 of 30 layers",
        "distilled.yaml",
        "smollm2-135m-instruct",
        "the same student, trained on the rows' answers alone",
        ("field_accuracy", "loss"),
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}


def beats(task: Task, figure: Mapping[str, Any]) -> bool:
    """Whether the first figure of the task's row shows what the task asks for."""
    (before, *_), (after, *_) = figure["before"], figure["after"]
    better = after > before if METRICS.get(task.metrics[0])([]).higher_is_better else after < before
    return (
        better
        and figure["p"] is not None
        and figure["p"] < LEVEL
        and (not task.falls_by or before - after >= task.falls_by * before)
    )


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/results.md from what was measured."""
    rows = [(task, results[name]) for name, task in TASKS.items() if name in results]
    missing = [task.name for name, task in TASKS.items() if name not in results]
    lines = [
        "# Results",
        "",
        "Every task of `examples/` on its test rows: what a tuned model reaches, and what it has to beat. Written by",
        "",
        "```",
        "python benchmarks/results.py",
        "```",
        "",
        "which trains each recipe by the command line and says how long that takes; `--only NAME` measures one row.",
        "",
        "| task | recipe | rows | measured by | to beat | tuned | difference | p | beats |",
        "|---" * 9 + "|",
        *(_row(task, row) for task, row in rows),
        "",
        "Intervals are of 95%, differences are of the same rows, and p is of the paired test that `tunesmith compare`",
        "makes ([statistics.md](statistics.md)), not adjusted for the number of tasks. A tuned model beats the other",
        f"where p is below {LEVEL}. Perplexity, loss and the mean absolute error are better where they are lower.",
        "",
        "## What each had to beat",
        "",
        *(f"- {task.name}: {task.rival}{_chosen(row)}." for task, row in rows),
        "",
        "The linear models are scikit-learn's, fitted to the rows that the tuned model learned from, without the",
        "validation rows. All that is chosen about them (n-grams of words and characters, strength and class weights,",
        "and the threshold of label sets) is what does best on the validation rows by the measure of the table",
        "([tfidf.py](../benchmarks/tfidf.py)). The test rows chose nothing, of either side.",
        "",
        "## Beside it",
        "",
        "| recipe | rows | measured by | to beat | tuned | difference | p |",
        "|---" * 7 + "|",
        *(_beside(task, figure) for task, row in rows for figure in row["figures"][1:]),
        "",
        "Where there is no interval, some class has too few rows for one.",
        "",
        "## How each was made",
        "",
        "| recipe | base | method | seconds | on | with |",
        "|---" * 6 + "|",
        *(_made(task, row) for task, row in rows),
        "",
        "Seconds are those of all optimizer steps; reading rows and measuring come to that. The machine was shared",
        "while it measured, so a free one is faster.",
        "",
        "## To be read with it",
        "",
        *(f"- {note}" for note in _notes(rows)),
        *(f"- {name}: not measured." for name in missing),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _notes(rows: Sequence[tuple[Task, Mapping[str, Any]]]) -> Iterator[str]:
    for task, row in rows:
        if not beats(task, row["figures"][0]):
            yield f"{task.name}: it does not beat what it had to."
        if count := row["figures"][0]["clusters"]:
            alone = _chance(row["figures"][0]["p of rows"])
            yield (
                f"{task.name}: its rows come from {count:,} {task.sources}, and are kept together by them; "
                f"if each stood for itself, p would be {alone}."
            )
        if row["figures"][0]["data"] == FOLDS:
            yield (
                f"{task.name}: Judged on the training and the test rows together, each answered by one of five models "
                f"that had none of its {task.sources} to learn from (`tunesmith crossval`), all by the recipe as it "
                "stands. The validation rows, by which the recipe was chosen, are not among those judged. What a model "
                f"of the training rows alone reaches on the test rows stands beside it."
            )
        if task.note:
            yield f"{task.name}: {task.note}"
        if "teacher" in row:
            yield f"{task.name}: the teacher reaches {_limits(row['teacher'])}."


def _row(task: Task, row: Mapping[str, Any]) -> str:
    figure = row["figures"][0]
    return (
        f"| {task.title} | [{task.name}](../examples/{task.recipe}) | {_rows_of(figure)} {_compared(figure)} "
        f"| {'yes' if beats(task, figure) else 'no'} |"
    )


def _beside(task: Task, figure: Mapping[str, Any]) -> str:
    of = "" if figure["data"] == "test" else f", on {figure['data']}"
    return f"| {task.name}{of} | {_rows_of(figure)} {_compared(figure)} |"


def _compared(figure: Mapping[str, Any]) -> str:
    difference, p = _limits(figure["difference"], sign="+"), _chance(figure["p"])
    return f"| {figure['metric']} | {_limits(figure['before'])} | {_limits(figure['after'])} | {difference} | {p}"


def _chance(p: float | None) -> str:
    return "none" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _rows_of(figure: Mapping[str, Any]) -> str:
    return f"{figure['n']:,}" + (f" in {figure['clusters']}" if figure["clusters"] else "")


def _limits(three: Sequence[float | None], sign: str = "") -> str:
    """A value with its limits, if the rows can carry any."""
    told = [
        f"{number:{sign}.3f}" if abs(number) < 10 else f"{number:{sign}.1f}" for number in three if number is not None
    ]
    return told[0] if len(told) < 3 else f"{told[0]} [{told[1]}, {told[2]}]"


def _chosen(row: Mapping[str, Any]) -> str:
    """What the validation rows chose of a linear model."""
    chosen = row.get("chosen", {})
    told = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in chosen.items()
        if name != "validation" and value
    ]
    return f" ({', '.join(told)}; {chosen['validation']:.3f} on the validation rows)" if chosen else ""


def _made(task: Task, row: Mapping[str, Any]) -> str:
    return (
        f"| {task.name} | {task.model} | {row['method']} | {row['seconds']:,.0f} | {row['machine']}, {row['date']} "
        f"| Python {row['python']}, {row['versions']} |"
    )
