"""The shell of a page: one file that needs no network, in which no text of others can do anything.

How to make a page:

1. Write its body as `templates/NAME.html`: a `<header class="top">`, then `<section id="x" data-title="X">` ones,
   from which the shell makes the navigation. `{% import "parts.html" as parts %}` has the parts that pages share:
   `pill`, `stats`, `interval`, `axis`, `more`; page.css says beside each class what it is for.
2. `render("NAME", title=..., context={...}, data={...}, styles=["NAME.css"], scripts=["NAME.js"])` gives the file.
   `data` is what scripts read: `page.data` in JavaScript. page.js gives every page the switch for light and dark,
   tables that sort by a click on a heading (`<table class="sorts">`), hints on anything with `data-hint`, and copying.

Everything that a template prints is escaped, and characters that could hide or turn text are written out
(`harmless`). The content security policy lets only the scripts run whose hash it names, and nothing be fetched:
even a hole in the escaping would not run a line. Numbers go through the filters `num`, `pct`,
`p` (values), `n` (counts), `rows`, `plain` (values of a recipe), `large`, `duration` and `memory`,
and sentences that hold a p-value through `told`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tunesmith.report import figures

# Control characters and those that change the direction of text: shown by their code, as they show nothing else.
_HIDDEN = [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_WRITTEN = {code: ascii(chr(code))[1:-1] for code in _HIDDEN if chr(code) not in "\t\n"}
_P_TOLD = re.compile(r"\bp (?:=|&lt;) \d[\d.e-]*(?<!\.)")
_SECTION = re.compile(r'<section id="([\w-]+)" data-title="([^"]*)"')


def render(
    name: str,
    *,
    title: str,
    context: Mapping[str, Any],
    data: Any = None,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> str:
    """The page whose body is `templates/<name>.html`, as one HTML file."""
    environment = _environment()
    body = environment.get_template(f"{name}.html").render(context)
    script = "\n".join(_file(file) for file in ("page.js", *scripts))
    head = _file("theme.js")
    return environment.get_template("page.html").render(
        title=title,
        body=Markup(body),
        sections=[(at, Markup(heading)) for at, heading in _SECTION.findall(body)],
        style=Markup("".join(_file(file) for file in ("page.css", *styles))),
        head=Markup(head),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {_allowed(head)} {_allowed(script)}",
        data=embedded(data),
    )


def embedded(data: Any) -> Markup:
    """JSON that can stand in a script element, whatever its strings hold."""
    text = json.dumps(harmless_all(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text.encode("utf-8", "backslashreplace").decode())


def harmless(text: str) -> str:
    """The text with characters that cannot be seen, or that turn what stands beside them, written out."""
    return text.translate(_WRITTEN).encode("utf-8", "backslashreplace").decode()


def harmless_all(value: Any) -> Any:
    """`harmless` for every string of a JSON value."""
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, Mapping):
        return {harmless(str(key)): harmless_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [harmless_all(inner) for inner in value]
    return value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunesmith.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "num": _typeset(figures.figure),
        "pct": _typeset(figures.percent),
        "p": figures.p_value,
        "told": _told,
        "n": "{:,}".format,
        "rows": figures.in_rows,
        "plain": figures.plain,
        "large": figures.large,
        "duration": figures.duration,
        "memory": figures.gibibytes,
    }
    return environment


def _finalize(value: Any) -> Any:
    """What a template prints of anything; what is markup already has been through here."""
    return value if isinstance(value, Markup) else harmless(str(value))


def _typeset(write: Callable[[Any, str], str]) -> Callable[..., str]:
    """A number with a minus that is as wide as a plus."""

    def typeset(value: Any, sign: str = "") -> str:
        return write(value, sign).replace("-", "\N{MINUS SIGN}")

    return typeset


def _told(sentence: str) -> Markup:
    """A sentence whose p-value no end of a line tears apart."""
    return Markup(_P_TOLD.sub(r'<span class="whole">\g<0></span>', str(escape(harmless(sentence)))))


@cache
def _file(name: str) -> str:
    return files("tunesmith.report").joinpath("templates", name).read_text(encoding="utf-8")


def _allowed(script: str) -> str:
    """The source expression that lets this very script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
