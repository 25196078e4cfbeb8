"""sft is evaluated on the prompt that its training rows' answers continue."""

from __future__ import annotations

from typing import Any

import pytest

from chat_families import tokenizer_of
from tunesmith.data.chat import Renderer
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
