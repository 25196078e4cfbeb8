"""The made parts of docs/data.md: kinds of files, formats with their samples, speakers, what `data.allow` accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pages import code, table

from tunesmith.data.conversation import SHAREGPT_ROLES
from tunesmith.data.formats import FORMATS, Format
from tunesmith.data.read import READERS, SPLIT_NAMES
from tunesmith.recipe import ALLOWED


def kinds() -> str:
    return ", ".join(map(code, READERS)) + "."


def splits() -> str:
    rows = [[code(split), ", ".join(map(code, names))] for split, names in SPLIT_NAMES.items()]
    return table(["split", "files of a folder whose names begin with (or that lie in a folder called)"], rows)


def formats() -> str:
    rows = [[code(form.name), _columns(form), form.says] for form in FORMATS.values()]
    samples = [f"{form.name}:\n\n```jsonl format={form.name}\n{form.sample}\n```" for form in FORMATS.values()]
    return "\n\n".join([table(["format", "columns", "a row is"], rows), *samples])


def _columns(form: Format) -> str:
    needed = ", ".join(map(code, form.required))
    return needed + (f"; may have {', '.join(map(code, form.optional))}" if form.optional else "")


def speakers() -> str:
    return table(["from", "is"], [[code(speaker), code(role)] for speaker, role in SHAREGPT_ROLES.items()])


def allow() -> str:
    return table(
        ["data.allow", "what is done then"],
        [[code(word), meaning] for word, meaning in ALLOWED.items()],
    )


PARTS: Mapping[str, Callable[[], str]] = {
    "kinds": kinds,
    "splits": splits,
    "formats": formats,
    "speakers": speakers,
    "allow": allow,
}
