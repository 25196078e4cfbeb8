"""sft is evaluated on the prompt that its training rows' answers continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat_families import tokenizer_of
from tunesmith import api
from tunesmith.data.chat import Renderer
from tunesmith.evaluation import answers
from tunesmith.objectives.sft import Sft
from tunesmith.types import Completion, Row, SampleSpec

QUESTION = {"role": "user", "content": "6 x 7?"}
EMPTY = "<think>\n\n</think>\n\n"


class _Seen(Exception):  # noqa: N818
    """The prompts that would have been sampled from."""


class _Policy:
    def sample(self, prompts: list[list[int]], spec: SampleSpec) -> list[Completion]:
        raise _Seen(prompts)


@pytest.mark.parametrize(
    ("last", "quiet"),
    [
        ({"role": "assistant", "content": "42"}, True),
        ({"role": "assistant", "content": "42", "reasoning_content": "six times seven"}, False),
        ({"role": "assistant", "content": "<think>\nsix times seven\n</think>\n\n42"}, False),
        (None, False),
    ],
)
def test_qwen3_is_asked_as_it_was_trained(last: dict[str, str] | None, quiet: bool) -> None:
    renderer = Renderer(tokenizer_of("qwen3"))
    messages = [QUESTION, *([last] if last else [])]
    policy: Any = _Policy()
    with pytest.raises(_Seen) as seen:
        Sft(None).predict(policy, [Row({"messages": messages}, "row 1")], renderer, SampleSpec(4))
    (prompt,) = seen.value.args[0]
    assert renderer.decode(prompt).endswith(EMPTY) == quiet
    if last:
        assert renderer.encode(messages).input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("answers", "quiet"),
    [
        ([{"content": "42"}, {"content": "43"}], True),
        ([{"content": "42"}, {"content": "43", "reasoning_content": "one more"}], False),
        ([], False),
    ],
)
def test_a_new_question_is_asked_as_trainings_were(answers: list[dict[str, str]], quiet: bool) -> None:
    """Qwen3's empty block comes before a new answer where no answer of training thought first."""
    renderer = Renderer(tokenizer_of("qwen3"))
    trained, asked = Sft(None), Sft(None)
    trained.fit(Row({"messages": [QUESTION, {"role": "assistant", **answer}]}, "row") for answer in answers)
    asked.adopt(trained.describe())
    turns = [QUESTION, {"role": "assistant", "content": "42"}, {"role": "user", "content": "and 6 x 8?"}]
    for messages in (turns[:1], turns):
        prompt = asked.prompt(Row({"messages": messages}, "new"), renderer)
        text = renderer.decode(prompt)
        assert text.endswith(EMPTY) == quiet
        if quiet:
            row = renderer.encode([*messages, {"role": "assistant", "content": "48"}])
            assert row.input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("systems", "learned"), [(["a", "a"], "a"), (["a", "b"], None), ([None, None], None), (["a", None], None)]
)
def test_the_system_message_of_all_rows_is_learned(systems: list[str | None], learned: str | None) -> None:
    objective = Sft(None)
    answer = {"role": "assistant", "content": "42"}
    said = [[{"role": "system", "content": system}] if system else [] for system in systems]
    objective.fit(Row({"messages": [*first, QUESTION, answer]}, "row") for first in said)
    assert objective.system == learned
    assert objective.describe()["system"] == learned


def test_rows_of_plain_text_teach_no_way_to_ask() -> None:
    objective = Sft(None)
    objective.fit([Row({"text": "42"}, "row")])
    assert objective.describe() == {"system": None, "without_thinking": False}


def test_of_several_answers_the_first_is_learned_and_each_is_right(tiny_llama: Path, tmp_path: Path) -> None:
    asked = {"model": str(tiny_llama), "objective": "sft", "method": "full", "train": {"max_steps": 1}}
    asked |= {"precision": "fp32", "place": {"device": "cpu"}, "evaluate": {"max_new_tokens": 2}}
    rows = [{"prompt": f"Colour {n}?", "completion": ["blue", "navy", "azure"]} for n in range(4)]
    run = api.train(asked, data={"train": rows[:3], "test": rows[3:]}, out=tmp_path / "run").path
    (row,) = answers.read(run, "test")
    assert row.answers["tuned"].references == row.answers["base"].references == ("blue", "navy", "azure")
