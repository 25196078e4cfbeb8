"""Chat templates -> text, in a process of its own with limits on time, memory and size.

Nothing else in tunesmith renders a template. The output is what transformers' own method gives, except that
`strftime_now` always tells 26 July 2024 (`template_worker.FIXED_NOW`) and nothing random is on offer.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe
import psutil

from tunesmith.errors import InputError, ResourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS = 2
WALL_SECONDS = 30.0
MEMORY_BYTES = 512 * 2**20
OUTPUT_CHARACTERS = 16 * 2**20
FRAME_BYTES = 8 * OUTPUT_CHARACTERS
WATCH_SECONDS = 0.02
PIPE_BYTES = 2**16

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True)
class View:
    """One rendering: the first `stop` messages (None: all) of the chat at index `chat`, with or without a prompt."""

    chat: int = 0
    stop: int | None = None
    prompt: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])


def templates_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[str, str]:
    """Templates by name; none if the tokenizer has none. A jinja text is known by a brace or a line end."""
    if template is None:
        own: Any = getattr(tokenizer, "chat_template", None)
        return {} if not own else {"default": own} if isinstance(own, str) else _with_default(own)
    if "{" in template or "\n" in template:
        return {"default": template}
    try:
        return {"default": Path(template).expanduser().read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template {template!r} cannot be read: {error}",
            "give a jinja text or the path of a file with one",
        ) from error


def _with_default(own: Mapping[str, str]) -> dict[str, str]:
    if "default" not in own:
        raise InputError(
            f"the tokenizer has the chat templates {', '.join(sorted(own))} and no default",
            "give one of them as a file with data.template",
        )
    return dict(own)


def render(
    template: str,
    messages: Messages,
    tools: Tools = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of one conversation. `special_tokens` are bos_token and so on; `variables` go to the template too.

    Raises InputError when the template fails, refuses the messages, or takes more than a rendering may.
    """
    view = View(prompt=add_generation_prompt)
    (answer,) = render_views(template, [(messages, tools)], [view], {**(special_tokens or {}), **(variables or {})})
    if isinstance(answer, InputError):
        raise answer
    return answer


def render_views(
    template: str, chats: Sequence[tuple[Messages, Tools]], views: Sequence[View], variables: Mapping[str, Any]
) -> list[str | InputError]:
    """Several renderings of (messages, tools) pairs in one exchange; a view that fails gives its error in place.

    Raises InputError when a limit was passed, for then the process is gone and all views with it.
    """
    body = {
        "chats": chats,
        "views": [(v.chat, v.stop, v.prompt, v.variables) for v in views],
        "variables": variables,
    }
    with _lock:
        return [
            text if good else _failure(text, "change the messages, or give another template with data.template")
            for good, text in _process().ask(template, body, len(views))
        ]


def _failure(why: str, remedy: str) -> InputError:
    return InputError(f"the chat template failed: {_printable(why)}", remedy)


def _printable(text: str) -> str:
    """What a stranger's template says reaches a terminal: no control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


class _Process:
    """The worker and the two pipes to it."""

    def __init__(self) -> None:
        worker = Path(__file__).with_name("template_worker.py")
        homes = dict.fromkeys(str(Path(m.__file__ or "").parents[1]) for m in (jinja2, markupsafe))
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
        limits = [str(n) for n in (CPU_SECONDS, MEMORY_BYTES, OUTPUT_CHARACTERS)]
        try:
            self.popen = subprocess.Popen(
                # -P and -S: neither this folder (its file names are common words) nor .pth files are looked at.
                [sys.executable, "-P", "-S", "-s", str(worker), *limits, *homes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", **{k: os.environ[k] for k in kept if k in os.environ}},
                cwd="/",
                start_new_session=True,  # Ctrl-C asks the run to stop; this process ends with it, not before
                bufsize=0,
            )
        except OSError as error:
            raise ResourceError(
                f"could not start the process that renders chat templates: {error}",
                "check that more processes and memory are allowed",
            ) from error
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.sink, self.source = self.popen.stdin, self.popen.stdout
        self.poll = select.poll()
        self.poll.register(self.source, select.POLLIN)
        self.known: set[str] = set()
        self.buffer = bytearray()

    def ask(self, template: str, body: Mapping[str, Any], count: int) -> list[tuple[bool, str]]:
        key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            frame = json.dumps({**body, "key": key, "template": None if key in self.known else template}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"the messages cannot be given to a chat template: {error}", "keep to what JSON can hold"
            ) from error
        try:
            self._write(struct.pack("!I", len(frame)) + frame)
            answers = [self._answer() for _ in range(count)]
        except BaseException:
            # Half an exchange is in the pipes (a limit, or Ctrl-C): the next one gets a fresh process.
            self.close()
            raise
        self.known.add(key)
        return answers

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self.sink.write(view) :]
        except BrokenPipeError:
            raise self._died() from None

    def _answer(self) -> tuple[bool, str]:
        deadline = time.monotonic() + WALL_SECONDS
        (length,) = struct.unpack("!I", self._read(4, deadline))
        if length > FRAME_BYTES:
            raise _failure("it answers with too much", "give another template with data.template")
        good, text = json.loads(self._read(length, deadline))
        return bool(good), str(text)

    def _read(self, count: int, deadline: float) -> bytes:
        while len(self.buffer) < count:
            self._wait(deadline)
            piece = self.source.read(max(PIPE_BYTES, count - len(self.buffer)))
            if not piece:
                raise self._died()
            self.buffer += piece
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def _wait(self, deadline: float) -> None:
        """Wait for bytes, and watch what RLIMIT_AS does not limit on macOS."""
        while not self.poll.poll(WATCH_SECONDS * 1000):
            if time.monotonic() > deadline:
                raise _failure(f"it took more than {WALL_SECONDS:.0f} s", _SIMPLER)
            try:
                size = psutil.Process(self.popen.pid).memory_info().rss
            except psutil.Error:
                continue  # it has just ended: the pipe will say so
            if size > MEMORY_BYTES:
                raise _failure(f"it used more than {MEMORY_BYTES // 2**20} MB", _SIMPLER)

    def _died(self) -> InputError:
        code = self.popen.wait()
        if code == -signal.SIGXCPU:
            return _failure(f"it used more than {CPU_SECONDS} s of CPU time", _SIMPLER)
        return _failure(f"the process that renders it ended with {code}", _SIMPLER)

    def close(self) -> None:
        self.popen.kill()
        self.sink.close()
        self.source.close()
        self.popen.wait()

    def forget(self) -> None:
        """Let go of a process that belongs to the parent of this one."""
        self.popen.returncode = 0
        self.sink.close()
        self.source.close()


_SIMPLER = "give a simpler template with data.template"
_lock = threading.Lock()
_current: _Process | None = None


def _process() -> _Process:
    """This process's worker, started on first use and again after it ended."""
    global _current
    if _current is None or _current.sink.closed or _current.popen.poll() is not None:
        if _current is not None and not _current.sink.closed:
            _current.close()
        _current = _Process()
    return _current


def _after_fork() -> None:
    # A forked data worker must not talk through its parent's pipes, nor keep them open.
    global _lock, _current
    _lock = threading.Lock()
    if _current is not None:
        _current.forget()
        _current = None


def _at_exit() -> None:
    if _current is not None and not _current.sink.closed:
        _current.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
