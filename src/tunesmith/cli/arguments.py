"""From words to a verb and its options; a wrong word is refused with the nearest right one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from tunesmith import __version__
from tunesmith.cli import (
    adapters,
    chat,
    combine,
    compare,
    crossval,
    demo,
    evaluate,
    export,
    methods,
    models,
    plan,
    predict,
    report,
    resume,
    schema,
    shrink,
    train,
)
from tunesmith.cli.verb import Verb
from tunesmith.errors import InputError

VERBS: dict[str, Verb] = {
    module.VERB.name: module.VERB
    for module in (
        demo,
        plan,
        train,
        crossval,
        resume,
        evaluate,
        predict,
        compare,
        chat,
        adapters,
        combine,
        report,
        export,
        shrink,
        methods,
        models,
        schema,
    )
}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see `{self.prog} --help`")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise AssertionError("every way out of argparse is taken elsewhere")


def parse(given: Sequence[str]) -> tuple[Verb, argparse.Namespace] | str:
    """The verb and its options, or a text that was asked for (help, the version)."""
    if not given or given[0] in ("-h", "--help"):
        return overview()
    if given[0] == "--version":
        return f"tunesmith {__version__}\n"
    name, rest = given[0], list(given[1:])
    verb = VERBS.get(name)
    if verb is None:
        raise _unknown(name, list(VERBS), "verb", "see `tunesmith --help`")
    parser = parser_of(verb)
    if _asks_for_help(rest):
        return parser.format_help()
    options, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]  # pyright: ignore[reportPrivateUsage]
        raise _unknown(unknown[0], flags, f"argument of `tunesmith {name}`", f"see `{parser.prog} --help`")
    return verb, options


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """The parser of one verb, with what every verb takes."""
    parser = _Parser(prog=f"tunesmith {verb.name}", description=verb.summary, allow_abbrev=False, add_help=False)
    verb.add(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout; all else goes to stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def overview() -> str:
    """The text of `tunesmith --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: tunesmith VERB ...\n\n"
        "Fine-tune a model from a recipe, and judge it with error bars.\n\n"
        f"{verbs}\n\n"
        "`tunesmith VERB --help` has its arguments. Every verb takes --json and --debug.\n"
        "Exit codes: 0 done, 2 wrong input, 3 refused for safety, 4 out of a resource, 75 stopped: resume it.\n"
    )


def _asks_for_help(words: Sequence[str]) -> bool:
    before = words[: words.index("--")] if "--" in words else words
    return "-h" in before or "--help" in before


def _unknown(word: str, known: Sequence[str], what: str, otherwise: str) -> InputError:
    near = difflib.get_close_matches(word.partition("=")[0] if word.startswith("-") else word, known, n=1)
    return InputError(f"unknown {what}: {word}", f"did you mean {near[0]}?" if near else otherwise)
