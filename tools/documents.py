"""Writes the generated pages of docs/, or with --check says which of them are not as they would be written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import recipe_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES: Mapping[str, Callable[[], str]] = {"recipes.md": recipe_page.make}


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
