"""The report of a run in brief, as Markdown: for a pull request, an issue, a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tunesmith.evaluation.baselines import BASELINES
from tunesmith.report import drawings, figures, verdict
from tunesmith.report.answers import Answer, Answers
from tunesmith.report.before_after import model_title
from tunesmith.report.findings import file_name
from tunesmith.report.gaps import small_line, titled_line
from tunesmith.report.page import harmless
from tunesmith.report.summary import Summary

# A star, a bracket or a backtick anywhere; an underscore, a hash or a sign of a list only where it means something.
_ACTIVE = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[#>+-]+(?=\s))")
_OPENING = re.compile(r"<(?!\s)")  # a space after it makes it no tag: p < 0.001 stays readable as text
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s)")
LONGEST = 200  # characters of a text of others
EXAMPLES = 3  # answers of each outcome


def run_markdown(summary: Summary) -> str:
    """The whole of the brief report."""
    answers = summary.answers.get(summary.verdicts[0].data)
    examples = [] if answers is None else _examples(answers)
    before = answers is not None and answers.before not in (None, *BASELINES)
    return render("run.md", {"run": summary, "plan": summary.plan, "examples": examples, "before": before})


def render(template: str, context: Mapping[str, Any]) -> str:
    """A template of Markdown; text of others goes through the filters `md`, `brief` (lines) or `code` (a code span)."""
    known = {
        "value": verdict.value,
        "difference": verdict.difference,
        "limits": verdict.limits,
        "changed_by": verdict.changed_by,
        "model_title": model_title,
        "drawings": drawings,
        "gap_line": titled_line,
        "small_line": small_line,
    }
    text = _environment().get_template(template).render({**known, "file_name": file_name, **context})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escaped(text: Any) -> str:
    """Text on one line in which no character is Markdown or HTML."""
    line = " ".join(harmless(str(text)).split())
    line = _OPENING.sub("&lt;", line.replace("&", "&amp;")).replace(">", "&gt;")
    line = _ACTIVE.sub(r"\\\1", line)
    return _NUMBERED.sub(r"\1\\\2", line)


def brief(text: Any) -> str:
    """`escaped`, of at most LONGEST characters."""
    line = " ".join(str(text).split())
    return escaped(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


def code(text: Any) -> str:
    """A code span that holds the text, whatever backticks it has."""
    line = " ".join(harmless(str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """A block of code that holds the text, whatever fences it has."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{harmless(text).rstrip()}\n{fence}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunesmith.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "md": escaped,
        "brief": brief,
        "code": code,
        "fenced": fenced,
        "num": figures.figure,
        "pct": figures.percent,
        "p": figures.p_value,
        "n": "{:,}".format,
        "rows": figures.in_rows,
        "large": figures.large,
        "duration": figures.duration,
        "memory": figures.gibibytes,
    }
    return environment


def _examples(answers: Answers) -> list[tuple[str, list[Answer]]]:
    """A few rows that tuning changed, and of those that are wrong."""
    titles = {"better": "Better", "worse": "Worse", "wrong": "Still wrong" if answers.before else "Wrong"}
    found = {kind: [a for a in answers.shown if a.outcome == kind][:EXAMPLES] for kind in titles}
    return [(titles[kind], rows) for kind, rows in found.items() if rows]
