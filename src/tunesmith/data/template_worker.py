"""The process that renders chat templates: started by `template.py`, never imported; it knows jinja2 and nothing else.

A template comes with a downloaded model, so it is a program of a stranger. Jinja's sandbox keeps it from Python's
inside but not from eating time and memory; the limits of this process do that.
"""

from __future__ import annotations

import datetime
import json
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

# A day that never changes, so that a resumed run reads the tokens it began with. It is the day that the
# templates which ask for one (the Llama 3 family) fall back on by themselves.
FIXED_NOW = datetime.datetime(2024, 7, 26)

ERROR_CHARACTERS = 500
FLUSH_SECONDS = 0.25


class PlainDict:
    """`dict(...)` without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def plain_namespace() -> type[Any]:
    """`namespace(...)` that takes no attribute starting with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """`namespace(...)` that takes no attribute starting with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                refuse_private(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            super().__setitem__(name, value)

    def refuse_private(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no attribute {name!r}")

    return PlainNamespace


def environment() -> Any:
    """jinja as transformers sets it up for chat templates, less what differs from one call to the next."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads `{% generation %}` blocks as their body; what they claim to mark is not used."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return FIXED_NOW.strftime(form)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    del env.filters["random"], env.globals["lipsum"]
    env.filters["tojson"] = tojson
    cast("dict[str, Any]", env.globals).update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=PlainDict(), namespace=plain_namespace()
    )
    return env


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty keys, its reasoning under every name that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


class Limits:
    """What one rendering may use. The clock and the size on macOS are watched by the parent."""

    def __init__(self, cpu_seconds: int, memory_bytes: int, output_characters: int) -> None:
        self.cpu_seconds = cpu_seconds
        self.output_characters = output_characters
        for what, limit in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_AS, memory_bytes),
        ):
            try:
                resource.setrlimit(what, (limit, limit))
            except (ValueError, OSError):  # macOS knows RLIMIT_AS but takes no value
                continue

    def next_rendering(self) -> None:
        """Allow the process so many more seconds of CPU; past them the kernel ends it."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(used.ru_utime + used.ru_stime) + 1 + self.cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


class Templates:
    """Compiled templates by key, and the answers to requests."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.env = environment()
        self.sources: dict[str, str] = {}
        self.compiled: dict[str, Any] = {}

    def answers(self, request: dict[str, Any]) -> Iterator[tuple[bool, str]]:
        """(True, text) or (False, what went wrong), one for each view."""
        key = request["key"]
        if request["template"] is not None:
            self.sources[key] = request["template"]
        chats = [([_aliased(m) for m in messages], tools) for messages, tools in request["chats"]]
        for chat, stop, prompt, extra in request["views"]:
            messages, tools = chats[chat]
            self.limits.next_rendering()
            try:
                yield True, self._render(key, messages[:stop], tools, prompt, {**request["variables"], **extra})
            except MemoryError:
                yield False, "it ran out of the memory that a rendering may use"
            except RecursionError:
                yield False, "it calls itself too deeply"
            except Exception as error:
                yield False, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]

    def _render(self, key: str, messages: list[Any], tools: Any, prompt: bool, variables: dict[str, Any]) -> str:
        if key not in self.compiled:
            self.compiled[key] = self.env.from_string(self.sources[key])
        pieces: list[str] = []
        room = self.limits.output_characters
        for piece in self.compiled[key].generate(
            {**variables, "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        ):
            room -= len(piece)
            if room < 0:
                raise ValueError(f"it writes more than {self.limits.output_characters} characters")
            pieces.append(piece)
        return "".join(pieces)


def serve(source: BinaryIO, sink: BinaryIO, templates: Templates) -> None:
    """Answer requests until the other side closes. A frame is its length in 4 bytes and so many bytes of JSON."""
    while header := source.read(4):
        request = json.loads(source.read(struct.unpack("!I", header)[0]))
        flushed = time.monotonic()
        for good, text in templates.answers(request):
            frame = json.dumps([good, text]).encode()
            sink.write(struct.pack("!I", len(frame)) + frame)
            if time.monotonic() - flushed > FLUSH_SECONDS:  # the parent's clock runs from one answer to the next
                sink.flush()
                flushed = time.monotonic()
        sink.flush()


if __name__ == "__main__":
    sys.path.extend(sys.argv[4:])
    serve(sys.stdin.buffer, sys.stdout.buffer, Templates(Limits(*map(int, sys.argv[1:4]))))
