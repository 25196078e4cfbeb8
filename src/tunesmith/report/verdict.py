"""What a run comes to, in one sentence that claims no more than the test shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith import rundir
from tunesmith.evaluation.baselines import BASELINES
from tunesmith.report.before_after import Line, MetricFacts, Table, headline
from tunesmith.report.figures import figure, in_rows, p_told, percent

FEW_ROWS = 50
VALIDATION = "validation"
_THAN = {"base": "its base"} | {name: baseline.than for name, baseline in BASELINES.items()}
_PILLS = {
    "better": "Better",
    "worse": "Worse",
    "no better": "No better",
    "cannot tell": "Cannot tell",
    "": "Not compared",
}
_TONES = {"better": "better", "worse": "worse", "no better": "caution", "cannot tell": "caution", "": ""}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`standing` in a word or two with its tone, the sentence, and what limits it. `line` is what it is about.

    `held_out`: each row was answered by a model that was trained without it.
    """

    standing: str
    tone: str
    sentence: str
    caveats: tuple[str, ...] = ()
    line: Line | None = None
    data: str = ""
    held_out: bool = False


def verdicts(
    tables: Sequence[Table],
    finished: bool,
    steps: tuple[int, int],
    detectable: Mapping[tuple[str, str], float],
    crossval: bool = False,
) -> list[Verdict]:
    """One for each data set; `steps` are those done and planned.

    `detectable`: by data set and metric, the smallest difference that its rows could have shown. `crossval`: whether
    the set "folds" is of a cross-validation.
    """
    whole = [table for table in tables if table.group == "all"]
    if not finished:
        done, of = steps
        text = f"Unfinished: {done:,} of {of:,} steps are done, and nothing has been measured yet."
        return [Verdict("Unfinished", "caution", text, ("`tunesmith resume` goes on with it.",))]
    if not whole:
        text = "Not measured: there is no test set and no validation set, so nothing says whether this model is good."
        return [Verdict("Not measured", "caution", text, ("Measure it with `tunesmith evaluate RUN --data FILE`.",))]
    return [_of(table, detectable, crossval and table.data == rundir.FOLDS) for table in whole]


def _of(table: Table, detectable: Mapping[tuple[str, str], float], folds: bool) -> Verdict:
    line = headline(table.lines)
    if line is None:
        names = ", ".join(line.metric.name for line in table.lines)
        text = f"Not judged: what is good is not known of {names}, which a plugin defines."
        return Verdict("Not judged", "caution", text, ("Give its file with --plugin.",), data=table.data)
    chose = line.after["n"] if table.data == VALIDATION else line.after.get("in_validation") or 0
    trained_on = line.after.get("in_train") or 0
    few = "only " * (line.after["n"] < FEW_ROWS)
    plural = "s" * (line.after["n"] != 1)
    named = f"{table.data} row{plural}" if table.data in ("test", VALIDATION) else f"row{plural} of {table.data}"
    if folds:
        named = f"row{plural}, each answered by a model that was trained without it"
    rows = f"{few}{line.after['n']:,} {named}"
    caveats = _caveats(table, line, detectable.get((table.data, line.metric.name)))
    if trained_on:
        rows += f", {trained_on:,} of which it was trained on"
    if chose:
        rows += ", which" if chose == line.after["n"] else f", {chose:,} of which"
        rows += " also chose the checkpoint"
    standing = line.standing
    where = " on validation rows" * bool(chose) or " on rows it was trained on" * bool(trained_on)
    pill = "Not tested" if line.is_untested else _PILLS[standing] + where * (standing == "better")
    tone = "caution" if (chose or trained_on) and standing == "better" else _TONES[standing]
    said = _compared(line, rows) if standing else _alone(line, rows)
    return Verdict(pill, tone, said, caveats, line, table.data, folds)


def _compared(line: Line, rows: str) -> str:
    assert line.before is not None
    assert line.effect is not None
    metric, standing = line.metric, line.standing
    before, after = line.before["value"], line.after["value"]
    word = "rose" if after > before else "fell" if after < before else "stayed"
    if standing == "cannot tell":
        return (
            f"Cannot tell: {metric.title} is {value(metric, after)} against {value(metric, before)} on {rows}, "
            f"and these do not carry a test ({line.effect['reason']})."
        )
    opening = f"{_PILLS[standing]} than {_THAN.get(line.before['model'], line.before['model'])}"
    if word == "stayed":
        moved = f"{metric.title} stayed at {value(metric, after)} on {rows}"
    elif standing == "no better":
        moved = f"{metric.title} is {value(metric, after)} against {value(metric, before)} on {rows}"
    else:
        moved = f"{metric.title} {word} from {value(metric, before)} to {value(metric, after)} on {rows}"
    by = f"a difference of {difference(metric, line.effect['difference'])}"
    closing = ", which chance alone could explain" if standing == "no better" else ""
    return f"{opening}: {moved}, {by} ({evidence(line)}){closing}."


def evidence(line: Line) -> str:
    """Interval and p-value of a difference."""
    effect = line.effect
    assert effect is not None
    return f"95% interval {changed_by(line.metric, effect)}, {p_told(effect['p'])}"


def _alone(line: Line, rows: str) -> str:
    if line.before is not None:
        than = _THAN.get(line.before["model"], line.before["model"])
        tuned, other = (value(line.metric, record["value"]) for record in (line.after, line.before))
        because = f": {line.why_untested}" if line.why_untested else ""
        return (
            f"Not tested: {line.metric.title} of the tuned model is {tuned}, that of {than} {other}, on {rows}; "
            f"there is no test of the difference{because}."
        )
    span = f"95% interval {limits(line.metric, line.after)}"
    if line.after.get("reason"):
        span = line.after["reason"]
    return (
        f"Not compared: {line.metric.title} of the tuned model is {value(line.metric, line.after['value'])} on {rows} "
        f"({span}), and nothing says what its base would have reached."
    )


def _caveats(table: Table, line: Line, detectable: float | None) -> tuple[str, ...]:
    found: list[str] = []
    if table.data == VALIDATION:
        found.append("There is no test set (data.test). Rows that chose the checkpoint flatter the model they chose.")
    elif chose := line.after.get("in_validation"):
        found.append(
            f"{chose:,} of these {line.after['n']:,} rows are validation rows, by which the checkpoint and all that is "
            "fitted to them were chosen, and flatter the tuned model: measure it on rows that chose nothing."
        )
    if line.after.get("in_train"):
        found.append(
            f"{line.after['in_train']:,} of these {line.after['n']:,} rows stand in the training rows too and flatter "
            "the tuned model: measure it on rows that it was not trained on."
        )
    if line.after.get("unknown_labels"):
        found.append(
            f"{line.after['unknown_labels']:,} of these {line.after['n']:,} rows have labels that the model does not "
            "know, so they count as wrong."
        )
    if line.after.get("candidates"):
        found.append(f"Each query was searched for among {line.after['candidates']:,} passages.")
    if line.after["n"] < FEW_ROWS:
        found.append(f"{in_rows(line.after['n'])} can only show large differences: more test rows would say more.")
    if line.standing == "no better" and detectable is not None:
        least = f"{100 * detectable:.1f} points"
        found.append(
            f"These rows would have shown a difference of {least} or more in at least 4 of 5 such tests (power 0.8)."
        )
    if line.before is not None and line.before["model"] in BASELINES:
        found.append(BASELINES[line.before["model"]].why)
    before = [other for other in table.lines[: table.lines.index(line)] if other.metric.higher is not None]
    passed = [other.metric.title for other in before if other.at_one_end and other.standing != "cannot tell"]
    untested = [other for other in before if other.is_untested and not other.at_one_end]
    silent = [
        f"{other.metric.title} ({other.effect['reason']})"
        for other in before
        if other.standing == "cannot tell" and other.effect
    ]
    if silent:
        found.append(f"These rows do not carry a test of {', '.join(silent)}.")
    found += [
        f"There is no test of {other.metric.title}: {other.why_untested or 'none was made'}." for other in untested
    ]
    if passed:
        found.append(f"Both models stand at the same end of {', '.join(passed)}, which cannot tell them apart.")
    return tuple(found)


def limits(metric: MetricFacts, record: Mapping[str, Any]) -> str:
    """The interval of a value: "0.8 to 0.9", or that there is none."""
    if record.get("reason"):
        return "no interval"
    return f"{value(metric, record['low'])} to {value(metric, record['high'])}"


def changed_by(metric: MetricFacts, effect: Mapping[str, Any]) -> str:
    """The interval of a difference, likewise."""
    if effect.get("reason"):
        return "no interval"
    return f"{difference(metric, effect['low'], unit=False)} to {difference(metric, effect['high'], unit=False)}"


def value(metric: MetricFacts, number: Any) -> str:
    return (percent(number) if metric.is_share else figure(number)).replace("-", "\N{MINUS SIGN}")


def difference(metric: MetricFacts, number: Any, *, unit: bool = True) -> str:
    """A difference of shares is one of percentage points."""
    if number is None:
        return "unknown"
    text = f"{100 * number:+.1f}" + " points" * unit if metric.is_share else figure(number, "+")
    return text.replace("-", "\N{MINUS SIGN}")
