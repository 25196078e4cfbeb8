"""What the error bars are worth: how often 95% intervals hold the true value, how often tests find what is or is not.

    python benchmarks/error_bars.py [--samples 2000] [--processes N]
    python benchmarks/error_bars.py --metrics METRIC [...]    only theirs and the family's again; the file says so
    python benchmarks/error_bars.py --only POPULATION [...] --rows N --samples 8000    coverage alone, only printed

Draws samples of 50, 200 and 1,000 rows from populations whose true values are known (populations.py) and gives them
to the intervals and tests that `evaluate` and `compare` use. Writes benchmarks/results/error_bars.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cpu_sft import processor
from numpy.typing import NDArray
from populations import FAMILY, FIVE_WAY, POPULATIONS, Population, table

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.intervals import interval
from tunesmith.evaluation.metrics import statistics
from tunesmith.evaluation.paired import holm, side_by_side
from tunesmith.types import Prediction

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (50, 200, 1000)
LEVEL = 0.05
FEW = 0.1  # of samples that get an interval: too few, and too unlike the rest, to judge its coverage by
RESAMPLES = 2000
SWAPS = 1000  # the verb takes 10,000, which moves a p-value near 5% by less than a point
PILOT = 200_000  # rows from which the number of rows is told that a difference takes
CHUNK = 50  # samples that are resampled alike, as the models of a run are


class Job(NamedTuple):
    """Samples of one size from one population (by its place; None: the family). `what` is the figure that they give."""

    what: str
    place: int | None
    count: int
    samples: int
    number: int


Counted = tuple[int, int]  # of how many


def coverage(population: Population, job: Job, rng: np.random.Generator) -> dict[str, Counted]:
    """Of the intervals given, how many hold the first model's true value, and how many the models' true difference."""
    truth, gap = population.values
    clusters_N = population.clusters(job.count)
    value_held = value_given = gap_held = gap_given = 0
    for _ in range(job.samples):
        before, after = population.draw(job.count, population.gain, rng)
        _, low, high = interval(population.metric, before, job.number, resamples=RESAMPLES, clusters_N=clusters_N)
        value_given += not math.isnan(low)
        value_held += low <= truth <= high
        pairing = side_by_side(population.metric, before, after, clusters_N)
        low, high = pairing.limits(job.number, RESAMPLES)
        gap_given += pairing.reason is None
        gap_held += pairing.reason is None and min(low, pairing.difference) <= gap <= max(high, pairing.difference)
    return {
        "value": (value_held, value_given),
        "difference": (gap_held, gap_given),
    }


def found(population: Population, job: Job, rng: np.random.Generator, gain: float) -> int:
    """How many pairs of models are told apart."""
    clusters_N = population.clusters(job.count)
    return sum(
        side_by_side(population.metric, *population.draw(job.count, gain, rng), clusters_N).p(seed, SWAPS) <= LEVEL
        for seed in range(job.samples)
    )


def false_alarms(population: Population, job: Job, rng: np.random.Generator) -> dict[str, Counted]:
    return {"false alarms": (found(population, job, rng, 0.0), job.samples)}


def power(population: Population, job: Job, rng: np.random.Generator) -> dict[str, Counted]:
    return {"power": (found(population, job, rng, population.gain), job.samples)}


def family(job: Job, rng: np.random.Generator) -> dict[str, Counted]:
    """How many pairs of equal models are told apart by any metric of the family, after Holm's correction."""
    alarms = 0
    for seed in range(job.samples):
        actual_N, *shares = FIVE_WAY.draw(job.count, 0.0, rng)
        pairs = [side_by_side(m, *(table(m, actual_N, shares_NL) for shares_NL in shares)) for m in FAMILY]
        alarms += min(holm([pair.p(seed, SWAPS) for pair in pairs if pair.reason is None])) <= LEVEL
    return {"family": (alarms, job.samples)}


FIGURES = {"coverage": coverage, "false alarms": false_alarms, "power": power}


def carried_out(job: Job) -> tuple[Job, dict[str, Counted]]:
    place = len(POPULATIONS) if job.place is None else job.place
    rng = np.random.default_rng([place, job.count, job.number, *job.what.encode()])
    if job.place is None:
        return job, family(job, rng)
    return job, FIGURES[job.what](POPULATIONS[job.place], job, rng)


def rows_needed(population: Population) -> int:
    """With how many rows the better model is found in 4 of 5 repetitions or more, as `compare` tells from many rows."""
    tables = population.draw(PILOT, population.gain, np.random.default_rng(2))
    units = side_by_side(population.metric, *tables, population.clusters(PILOT)).units_needed(LEVEL)
    assert units is not None
    return units * population.cluster


def jobs(samples: int, sizes: dict[int, int]) -> Iterator[Job]:
    """All, the long ones first."""
    for count, place in itertools.product(reversed(SIZES), range(len(POPULATIONS))):
        yield from chunks("coverage", place, count, samples if count < SIZES[-1] else samples // 2)
        yield from chunks("false alarms", place, count, samples)
    for place, count in sizes.items():
        yield from chunks("power", place, count, samples)
    for count in SIZES:
        yield from chunks("family", None, count, samples)


def chunks(what: str, place: int | None, count: int, samples: int) -> Iterator[Job]:
    for number, start in enumerate(range(0, samples, CHUNK)):
        yield Job(what, place, count, min(CHUNK, samples - start), number)


def check_tables() -> None:
    """The tables of populations.py, made for all rows at once, are what the metrics make of the same answers."""
    actual_N, shares_NL, _ = FIVE_WAY.draw(300, 0.0, np.random.default_rng(3))
    answers = [
        Prediction(
            "abcde"[int(shares_L.argmax())],
            "abcde"[actual],
            "row",
            {"nll": float(-np.log(shares_L[actual])), "tokens": 1.0},
            dict(zip("abcde", map(float, shares_L), strict=True)),
        )
        for actual, shares_L in zip(actual_N, shares_NL, strict=True)
    ]
    for metric in FAMILY:
        made = METRICS.get(metric.name)("abcde")
        np.testing.assert_allclose(statistics(made, answers), table(metric, actual_N, shares_NL), atol=1e-12)


Key = tuple[str, int | None, int]


def shares(todo: list[Job], processes: int) -> tuple[dict[Key, float | None], dict[Key, float]]:
    """Every figure, by population and size, as a share of the samples that give it (None: few do); and that share."""
    counts: defaultdict[Key, NDArray[np.int64]] = defaultdict(lambda: np.zeros(3, dtype=np.int64))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for done, (job, found) in enumerate(pool.imap_unordered(carried_out, todo), 1):
            for figure, (hits, given) in found.items():
                counts[figure, job.place, job.count] += np.array([hits, given, job.samples])
            if done % 100 == 0:
                print(f"{done:,} of {len(todo):,} parts", flush=True)
    given = {key: round(float(given / samples), 4) for key, (_, given, samples) in counts.items()}
    held = {key: None if given[key] < FEW else round(float(hits / of), 4) for key, (hits, of, _) in counts.items()}
    return held, given


def measured(samples: int, processes: int, before: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The figures of these metrics' populations and of the family; those of others stay as they were `before`."""
    again = [place for place, population in enumerate(POPULATIONS) if population.metric.name in metrics]
    sizes = {place: rows_needed(POPULATIONS[place]) for place in again if POPULATIONS[place].gain}
    share, given = shares([j for j in jobs(samples, sizes) if j.place is None or j.place in again], processes)

    def by_size(figure: str, place: int | None, of: Mapping[Key, float | None] = share) -> dict[str, float | None]:
        return {str(count): of[figure, place, count] for count in SIZES}

    populations = {
        population.name: before["populations"][population.name]
        if place not in again
        else {
            "metric": population.metric.name,
            "coverage of values": by_size("value", place),
            "values with an interval": by_size("value", place, given),
            "coverage of differences": by_size("difference", place),
            "differences with an interval": by_size("difference", place, given),
            "false alarms": by_size("false alarms", place),
        }
        for place, population in enumerate(POPULATIONS)
    }
    for place, count in sizes.items():
        populations[POPULATIONS[place].name] |= {
            "true difference": round(POPULATIONS[place].values[1], 4),
            "rows stated": count,
            "power at these rows": share["power", place, count],
        }
    return {"populations": populations, "false alarms of a family after Holm": by_size("family", None)}


def report(samples: int, again: Sequence[str], figures: dict[str, Any]) -> dict[str, Any]:
    """`again`: metrics that this run is of; the others' figures are of an earlier one."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("numpy", "scipy")},
        "run again": list(again),
        "samples": {"each figure": samples, f"coverage at {SIZES[-1]}": samples // 2},
        "resamples": RESAMPLES,
        "swaps": SWAPS,
        **figures,
    }


def markdown(outcome: dict[str, Any]) -> str:
    sizes = [f"{count:,}" for count in SIZES]
    head = ["population", *(f"value {n}" for n in sizes), *(f"difference {n}" for n in sizes)]
    head += [*(f"false {n}" for n in sizes), "difference to find", "rows stated", "power"]
    lines = [" | ".join(head), "|".join(["---", *["---:"] * (len(head) - 1)])]
    for name, found in outcome["populations"].items():
        cells = [
            _cell(found[key][str(n)], found[given][str(n)] if given else 1.0) for key, given in KEYS for n in SIZES
        ]
        needed = found.get("rows stated")
        cells += (
            ["", "", ""]
            if needed is None
            else [
                f"{found['true difference']:+.3f}",
                f"{needed:,}",
                f"{100 * found['power at these rows']:.1f}",
            ]
        )
        lines.append(" | ".join([name, *cells]))
    alarms = ", ".join(f"{100 * share:.1f}" for share in outcome["false alarms of a family after Holm"].values())
    machine, versions = outcome["machine"], outcome["versions"]
    told = ["All in percent."]
    if outcome["run again"]:
        told.append(f"This run was of {', '.join(outcome['run again'])} and the family; all else is of the run before.")
    return (
        f"{outcome['date']}, {machine['cores']} cores {machine['processor']}, Python {machine['python']}, "
        f"numpy {versions['numpy']}, scipy {versions['scipy']}; {outcome['samples']['each figure']:,} samples a figure "
        f"({outcome['samples'][f'coverage at {SIZES[-1]}']:,} for coverage at {SIZES[-1]:,} rows). {' '.join(told)}\n\n"
        "value, difference: 95% intervals that hold the true one; none: at least 90% of samples get no interval; in "
        "brackets how many do, where that is less than 99.5%. false: pairs of equal models told apart at 5%. "
        "power: pairs of the true difference told apart in as many rows as `compare` states.\n\n"
        + "\n".join(f"| {line} |" for line in lines)
        + f"\n\nA classifier's {len(FAMILY)} metrics after Holm's correction: any false alarm in {alarms} of pairs "
        f"at {', '.join(sizes)} rows.\n"
    )


KEYS = (
    ("coverage of values", "values with an interval"),
    ("coverage of differences", "differences with an interval"),
    ("false alarms", None),
)


def _cell(share: float | None, given: float) -> str:
    if share is None:
        return "none"
    return f"{100 * share:.1f}" + f" ({100 * given:.0f})" * (given < 0.995)


def closely(names: Sequence[str], sizes: Sequence[int], samples: int, processes: int) -> str:
    """Coverage of a few populations, a line for each figure; the kept results are not touched."""
    places = [place for place, population in enumerate(POPULATIONS) if population.name in names]
    todo = [job for place in places for count in sizes for job in chunks("coverage", place, count, samples)]
    share, given = shares(todo, processes)
    return "\n".join(
        f"{POPULATIONS[place].name}, {count:,} rows, {figure}: {_cell(held, given[figure, place, count])}"
        for (figure, place, count), held in share.items()
        if place is not None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    known = sorted({population.metric.name for population in POPULATIONS})
    parser.add_argument(
        "--metrics", nargs="+", choices=known, default=[], help="all else stays as the last run found it"
    )
    parser.add_argument("--only", nargs="+", choices=[p.name for p in POPULATIONS], metavar="POPULATION")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="with --only: sizes of a sample")
    arguments = parser.parse_args()
    check_tables()
    if arguments.only:
        print(closely(arguments.only, arguments.rows, arguments.samples, arguments.processes))
        return
    kept: dict[str, Any] = {}
    if arguments.metrics:
        kept = json.loads((RESULTS / "error_bars.json").read_text(encoding="utf-8"))
        if kept["samples"]["each figure"] != arguments.samples:
            parser.error(f"the other figures are of {kept['samples']['each figure']} samples")
    figures = measured(arguments.samples, arguments.processes, kept, arguments.metrics or known)
    outcome = report(arguments.samples, arguments.metrics, figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "error_bars.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "error_bars.md").write_text(markdown(outcome), encoding="utf-8")
    print(markdown(outcome))


if __name__ == "__main__":
    main()
