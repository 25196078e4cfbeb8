"""`tunesmith chat` over tiny models: what is asked, what comes back, and a conversation at a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith import api
from tunesmith.chatting import Chat, Sampling, _Stream  # pyright: ignore[reportPrivateUsage]
from tunesmith.cli import main
from tunesmith.data.chat import Renderer
from tunesmith.data.formats import rows as formatted
from tunesmith.data.read import read
from tunesmith.errors import InputError
from tunesmith.methods.lora import Lora
from tunesmith.types import Row, SampleSpec

SYSTEM = "Be short."
ROWS = [
    {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"colour {i}?"},
            {"role": "assistant", "content": "red"},
        ]
    }
    for i in range(20)
]
LABELLED = [{"text": f"{colour} {i}", "label": colour} for i in range(12) for colour in ("red", "green")]
ALONE = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that has learned to say "red" and end, on a base that ends where its context is full."""
    return taught(tiny_llama, tmp_path_factory.mktemp("chat") / "run")


def taught(base: Path, to: Path) -> Path:
    recipe = {
        "model": str(base),
        "objective": "sft",
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 20, "batch_size": 10, "learning_rate": 0.05},
        "precision": "fp32",
        "place": ALONE,
    }
    return api.train(recipe, data={"train": ROWS}, out=to).path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "labels"
    recipe = {"model": str(tiny_bert), "objective": "classify", "method": "head", "place": ALONE}
    api.train({**recipe, "train": {"epochs": 2}}, data={"train": LABELLED}, out=folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> api.Loaded:
    return api.load(run, "cpu")


@pytest.fixture
def chat(loaded: api.Loaded) -> Chat:
    return Chat(loaded, sampling=Sampling(max_new_tokens=24))


def asked(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the model is given from here on."""
    found: list[list[int]] = []
    policy: Any = chat._policy  # pyright: ignore[reportPrivateUsage]
    sample = policy.sample

    def follow(prompts: list[list[int]], spec: SampleSpec) -> Any:
        found.extend(prompts)
        return sample(prompts, spec)

    monkeypatch.setattr(policy, "sample", follow)
    return found


# ---------------------------------------------------------------- what is asked and answered


def test_an_answer_is_predicts_answer(chat: Chat, loaded: api.Loaded) -> None:
    pieces: list[str] = []
    reply = chat.ask("colour 3?", pieces.append)
    row = Row({"messages": ROWS[3]["messages"][:2]}, "row")
    (expected,) = loaded.predict([row.value], 24)
    assert reply.text == expected.output == "red"
    assert (reply.finished, reply.tokens) == (True, 3)
    assert "".join(pieces) == "red"
    assert len(pieces) == 3


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_is_the_answer_in_pieces(chat: Chat, loaded: api.Loaded, seed: int) -> None:
    """At a high temperature the tiny model writes bytes that make characters, halves of them and nonsense."""
    chat.sampling = Sampling(temperature=2.0, top_p=0.99, top_k=200, max_new_tokens=48, seed=seed)
    pieces: list[str] = []
    reply = chat.ask("hello", pieces.append)
    row = Row({"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]}, "row")
    spec = SampleSpec(48, temperature=2.0, top_p=0.99, top_k=200, seed=seed)
    (whole,) = loaded.objective.predict(loaded.policy, [row], loaded.renderer, spec)
    assert "".join(pieces) == reply.text == whole.output
    assert len(pieces) > 10


def test_characters_are_not_told_by_halves(loaded: api.Loaded) -> None:
    text = "né 日本 👩‍🚀 \ufffd!"
    pieces: list[str] = []
    stream = _Stream(loaded.renderer, pieces.append, lambda: False)
    for token in loaded.renderer.text(text).input_ids[:-1].tolist():
        assert not stream.take(token)
    assert "".join(pieces) == text
    assert pieces == [*"né 日本 👩‍🚀 ", "\ufffd!"]


def test_every_turn_is_asked_as_training_would_render_it(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = asked(chat, monkeypatch)
    for number in (1, 2, 3):
        chat.ask(f"colour {number}?")
    trained = [{"role": "system", "content": SYSTEM}, *chat.messages]
    ids, weights = (lambda e: (e.input_ids, e.weights))(chat._renderer.encode(trained))  # pyright: ignore[reportPrivateUsage]
    begins = np.flatnonzero((weights[1:] > 0) & (weights[:-1] == 0)) + 1  # where each answer's tokens begin
    assert [len(prompt) for prompt in prompts] == begins.tolist()
    assert all(ids[: len(prompt)].tolist() == prompt for prompt in prompts)


def test_the_base_is_the_base(chat: Chat, loaded: api.Loaded, tiny_llama: Path) -> None:
    """The oracle is the folder itself, loaded by transformers and asked for the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    tuned = chat.ask("colour 5?")
    pieces: list[str] = []
    reply = chat.base(pieces.append)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    prompt = loaded.renderer.prompt(ROWS[5]["messages"][:2])
    ids = torch.tensor(prompt[None].astype(np.int64))
    for _ in range(24):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert reply.text == loaded.renderer.decode(ids[0, len(prompt) :].tolist()) == "".join(pieces)
    assert reply.text != tuned.text
    assert chat.messages[-1]["content"] == tuned.text
    assert chat.ask("colour 5?").text == tuned.text  # the adapter is on again


def test_top_k_of_one_is_greedy(chat: Chat) -> None:
    greedy = [chat.ask("colour 1?").text, chat.base().text]
    chat.undo()
    chat.sampling = chat.sampling.changed(temperature=9.0, top_k=1)
    assert [chat.ask("colour 1?").text, chat.base().text] == greedy
    chat.sampling = chat.sampling.changed(top_k=0)
    assert chat.base().text != greedy[1]


def test_the_same_turns_draw_the_same_answers_and_a_retry_another(loaded: api.Loaded) -> None:
    drawn = Sampling(temperature=2.0, max_new_tokens=12)
    first, second = Chat(loaded, sampling=drawn), Chat(loaded, sampling=drawn)
    said = [first.ask("a").text, first.ask("b").text, first.retry().text]
    assert said == [second.ask("a").text, second.ask("b").text, second.retry().text]
    assert said[1] != said[2]
    assert [m["content"] for m in first.messages[::2]] == ["a", "b"]
    assert Chat(loaded, sampling=drawn.changed(seed=5)).ask("a").text != said[0]


# ---------------------------------------------------------------- the conversation


def test_turns_are_taken_back(chat: Chat) -> None:
    for undone in (chat.undo, chat.retry, chat.base):
        with pytest.raises(InputError, match="nothing was asked"):
            undone()
    chat.ask("one")
    chat.ask("two")
    assert chat.undo() == "two"
    assert [m["content"] for m in chat.messages] == ["one", "red"]
    chat.reset()
    assert (chat.messages, chat.system) == ([], SYSTEM)


def test_a_stopped_answer_is_kept_as_far_as_it_came(chat: Chat) -> None:
    chat.sampling = Sampling(temperature=2.0, max_new_tokens=48, seed=1)
    whole = chat.ask("hello").text
    chat.undo()
    chat._drawn -= 1  # pyright: ignore[reportPrivateUsage]
    pieces: list[str] = []
    forwards: list[object] = []
    model: Any = chat._policy.model  # pyright: ignore[reportPrivateUsage]
    counting = model.register_forward_hook(lambda *_: forwards.append(None))
    reply = chat.ask("hello", pieces.append, lambda: len(pieces) == 5)
    counting.remove()
    assert len(forwards) <= reply.tokens + 1  # the model does not go on in silence
    assert (reply.finished, reply.stopped) == (False, True)
    assert whole.startswith(reply.text.rstrip("\ufffd"))
    assert 5 <= reply.tokens < 48
    assert chat.messages[-1] == {"role": "assistant", "content": reply.text, "train": False}


def test_a_failure_leaves_the_conversation_as_it_was(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.ask("one")
    before = list(chat.messages)

    def fail(text: str) -> None:
        raise KeyboardInterrupt

    for act in (lambda: chat.ask("two", fail), lambda: chat.retry(fail), lambda: chat.base(fail)):
        with pytest.raises(KeyboardInterrupt):
            act()
        assert chat.messages == before
    assert chat.ask("colour 1?").text == "red"  # a base that was interrupted gave the adapter back


def test_what_does_not_fit_is_left_out_oldest_first(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = asked(chat, monkeypatch)
    assert chat.context == 512
    replies = [chat.ask(f"{number} " + "x" * 100) for number in range(6)]
    assert [reply.left_out for reply in replies] == [0, 0, 0, 2, 4, 6]
    assert all(len(prompt) + 24 <= 512 for prompt in prompts)
    text = chat._renderer.decode(prompts[-1])  # pyright: ignore[reportPrivateUsage]
    assert SYSTEM in text
    assert re.findall(r"(\d) xxx", text) == ["3", "4", "5"]
    assert len(chat.messages) == 12
    assert chat.base().left_out == 6


def test_an_answer_has_what_the_context_leaves_and_a_message_that_leaves_nothing_is_refused(chat: Chat) -> None:
    chat.ask("one")
    chat.sampling = chat.sampling.changed(max_new_tokens=100_000)
    reply = chat.ask("y" * 400)
    assert reply.left_out == 2
    assert 0 < reply.limit < 100
    before = list(chat.messages)
    with pytest.raises(InputError, match=r"takes \d+ tokens .* the model sees 512"):
        chat.ask("z" * 600)
    assert chat.messages == before


def test_a_chat_may_be_longer_than_the_rows_of_training(loaded: api.Loaded) -> None:
    narrow = replace(loaded, renderer=Renderer(loaded.renderer.tokenizer, sequence_length=40))
    with pytest.raises(InputError, match="more than the sequence length of 40"):
        narrow.predict([{"messages": [{"role": "user", "content": "x" * 100}]}])
    assert Chat(narrow, sampling=Sampling(max_new_tokens=8)).ask("x" * 100).tokens > 0


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"temperature": "-1"}, "temperature cannot be '-1'"),
        ({"temperature": "warm"}, "temperature cannot be 'warm'"),
        ({"top_p": 0}, "top_p cannot be 0"),
        ({"top_k": "1.5"}, "top_k cannot be '1.5'"),
        ({"max_new_tokens": "0"}, "max_new_tokens cannot be '0'"),
        ({"temprature": "1"}, "there is no temprature to set"),
    ],
)
def test_sampling_is_checked(given: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError) as refused:
        Sampling().changed(**given)
    assert refused.value.cause == cause
    assert re.match(r"it must be|known: ", refused.value.remedy)


def test_the_system_message_is_trainings_own_unless_another_is_given(loaded: api.Loaded) -> None:
    assert Chat(loaded).system == SYSTEM
    assert Chat(loaded, "Be long.").system == "Be long."
    assert Chat(loaded, "").system == ""


def test_a_saved_conversation_is_a_row_to_train_on(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    chat.ask("one")
    assert chat.save(path) == 1
    chat.ask("two")
    assert chat.save(path) == 1  # what was saved before has grown
    chat.reset()
    chat.ask("three", stop=lambda: True)
    assert chat.save(path) == 2
    name, found = formatted(read(path.name, tmp_path, "train"), None, {})
    assert name == "messages"
    told = [[(m["role"], m["content"]) for m in row.value["messages"]] for row in found]
    assert told[0] == [
        ("system", SYSTEM), ("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "red"),
    ]  # fmt: skip
    assert told[1] == [("system", SYSTEM), ("user", "three"), ("assistant", "r")]
    cut = json.loads(path.read_text().splitlines()[1])["messages"][-1]
    assert cut["train"] is False


@pytest.mark.parametrize("content", ["a letter\n", '{"text": "a row of another kind"}\n', "[1]\n1\n"])
def test_no_other_file_is_written_over(chat: Chat, tmp_path: Path, content: str) -> None:
    path = tmp_path / "other"
    path.write_text(content)
    chat.ask("one")
    for wrong in (path, tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(InputError):
            chat.save(wrong)
    assert path.read_text() == content


# ---------------------------------------------------------------- the command


def call(*words: str | Path, stdin: str = "") -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["chat", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


def test_one_question_one_answer(run: Path) -> None:
    assert call(run, "--prompt", "colour 2?") == (0, "red\n", "")
    assert call(run, "--prompt", "-", stdin="colour 2?\n") == (0, "red\n", "")


def test_one_question_as_json(run: Path, chat: Chat) -> None:
    code, out, _ = call(run, "--prompt", "colour 2?", "--json", "--base", "--max-new-tokens", "24", "--system", "")
    found = json.loads(out)
    chat.system = ""
    assert code == 0
    assert (found["run"], found["system"], found["prompt"]) == (str(run), "", "colour 2?")
    assert found["answers"]["tuned"]["text"] == chat.ask("colour 2?").text
    assert found["answers"]["base"]["text"] == chat.base().text


def test_two_answers_are_named_where_there_is_no_terminal(run: Path) -> None:
    code, out, err = call(run, "--prompt", "colour 2?", "--base", "--max-new-tokens", "8")
    assert code == 0
    assert out.startswith("tuned:\nred\nbase:\n")
    assert err == "(cut after 8 tokens: --max-new-tokens allows more)\n"


def test_turns_come_line_by_line_from_a_pipe(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    turns = ["one", '"""two', "/quit is text here", '"""', "", "/set top-p=0.5", f"/save {kept}", "/quit", "never"]
    code, out, err = call(run, stdin="\n".join(turns))
    assert code == 0
    assert out == "red\nred\n"
    assert "top_p" not in err
    said = [m["content"] for m in json.loads(kept.read_text())["messages"]]
    assert said == [SYSTEM, "one", "red", "two\n/quit is text here", "red"]
    code, out, _ = call(run, "--json", "--max-new-tokens", "8", stdin="one\n/base\n/nothing\n/bose\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("model") for line in lines] == ["tuned", "base", None, None]
    assert lines[2]["error"] == "unknown command /nothing"
    assert lines[3]["remedy"].startswith("did you mean /base?")


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("/undo", "error: nothing was asked yet\nremedy: ask something first"),
        ("/retry", "the same answer comes again; /set temperature 0.7 draws another)\nerror: nothing was asked"),
        ("one\n/undo", "(taken back: one)"),
        ("/system", f"(system: {SYSTEM})"),
        ("/system -", "(no system message)"),
        ("/system Be long.", "(system: Be long.)"),
        ("/set temperature 0.7", "(temperature 0.7, top_p 1, top_k 0, seed 17, up to 512 tokens)"),
        ("/set", "(greedy (temperature 0), up to 512 tokens)"),
        ("/set temperature", "error: /set temperature gives no value"),
        ("/set heat 3", "error: there is no heat to set"),
        ("/reset", "(a new conversation)"),
        ("/save", "error: /save needs a file"),
        ("/help", "/set NAME VALUE"),
        ("one\n/set temperature 2\n/retry", "(temperature 2"),
        ("w" * 600, "error: the message takes"),
    ],
)  # fmt: skip
def test_commands_say_what_they_did(run: Path, turns: str, said: str) -> None:
    code, _, err = call(run, stdin=turns + "\n")
    assert code == 0
    assert said in err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "a", "--top-p", "0.9"], "--top-p: nothing is drawn at temperature 0"),
        (["--temperature", "hot"], "temperature cannot be 'hot'"),
    ],
)
def test_refusals(run: Path, words: list[str], cause: str) -> None:
    code, _, err = call(run, *words)
    assert code == 2
    assert err.partition("error: ")[2].startswith(cause)


def test_a_method_that_keeps_no_base_has_none_to_ask(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "facts", replace(Lora.facts, reference="none"))
    code, _, err = call(run, "--prompt", "colour 2?", "--base")
    assert (code, err) == (2, "error: lora keeps no base to ask\nremedy: leave --base out\n")
    with pytest.raises(InputError, match="lora keeps no base to ask"):
        api.chat(run).base()


def test_a_classifier_gives_labels(classifier: Path) -> None:
    (expected,) = api.predict(classifier, [{"text": "red 3"}])
    assert expected.probabilities is not None
    code, out, _ = call(classifier, stdin="red 3\n")
    best = max(expected.probabilities.values())
    assert code == 0
    assert out.split()[:2] == [expected.output, f"{best:.3f}"]
    code, out, _ = call(classifier, "--prompt", "red 3", "--json")
    assert json.loads(out)["label"] == expected.output
    assert json.loads(out)["probabilities"] == pytest.approx(dict(expected.probabilities))
    code, _, err = call(classifier, "--system", "x", "--temperature", "1", "--prompt", "red")
    assert code == 2
    assert "classify gives labels and converses with nobody: --temperature, --system" in err
    with pytest.raises(InputError, match="classify answers no conversations"):
        api.chat(classifier)


# ---------------------------------------------------------------- at a terminal


class Screen:
    """A process at a terminal of its own, and what it has written there."""

    def __init__(self, *words: str | Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *map(str, words)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 90) -> str:
        """What came up to the pattern's end; what was there before is forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        assert found, f"{pattern!r} did not come: {self.seen!r}"
        came, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return came

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The same run on a base that talks for minutes: its context is long."""
    folder = tmp_path_factory.mktemp("endless")
    base = shutil.copytree(tiny_llama, folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    return taught(base, folder / "run")


@pytest.fixture
def screen(endless: Path) -> Iterator[Screen]:
    at = Screen("chat", endless)
    yield at
    if at.process.poll() is None:
        at.process.send_signal(signal.SIGKILL)
    at.process.wait()
    os.close(at.master)


def test_a_conversation_at_a_terminal(screen: Screen, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    assert "greedy" in screen.until(r"> ")
    screen.type("colour 1?\n")
    screen.until(r"red\r\n")
    screen.until(r"> ")
    screen.type("\x1b[200~a paste\nof two lines\x1b[201~\n")
    screen.until(r"red\r\n")
    screen.until(r"> ")
    screen.type("/set max_new_tokens 999999\n")
    screen.until(r"up to 999,999 tokens.*\r\n")
    screen.type("/base\n")
    stop_the_base(screen)
    screen.until(r"> ")
    screen.type("half a line")
    screen.until("half a line")
    time.sleep(0.5)  # while it still works on the letters, the line editor may miss the signal
    screen.type("\x03")
    screen.until(r"ends the chat")
    screen.until(r"> ")
    screen.type("\x1b[A\n")  # the arrow brings back the last line that was entered
    stop_the_base(screen)
    screen.until(r"> ")
    screen.type(f"/save {kept}\n")
    screen.until("holds 1 conversation")
    screen.until(r"> ")  # before, the key is the terminal's and not the line editor's
    screen.type("\x04")
    assert screen.process.wait(30) == 0
    said = [m["content"] for m in json.loads(kept.read_text())["messages"]]
    assert said == [SYSTEM, "colour 1?", "red", "a paste\nof two lines", "red"]


def stop_the_base(screen: Screen) -> None:
    """Ctrl-C once its answer has begun: the columns are drawn empty, and again with its first letters."""
    for _ in range(2):
        screen.until("tuned .*base")
    screen.type("\x03")
    screen.until(r"\(stopped\)")


def test_sigterm_ends_a_chat_in_the_middle_of_an_answer(screen: Screen) -> None:
    screen.until(r"> ")
    screen.type("colour 1?\n")
    screen.until(r"red\r\n")
    screen.type("/base\n")
    screen.until("tuned .*base")
    screen.process.send_signal(signal.SIGTERM)
    screen.until("asked to end by SIGTERM")
    assert screen.process.wait(30) == 143
