"""Supervised fine-tuning: the negative log-likelihood of what the assistant must say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunesmith.data import sides
from tunesmith.data.fields import number_of
from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError, placed
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.protocols import Annotator
from tunesmith.recipe_keys import Strict
from tunesmith.types import Batch, Completion, Example, Part, Piece, Prediction, Row, SampleSpec, Step, Terms, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer


LOOKED_AT = 1000  # rows of training that tell how its questions are asked
WEIGHT = "weight"  # the column of an example whose loss counts so many times


class Likelihood(Strict):
    """What the likelihood of text may be changed by."""

    weight_column: str | None = Field(
        None, description="a column of numbers above 0: how many times the loss of each training row counts"
    )
    neftune_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="noise on the embeddings of training texts against learning by rote; 5 is usual, 0 is none"
    )


class Learned(Likelihood):
    """What of a conversation is learned, and how much it counts."""

    learn: Literal["answers", "last", "all"] = Field(
        "answers", description="of conversations: all that the assistant says, its last answer alone, or every token"
    )


@OBJECTIVES.register("sft")
class Sft:
    """loss = - sum_t w_t log p(x_t | x_<t) / sum_t w_t, over the tokens that the model must produce.

    w_t is the weight of the token's turn times that of its row. `neftune_alpha`: Jain et al. 2023, arXiv 2310.05914.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="learn to answer as the rows do, from conversations, prompts with completions, or plain text",
        head="lm",
        formats=frozenset({"messages", "text"}),
        kinds=frozenset({"decoder", "encoder-decoder"}),
        coupling="token",
        trains_tokens=True,
        metrics=(
            "exact_match",
            "json_valid",
            "schema_valid",
            "field_accuracy",
            "token_f1",
            "rouge_l",
            "bleu",
            "chrf",
            "pass_at_1",
            "loss",
            "perplexity",
        ),
    )

    Options: ClassVar[type[Any]] = Learned

    def __init__(self, options: Any) -> None:
        self.options: Any = self.Options() if options is None else options
        self.system: str | None = None
        self.without_thinking = False

    def fit(self, rows: Iterable[Row]) -> None:
        """What a new question is asked with: the one system message of training, and whether no answer thinks first."""
        asked = [row for row in islice(rows, LOOKED_AT) if "messages" in row.value]
        systems = {_system(row) for row in asked}
        self.system = systems.pop() if len(systems) == 1 else None
        self.without_thinking = bool(asked) and all(map(_answers_without_thinking, asked))

    def describe(self) -> dict[str, Any]:
        return {"system": self.system, "without_thinking": self.without_thinking}

    def adopt(self, description: Mapping[str, Any]) -> None:
        self.system = description.get("system")
        self.without_thinking = bool(description.get("without_thinking", False))

    def heads(self) -> list[HeadSpec]:
        return []

    def example(self, row: Row, renderer: Renderer) -> Example:
        if renderer.start is not None:
            return self._two_sided(row, renderer)
        weights = None
        if "messages" in row.value:
            encoded = renderer.encode(self._learned(row.value["messages"]), row.value.get("tools"))
            if self.options.learn == "all":
                weights = np.ones(len(encoded.input_ids), np.float32)
                weights[0] = 0  # nothing foretells it
        else:
            encoded = renderer.text(row.value["text"])
        piece = Piece(encoded.input_ids, encoded.weights if weights is None else weights)
        return Example((piece,), self.columns(row), encoded.cut, encoded.cut_trained)

    def columns(self, row: Row) -> dict[str, float]:
        """How many times the row's loss counts, where training rows say it; InputError for what is no such number."""
        name = self.options.weight_column
        if name is None or name not in row.tags:
            return {}
        return {WEIGHT: number_of(row, name, "objective.weight_column", above=0)}

    def _learned(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation, its earlier answers marked as not to be learned where only the last one is."""
        if self.options.learn != "last":
            return messages
        return [{**said, "train": False} if said["role"] == "assistant" else said for said in messages[:-1]] + (
            messages[-1:]
        )

    def _two_sided(self, row: Row, renderer: Renderer) -> Example:
        if "messages" not in row.value:
            raise InputError(
                "an encoder-decoder learns to answer, and a row of plain text asks nothing",
                "give rows with a prompt and a completion",
            )
        made = sides.example(self._learned(row.value["messages"]), row.value.get("tools"), renderer)
        return replace(made, columns=self.columns(row))

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"nll": sum(float(counted(batch).sum()) for batch in step.batches)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        with policy.noisy(self.options.neftune_alpha):
            part = self.likelihood(policy, batch)
        if policy.training:
            part.weight_U = counted(batch)
        return Terms({"nll": part})

    def likelihood(self, policy: Policy, batch: Batch) -> Part:
        """The negative log-likelihood of every trained token, in nats."""
        scores = policy.score(batch, Want(logprobs=True))
        assert scores.logprob_U is not None
        assert scores.weight_U is not None
        assert scores.example_U is not None
        return Part(-scores.logprob_U, scores.weight_U, scores.example_U)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """Completes each conversation's last assistant turn; rows of plain text are only scored."""
        asked = [index for index, row in enumerate(rows) if "messages" in row.value]
        prompts = [self.prompt(rows[index], renderer) for index in asked]
        completions = dict(zip(asked, policy.sample(prompts, spec), strict=True))
        scores = self._score(policy, rows, renderer, spec.batch_tokens)
        return [
            Prediction(
                output=_said(completions[index], renderer) if index in completions else "",
                reference=_answer(row),
                where=row.where,
                scores=scores.get(index, {}),
                finished=index not in completions or completions[index].finished,
                other_references=tuple(row.value.get("other_answers", ())),
            )
            for index, row in enumerate(rows)
        ]

    def draw(
        self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec, count: int
    ) -> list[list[str]]:
        """`count` answers to each row's conversation."""
        prompts = [self.prompt(row, renderer) for row in rows for _ in range(count)]
        said = iter([_said(completion, renderer) for completion in policy.sample(prompts, spec)])
        return [list(islice(said, count)) for _ in rows]

    def prompt(self, row: Row, renderer: Renderer) -> list[int]:
        """The tokens that an answer to the row's conversation follows: those that training saw before such an answer.

        Where the template writes something before an answer without thinking (Qwen3: an empty block), training
        has shown the answer behind it, so the prompt has it too.
        """
        question, tools = _question(row)
        if renderer.start is not None:
            with placed(row.where):
                return sides.asked(question, tools, renderer).input_ids.tolist()
        messages = row.value["messages"]
        if len(question) == len(messages):
            messages = [*({**said, "train": False} for said in question), {"role": "assistant", "content": "."}]
            without_thinking = self.without_thinking
        else:
            without_thinking = _answers_without_thinking(row)
        with placed(row.where):
            if without_thinking:
                quiet = renderer.prompt(question, tools, thinking=False)
                if np.array_equal(renderer.encode(messages, tools).input_ids[: len(quiet)], quiet):
                    return quiet.tolist()
            return renderer.prompt(question, tools).tolist()

    def _score(
        self, policy: Policy, rows: Sequence[Row], renderer: Renderer, tokens: int
    ) -> dict[int, dict[str, float]]:
        """Summed negative log-likelihood (nats) and trained tokens of each row that has an answer; bytes of a text."""
        answered = [index for index, row in enumerate(rows) if "text" in row.value or _answer(row) is not None]
        examples = ExampleList([self.example(rows[index], renderer) for index in answered])
        found: dict[int, dict[str, float]] = {}
        policy.eval()
        with torch.no_grad():
            for batch in batches(examples, tokens, packed=policy.packed, pad_id=policy.tokens.pad):
                seen = self.annotate(policy, batch) if isinstance(self, Annotator) else batch
                part = self.likelihood(policy, place(seen, policy.device))
                sums_N = torch.zeros(len(batch.examples), dtype=torch.float64)
                counts_N = torch.zeros(len(batch.examples), dtype=torch.float64)
                sums_N.index_add_(0, part.example_U.cpu(), (part.loss_U * part.weight_U).double().cpu())
                counts_N.index_add_(0, part.example_U.cpu(), part.weight_U.double().cpu())
                for position, number in enumerate(batch.examples):
                    own = found.setdefault(answered[number], {"nll": 0.0, "tokens": 0.0})
                    own["nll"] += float(sums_N[position])  # a document's windows may come in several batches
                    own["tokens"] += float(counts_N[position])
        for index, own in found.items():
            if "text" in rows[index].value:
                own["bytes"] = float(len(rows[index].value["text"].encode()))
        return found


def counted(batch: Batch) -> Tensor:
    """The weights of a training batch's units, times those of their rows where these have any: [U]."""
    weight_U, rows = batch.weight_BT.flatten()[batch.unit_U], batch.columns.get(WEIGHT)
    return weight_U if rows is None else weight_U * rows[batch.example_U]


def _said(completion: Completion, renderer: Renderer) -> str:
    ids = completion.token_ids
    return renderer.decode(ids) if renderer.start is None else sides.answer_of(ids, renderer)


def _question(row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    messages = row.value["messages"]
    return (messages[:-1] if messages[-1]["role"] == "assistant" else messages), row.value.get("tools")


def _system(row: Row) -> str | None:
    first = row.value["messages"][0]
    return str(first["content"]) if first["role"] == "system" else None


def _answers_without_thinking(row: Row) -> bool:
    last = row.value["messages"][-1]
    thought = any(last.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
    return last["role"] == "assistant" and not thought and "<think>" not in str(last.get("content") or "")


def _answer(row: Row) -> str | None:
    messages = row.value.get("messages")
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
