"""`tunesmith chat`: talk with a run's model, or with several adapters of one base, or ask them one thing."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tunesmith.cli.verb import Call, Verb, add_plugins, add_runs
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.adapters import Adapters
    from tunesmith.chatting import Chat
    from tunesmith.cli.chat_shell import Conversation, Labelling
    from tunesmith.loaded import Loaded

DRAWN = ("top_p", "top_k", "seed")  # what changes nothing at temperature 0
SAMPLING = ("temperature", *DRAWN, "max_new_tokens")


def _add(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and end; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT", help="said before the conversation; as in training if left out")
    parser.add_argument("--base", action="store_true", help="ask the base too, and show both answers")
    parser.add_argument(
        "--temperature",
        metavar="T",
        help="0 takes the most probable token each time; the run's choice, or 0, if left out",
    )
    parser.add_argument("--top-p", metavar="P", help="draw from the most probable tokens that hold this share")
    parser.add_argument("--top-k", metavar="K", help="draw from this many of the most probable tokens; 0: from all")
    parser.add_argument("--max-new-tokens", metavar="N", help="longest answer; 512, or the run's own if that is more")
    parser.add_argument("--seed", metavar="N", help="of the draws; the same turns then give the same answers")
    add_plugins(parser)


def _run(options: argparse.Namespace, call: Call) -> int:
    given = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    prompt = _prompt(options.prompt)
    from tunesmith import api
    from tunesmith.adapter_folders import by_name
    from tunesmith.adapters import load_adapters
    from tunesmith.protocols import Converses

    api.load_plugins(options.plugins)
    if prompt is None and not call.json:
        sys.stderr.write(f"loading {', '.join(options.paths)}\n")
    several = load_adapters(by_name(options.paths)) if len(options.paths) > 1 else None
    loaded = api.load(options.paths[0]) if several is None else several[several.names[0]]
    if several is not None:
        _check_kinds(several)
    if isinstance(loaded.objective, Converses):
        return _converse(loaded, several, options, given, prompt, call)
    if ("text",) not in loaded.objective.needs.asks:
        asked = " and ".join(loaded.objective.needs.asks[0])
        raise InputError(
            f"{loaded.card['objective']['name']} reads {asked} and converses with nobody",
            f"ask it with `tunesmith predict {options.paths[0]} --input FILE`",
        )
    asked_for = [
        f"--{name.replace('_', '-')}" for name in (*given, *(n for n in ("system", "base") if vars(options)[n]))
    ]
    if asked_for:
        raise InputError(
            f"{loaded.card['objective']['name']} gives labels and converses with nobody: {', '.join(asked_for)}",
            "leave it out",
        )
    return _label(loaded, several, options, prompt, call)


def _check_kinds(several: Adapters) -> None:
    from tunesmith.protocols import Converses

    converse = [name for name in several if isinstance(several[name].objective, Converses)]
    label = [name for name in several if name not in converse]
    if converse and label:
        raise InputError(f"{', '.join(converse)} converse, and {', '.join(label)} give labels", "chat with them apart")


def _prompt(given: str | None) -> str | None:
    text = sys.stdin.read().removesuffix("\n") if given == "-" else given
    if text is not None and not text.strip():
        raise InputError("--prompt is empty", "give what to ask")
    return text


def _converse(
    loaded: Loaded,
    several: Adapters | None,
    options: argparse.Namespace,
    given: dict[str, str],
    prompt: str | None,
    call: Call,
) -> int:
    from tunesmith.chatting import Chat, default_sampling
    from tunesmith.cli.chat_shell import Conversation, Shell
    from tunesmith.report.talk import talk

    sampling = default_sampling(loaded).changed(**given)
    unused = [f"--{name.replace('_', '-')}" for name in DRAWN if name in given]
    if prompt is not None and unused and not sampling.temperature:
        raise InputError(f"{', '.join(unused)}: nothing is drawn at temperature 0", "give --temperature too, as in 0.7")
    chat = Chat(loaded, options.system, sampling)
    if options.base and not chat.has_base:
        raise InputError(f"{loaded.card['method']['name']} keeps no base to ask", "leave --base out")
    if prompt is not None and call.json:
        call.print_json(_once(chat, several, prompt, options))
        return 0
    screen = talk(sys.stdout, sys.stderr, call.json)
    longer = "/set max_new_tokens" if prompt is None else "--max-new-tokens"
    conversation = Conversation(chat, screen, both=options.base, adapters=several, longer=longer)
    if prompt is not None:
        _each(several, conversation, prompt)
        return 0
    about = [
        f"{_what(loaded, several, options)}, {conversation.drawing()}",
        *([f"system message: {chat.system}"] if chat.system else []),
        "/help has the commands; Ctrl-C stops an answer, Ctrl-D ends the chat",
    ]
    return Shell(conversation, screen, call).run(about)


def _what(loaded: Loaded, several: Adapters | None, options: argparse.Namespace) -> str:
    if several is None:
        return f"{options.paths[0]}: {loaded.card['base']['name']}, {loaded.card['method']['name']}"
    return f"{loaded.card['base']['name']} with {', '.join(several)}; /use NAME switches"


def _each(several: Adapters | None, partner: Conversation | Labelling, prompt: str) -> None:
    """One question to a model, or to each adapter as if it were asked first."""
    for name in several or ("",):
        if several is not None:
            partner.turn_to(name, anew=True)
        partner.say(prompt)


def _once(chat: Chat, several: Adapters | None, prompt: str, options: argparse.Namespace) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for name in several or ("tuned",):
        if several is not None:
            chat.turn_to(several[name])
            chat.reset()
        answers[name] = asdict(chat.ask(prompt))
        if options.base and "base" not in answers:
            answers["base"] = asdict(chat.base())
    runs = {"run": options.paths[0]} if several is None else {"runs": options.paths}
    return {**runs, "system": chat.system, "prompt": prompt, "answers": answers}


def _label(
    loaded: Loaded, several: Adapters | None, options: argparse.Namespace, prompt: str | None, call: Call
) -> int:
    from tunesmith.cli.chat_shell import Labelling, Shell
    from tunesmith.report.talk import talk

    screen = talk(sys.stdout, sys.stderr, call.json)
    labelling = Labelling(loaded, screen, several)
    if prompt is not None:
        _each(several, labelling, prompt)
        return 0
    about = [
        f"{_what(loaded, several, options)}: each line gets its label",
        "/help has the commands; Ctrl-D ends",
    ]
    return Shell(labelling, screen, call).run(about)


VERB = Verb("chat", "talk with a run's model, and with its base beside it", _add, _run)
