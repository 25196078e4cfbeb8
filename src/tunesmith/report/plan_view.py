"""The plan on screen: what will be trained on what, at which cost, and every value that nobody chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.report.figures import duration, gibibytes, large
from tunesmith.report.findings import doubtful_labels
from tunesmith.report.visible import shortened, visible
from tunesmith.settings import recomputed

if TYPE_CHECKING:
    from tunesmith.planning import Plan

BAR = 40  # columns of the longest bar
PIECE = 700  # characters of an example's stretch that are shown
LABELS = 8
TRAINED = "bold green"
Audit = Mapping[str, Any]
Line = tuple[str, str]


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the plan; on a terminal trained tokens are green, in plain text they stand in ⟦ ⟧."""
    marked = console.color_system is None
    parts: list[RenderableType] = [
        _heading("base"),
        _lines(_base(plan)),
        _heading("data"),
        _splits(plan.audit),
        _lines(_findings(plan.audit)),
        _heading("tokens of a training example"),
        _lengths(plan.audit["lengths"]),
        _heading(_title_of_example(plan)),
        _example(plan.shown, marked),
        _heading("training"),
        _lines(_training(plan)),
        _heading("values that the recipe leaves open"),
        _defaults(plan),
    ]
    for part in parts:
        console.print(part)
    for what, texts in (("instead", plan.substitutions), ("warning", plan.warnings)):
        for text in texts:
            console.print(Text(f"\n{what}: {visible(text)}", style="yellow"))
    console.print(Text(f"\nplan {plan.hash}"), soft_wrap=True)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _lines(lines: Sequence[Line]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(f"  {name}", Text(visible(text)))
    return table


def _base(plan: Plan) -> list[Line]:
    base = plan.base
    context = f", sees {base['context_length']:,} tokens" if base["context_length"] else ""
    under = [f"{one['name']} ({one['method']}, {one['sha256'][:8]}…)" for one in plan.beneath]
    return [
        ("name", str(base["name"])),
        ("kind", f"{base['kind']} ({base['model_type']}), {large(base['parameters'])} parameters{context}"),
        ("licence", base["licence"] or "unknown: see what its source says before you share what you train"),
        ("source", str(base["source"])),
        ("sha256", f"{base['sha256'][:16]}…"),
        *([("teacher", f"{plan.teacher['name']} ({plan.teacher['sha256'][:8]}…)")] if plan.teacher else []),
        *([("adapters", f"in use and frozen, from the base up: {', '.join(under)}")] if under else []),
    ]


def _splits(audit: Audit) -> Table:
    """Rows and tokens of every split, and how many rows were cut or teach nothing."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("  split", overflow="fold")
    for heading in ("rows", "used", "tokens", "trained", "cut", "answer cut", "masked", "empty"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, split in _by_name(audit).items():
        keys = ("rows", "examples", "tokens", "trained", "truncated", "truncated_answers", "masked", "empty")
        table.add_row(f"  {visible(name)}", *(large(split[key]) for key in keys))
    return table


def _by_name(audit: Audit) -> dict[str, Any]:
    held = {"validation": audit["validation"]} if audit["validation"] else {}
    return {"train": audit["train"], **held, **audit["tests"]}


def _findings(audit: Audit) -> list[Line]:
    found: list[Line] = [("", "")]
    for name, split in _by_name(audit).items():
        files = split["files"]
        named = ", ".join(str(file["name"]) for file in files[:3]) + (", …" if len(files) > 3 else "")
        found.append((name, f"{' + '.join(dict.fromkeys(split['formats']))} from {named}"))
    labels = audit["train"]["labels"]
    if labels:
        most = sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))
        listed = ", ".join(f"{shortened(label, 30)} {count:,}" for label, count in most[:LABELS])
        more = f", and {len(most) - LABELS} more" if len(most) > LABELS else ""
        found.append(("labels", f"{len(most)}: {listed}{more}"))
    found.append(("duplicates", f"{audit['duplicates']:,} rows of train repeat an earlier one; they are kept"))
    found += [("doubtful", text) for text in doubtful_labels(audit)]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in audit["dropped"].items())
    found.append(("dropped", f"{dropped}; of train"))
    overlaps = {"validation": audit["shared_with_validation"], **audit["shared_with_tests"]}
    found += [("shared", _overlap(name, overlap)) for name, overlap in overlaps.items() if overlap]
    for name, missing in audit["unknown_labels"].items():
        listed = ", ".join(f"{shortened(label, 30)} {count:,}" for label, count in list(missing.items())[:LABELS])
        found.append(("unknown", f"labels of {name} that train lacks: {listed}"))
    return found


def _overlap(name: str, overlap: Mapping[str, Any]) -> str:
    places = "; ".join(f"{there} = {here}" for there, here in overlap["places"][:3])
    text = f"{overlap['rows']:,} of {overlap['of']:,} rows of {name} stand in train too"
    return f"{text}, which gives up {overlap['train_rows']:,}: {places}" if overlap["rows"] else text


def _lengths(histogram: Mapping[str, Sequence[int]]) -> Table:
    edges, counts = histogram["edges"], histogram["counts"]
    bins = list(zip(edges, edges[1:], counts, strict=False))
    filled = [index for index, count in enumerate(counts) if count]
    table = Table.grid(padding=(0, 1, 0, 0))
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    most = max(counts, default=0)
    for low, high, count in bins[filled[0] : filled[-1] + 1] if filled else []:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        table.add_row(f"  {low:,} to {high - 1:,}", f"{count:,}", Text(bar, style="cyan"))
    return table


def _title_of_example(plan: Plan) -> str:
    if any(trains for _, trains in plan.shown):
        return "an example of median length; what is trained is marked"
    return "an example of median length, as the model reads it"


def _example(shown: Sequence[tuple[str, bool]], marked: bool) -> Text:
    found = Text()
    for text, trains in shown:
        piece = visible(text, "\n\t")
        if len(piece) > PIECE:
            left_out = len(piece) - PIECE
            piece = f"{piece[: PIECE // 2]} … {left_out:,} characters … {piece[-PIECE // 2 :]}"
        if trains:
            found.append(f"⟦{piece}⟧" if marked else piece, style=TRAINED)
        else:
            found.append(piece)
    found.rstrip()
    indented = Text("\n").join(Text("  ").append_text(line) for line in found.split("\n", allow_blank=True))
    return indented


def _training(plan: Plan) -> list[Line]:
    training, placement, cost = plan.training, plan.placement, plan.prediction
    trainable, total = plan.parameters["trainable"], plan.parameters["total"]
    step = f"{training.batch_size} examples" if training.batch_size else f"{training.batch_tokens:,} tokens"
    length = f"{training.epochs:g} epoch{'s' * (training.epochs != 1)}, " if training.epochs else ""
    micro = (
        f"{placement.micro_batch_size} examples"
        if placement.micro_batch_size
        else f"up to {placement.micro_batch_tokens:,} tokens"
    )
    layout = "laid end to end, no padding" if placement.packed else "one padded row for each example"
    return [
        ("parameters", f"{trainable:,} of {total:,} train ({trainable / total:.2%})"),
        ("steps", f"{training.total_steps:,} ({length}{step} a step)"),
        ("time", f"about {duration(cost.seconds)} of training over {large(cost.tokens)} tokens"),
        ("memory", f"about {gibibytes(cost.peak_memory_bytes)}; {gibibytes(cost.free_memory_bytes)} are free"),
        (
            "device",
            f"{placement.device}, {placement.precision}, {placement.threads} thread{'s' * (placement.threads > 1)}"
            + (", layers compiled" if placement.compiled else ""),
        ),
        ("micro-batch", f"{micro}, {layout}" + (f", {again} run again" if (again := recomputed(placement)) else "")),
        ("resume", _resume(plan.resume)),
        ("metrics", ", ".join(plan.metrics)),
        *([("tracked by", ", ".join(plan.trackers))] if plan.trackers else []),
    ]


def _resume(guarantee: str) -> str:
    return {
        "exact": "exact: a stopped run ends in the same bits",
        "same data": "same data: a stopped run sees the same rows in the same order; the last bits may differ",
    }.get(guarantee, guarantee)


def _defaults(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(overflow="fold")
    for default in plan.defaults:
        value = f"{default.value:g}" if isinstance(default.value, float) else str(default.value)
        table.add_row(f"  {default.key}", Text(visible(value)), Text(visible(default.why), style="dim"))
    return table
