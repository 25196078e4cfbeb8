"""Results on screen: what was measured as a table, what it cannot say, and where to go from there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.report import before_after, drawings
from tunesmith.report.figures import figure, in_rows, p_value
from tunesmith.report.gaps import NO_VALUE, gap_lines
from tunesmith.report.visible import visible

if TYPE_CHECKING:
    from tunesmith.result import Result

TUNED, UNCALIBRATED = "tuned", "uncalibrated"
OF_A_CLASS = ("precision", "recall")


def show_results(result: Result, console: Console) -> None:
    """The table of a run, where its model and report are, and the next commands."""
    path, report, records, effects = result.path, result.report, result.records, result.effects
    for table in results_tables(records, effects):
        console.print(table)
    if records:
        paired = "; the difference and its p-value are paired over the same rows" if effects else ""
        console.print(Text(f"\n[low, high]: 95% intervals{paired}\n", style="dim"), soft_wrap=True)
    for line in gap_lines(result.groups):
        console.print(Text(visible(line)), soft_wrap=True)
    for model in result.decoding.get("models", {}):
        console.print(drawing_table(result.decoding, model))
        console.print(Text(f"{drawings.taken(result.decoding, model)}\n"), soft_wrap=True)
    for line in [*calibrations(records), *reasons(records, effects), *signatures(records)]:
        console.print(Text(visible(line), style="dim"), soft_wrap=True)
    for warning in weaknesses(records):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    run, model = shlex.quote(str(path)), path / "model"
    if not model.is_dir():  # a model's folder that is no run has no report
        console.print(Text(f"model:  {path}\nnext:   tunesmith compare {run} RUN"), soft_wrap=True)
        return
    for line in (
        f"model:  {model}",
        f"report: {report or 'none'}",
        f"next:   tunesmith report {run} --open           {'look at it' if report else 'why there is none'}",
        f"        tunesmith predict {run} --input FILE    answers to more rows",
        f"        tunesmith evaluate {run} --data FILE    measure it on more rows",
    ):
        console.print(Text(line), soft_wrap=True)


def reasons(records: Sequence[Mapping[str, Any]], effects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why values and differences are not there or have no interval, in a line each."""
    return [
        f"{line.metric.name} ({who}) on {_title(table.data, table.group)}: {why}"
        for table in before_after.tables(records, effects)
        for line in table.lines
        for who, why in line.reasons.items()
    ]


def signatures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """How other libraries computed metrics, a line for each."""
    return list(dict.fromkeys(f"{r['metric']}: {r['signature']}" for r in records if r.get("signature")))


def calibrations(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What scaling did to the numbers that depend on probabilities, in a line for each data set."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        if record["group"] == "all" and record["model"] in (TUNED, UNCALIBRATED):
            found.setdefault(record["data"], {}).setdefault(record["metric"], {})[record["model"]] = record["value"]
    lines: list[str] = []
    for data, metrics in found.items():
        changed = [
            f"{name} {figure(both[UNCALIBRATED])} before, {figure(both[TUNED])} after"
            for name, both in metrics.items()
            if len(both) == 2 and both[UNCALIBRATED] != both[TUNED]
        ]
        loss = metrics.get("loss", {})
        worse = len(loss) == 2 and loss[TUNED] > loss[UNCALIBRATED]
        told = "; they are no truer here: leave evaluate.calibrate out, or give more validation rows" * worse
        lines += [f"probabilities on {data} are calibrated: {'; '.join(changed)}{told}"] if changed else []
    return lines


def weaknesses(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps these numbers from being a fair judgement."""
    if not records:
        return ["nothing was measured, because there is no test set (data.test) and no validation set"]
    if {record["data"] for record in records} == {"validation"}:
        return [
            "there is no test set (data.test): these rows also chose the checkpoint, so the numbers may be too good"
        ]
    whole = {r["data"]: r for r in records if r["group"] == "all"}
    found: list[str] = []
    for data, record in whole.items():
        of = f"of {record['n']:,} rows of {visible(data)}"
        if unknown := record.get("unknown_labels"):
            found.append(
                f"{unknown:,} {of} have labels that the model does not know, so they count as wrong, and in the loss "
                "as of the smallest probability there is"
            )
        if trained := record.get("in_train"):
            found.append(
                f"{trained:,} {of} stand in the training rows too, so the numbers are too good: "
                "measure on rows that it was not trained on"
            )
        if chose := record.get("in_validation"):
            found.append(
                f"{chose:,} {of} stand in the validation rows too, so the numbers are too good: "
                "measure on rows that chose nothing"
            )
        if cut := record.get("cut"):
            found.append(f"{cut:,} {of} are longer than the model reads (train.sequence_length), and were cut")
    return found


def results_tables(records: Sequence[Mapping[str, Any]], effects: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each data set and group: the base (or the majority class), the tuned model, the difference.

    Precision and recall of each class are left to the report: 150 classes would bury the rest.
    """
    records = [record for record in records if record["metric"] not in OF_A_CLASS]
    changes = {(effect["data"], effect["metric"]): effect for effect in effects}
    places = dict.fromkeys((str(record["data"]), str(record["group"])) for record in records)
    tables: list[Table] = []
    for data, group in places:
        own = [record for record in records if (record["data"], record["group"]) == (data, group)]
        found = {metric: change for (of, metric), change in changes.items() if of == data and group == "all"}
        tables.append(_table(visible(_title(data, group)), own, found))
    return tables


def _title(data: str, group: str) -> str:
    return data if group == "all" else f"{data} / {group}{NO_VALUE * group.endswith('=')}"


def _table(title: str, records: Sequence[Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> Table:
    models = dict.fromkeys(str(record["model"]) for record in records)
    compared = next((model for model in models if model not in (TUNED, UNCALIBRATED)), None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.title, table.title_justify = Text(f"\nmeasured on {title}"), "left"
    table.add_column("metric", overflow="fold", min_width=8)
    for heading in [*([compared] if compared else []), TUNED, *(["difference", "p"] if changes else []), "n"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in dict.fromkeys(str(record["metric"]) for record in records):
        models = {str(record["model"]): record for record in records if record["metric"] == metric}
        change = changes.get(metric)
        counts = sorted({int(record["n"]) for record in models.values()})
        table.add_row(
            visible(metric),
            *([_with_limits(models.get(compared), "value")] if compared else []),
            _with_limits(models.get(TUNED), "value"),
            *([_with_limits(change, "difference", "+"), _probability(change)] if changes else []),
            " / ".join(f"{n:,}" for n in counts),
        )
    return table


def spread_table(spread: Mapping[str, Mapping[str, Any]], folds: int) -> Table:
    """How much each metric differs from fold to fold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.title, table.title_justify = Text(f"\nspread over {folds} folds"), "left"
    table.add_column("metric", overflow="fold", min_width=8)
    for heading in ("mean", "standard deviation", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, found in spread.items():
        values = found["values"]
        table.add_row(visible(metric), *(figure(v) for v in (found["mean"], found["sd"], min(values), max(values))))
    return table


def drawing_table(decoding: Mapping[str, Any], model: str) -> Table:
    """The settings by which a model's answers were drawn on validation rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    title = f"ways to draw answers, {model}: {decoding['metric']} of {in_rows(decoding['n'], 'validation ')}"
    table.title, table.title_justify = Text(f"\n{visible(title)}"), "left"
    for place, heading in enumerate(drawings.HEADINGS):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    for row in drawings.rows(decoding, model):
        table.add_row(*row)
    return table


def _with_limits(record: Mapping[str, Any] | None, key: str, sign: str = "") -> str:
    """A value over its interval, so that the table fits into 80 columns."""
    if record is None:
        return "-"
    if record.get("reason"):
        return f"{figure(record[key], sign)}\nno interval"
    low, high = (figure(record[limit], sign) for limit in ("low", "high"))
    return f"{figure(record[key], sign)}\n[{low}, {high}]"


def _probability(effect: Mapping[str, Any] | None) -> str:
    return "-" if effect is None or effect.get("reason") else p_value(effect["p"])
