"""Templates render as transformers renders them, and cannot take the run down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from chat_families import FAMILIES, tokenizer_of
from tunesmith.data import template as rendering
from tunesmith.data.template import View, render, render_views
from tunesmith.errors import InputError

QUESTION = {"role": "user", "content": "What is the capital of France? "}
ANSWER = {"role": "assistant", "content": "  Paris 😀 é\n"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "é": "<'&\">"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "123456789", "function": {"name": "weather", "arguments": {"city": "Paris", "n": 3}}}
    ],
}
RESULT = {"role": "tool", "content": '{"degrees": 21}', "name": "weather", "tool_call_id": "123456789"}
THOUGHT = {"role": "assistant", "content": "Paris", "reasoning_content": "France, so Paris"}


def conversations(name: str) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    family = FAMILIES[name]
    found: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        ([QUESTION], None),
        ([QUESTION, ANSWER], None),
        ([QUESTION, ANSWER, QUESTION, THOUGHT], None),
    ]
    if family.system:
        found.append(([{"role": "system", "content": " Be brief. "}, QUESTION, ANSWER, QUESTION], None))
    if family.tools:
        found.append(([QUESTION, CALL, RESULT, ANSWER], [WEATHER]))
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(name: str, prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as upstream

    from tunesmith.data.template_worker import FIXED_NOW

    class Frozen:
        @staticmethod
        def now() -> Any:
            return FIXED_NOW

    monkeypatch.setattr(upstream, "datetime", Frozen)
    tokenizer = tokenizer_of(name)
    for messages, tools in conversations(name):
        expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        got = render(FAMILIES[name].template, messages, tools, prompt, tokenizer.special_tokens_map)
        assert got == expected


def test_what_templates_may_use() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ dict(a=1) }}{{ extra }}{{ documents }}"
    )
    text = render(source, [{"role": "user", "content": "é<"}, QUESTION], variables={"extra": "!"})
    assert text == '{"role": "user", "content": "é<"}2{\'a\': 1}!None'


def test_the_day_does_not_change() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", [QUESTION]) == "26 Jul 2024"


def test_a_refusal_of_the_template_is_told() -> None:
    with pytest.raises(InputError, match="System role not supported"):
        render(FAMILIES["gemma"].template, [{"role": "system", "content": "x"}, QUESTION])
    with pytest.raises(InputError) as caught:
        render("{{ raise_exception('red \x1b[31m') }}", [QUESTION])
    assert "\x1b" not in str(caught.value)


DOUBLING = "{% set ns = namespace(s='ab') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
HOSTILE = {
    "range": "{% for a in range(10**9) %}x{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": DOUBLING,
    "joined": "{% set ns = namespace(s='ab') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "times": "{{ 'a' * 10**11 }}",
    "power": "{% set n = 10**9 %}{{ 7 ** n }}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "replace": "{% set s = 'a' * 10**6 %}{{ s.replace('a', s) }}",
    "syntax": "{% if %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "private": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "append": "{% set x = messages.append(1) %}",
    "include": "{% include '/etc/passwd' %}",
    "random": "{{ [1, 2] | random }}",
    "lipsum": "{{ lipsum() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match="chat template failed"):
        render(HOSTILE[name], [QUESTION])
    assert time.monotonic() - begun < rendering.WALL_SECONDS
    assert render("{{ messages[0].role }}", [QUESTION]) == "user"


def test_size_is_watched_where_the_kernel_does_not_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rendering._process().close()
    monkeypatch.setattr(rendering, "MEMORY_BYTES", 2**40)
    process = rendering._process()
    monkeypatch.setattr(rendering, "MEMORY_BYTES", 100 * 2**20)
    slow = DOUBLING.replace("60", "27") + "{% for a in range(99999) %}{% for b in range(999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="used more than 100 MB"):
        render(slow, [QUESTION])
    assert process.popen.returncode == -signal.SIGKILL


def test_the_clock_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "WALL_SECONDS", 0.2)
    with pytest.raises(InputError, match="it took more than 0 s"):
        render(HOSTILE["loops"], [QUESTION])


def test_views_fail_one_by_one() -> None:
    source = "{% if messages | length > 1 %}{{ raise_exception('too many') }}{% endif %}{{ add_generation_prompt }}"
    chats = [([QUESTION, ANSWER], None), ([QUESTION], None)]
    one, two, three = render_views(source, chats, [View(0), View(0, 1, True), View(1)], {})
    assert isinstance(one, InputError)
    assert (two, three) == ("True", "False")


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be given"):
        render("x", [{"role": "user", "content": object()}])


def test_an_ended_process_is_started_again() -> None:
    render("x", [QUESTION])
    ended = rendering._process().popen
    ended.kill()
    ended.wait()
    assert render("x", [QUESTION]) == "x"


def _in_worker(number: int) -> tuple[str, int]:
    return render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}]), os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_workers_render_too(method: str) -> None:
    render("x", [QUESTION])
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        texts, pids = zip(*pool.map(_in_worker, range(40)), strict=True)
    assert texts == tuple(map(str, range(40)))
    assert os.getpid() not in pids
    assert render("{{ messages[0].role }}", [QUESTION]) == "user"


def test_threads_take_turns() -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for _ in range(50):
            if _in_worker(number)[0] != str(number):
                wrong.append("mixed up")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
