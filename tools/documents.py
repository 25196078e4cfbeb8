"""Writes the generated pages of docs/, or with --check says which of them are not as they would be written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import api_page
import classifier_page
import data_page
import error_page
import metric_page
import recipe_page
from pages import filled

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _with(name: str, parts: Mapping[str, Callable[[], str]]) -> Callable[[], str]:
    """A page written by hand whose made parts are written anew."""
    return lambda: filled((DOCS / name).read_text(encoding="utf-8"), parts)


PAGES: Mapping[str, Callable[[], str]] = {
    "recipes.md": recipe_page.make,
    "errors.md": error_page.make,
    "metrics.md": metric_page.make,
    "data.md": _with("data.md", data_page.PARTS),
    "classifiers.md": _with("classifiers.md", classifier_page.PARTS),
    "api.md": _with("api.md", api_page.PARTS),
}


def main(arguments: list[str]) -> int:
    """The exit code: 1 where --check finds a stale page."""
    found = 0
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in arguments:
            sys.stderr.write(f"docs/{name} is stale: run `make docs`\n")
            found = 1
        else:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote docs/{name}\n")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
