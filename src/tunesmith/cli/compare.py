"""`tunesmith compare`: which of several runs does better, on the rows that they share."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tunesmith.cli.verb import Call, Verb, add_plugins, names, show_page
from tunesmith.errors import InputError


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folders of two or more runs, each later one told against each earlier; or of one, told against its base",
    )
    parser.add_argument(
        "--data", metavar="a,b", type=names, help="test sets by name; all that the runs share if left out"
    )
    parser.add_argument(
        "--metrics", metavar="a,b", type=names, help="metrics in place of all that both were measured by"
    )
    parser.add_argument("--base", action="store_true", help="with what each run was measured beside: its base")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write a page too, with the answers side by side")
    parser.add_argument("--open", action="store_true", help="show that page; without --out, a temporary file")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    page: Path | None = options.out
    if page is not None and page.is_dir():
        raise InputError(f"--out {page} is a folder", "give the path of a file, such as compare.html")
    if page is not None and not page.absolute().parent.is_dir():
        raise InputError(f"there is no folder {page.absolute().parent} for --out", "make it, or give another path")
    from tunesmith.comparing import compare

    found = compare(
        *options.runs,
        data=options.data,
        metrics=options.metrics,
        base=options.base,
        out=page,
        plugins=options.plugins,
    )
    if page is None and options.open:
        from tunesmith.report.comparison_page import write_page

        page = Path(tempfile.mkdtemp(prefix="tunesmith-")) / "compare.html"
        write_page(page, found)
    if call.json:
        call.print_json(found.to_json() | ({} if page is None else {"page": str(page)}))
    else:
        from tunesmith.report.comparison_view import show_comparison
        from tunesmith.report.screen import screen

        show_comparison(found, page, screen(sys.stdout))
    if options.open and page is not None:
        show_page(page)
    return 0


VERB = Verb("compare", "test runs against each other on the rows that they share", _add, _run)
