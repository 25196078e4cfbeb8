"""A policy as lm-evaluation-harness asks one: the likelihood of continuations and of texts, and what it writes.

Imported only where that library is installed. Shape letters: U units, R units of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from torch import Tensor

from tunesmith.data.pack import place
from tunesmith.data.source import ExampleList, batches
from tunesmith.types import Batch, Example, Piece, SampleSpec, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.models.policy import Policy

LONGEST = 2048  # tokens of a model that does not say how many it sees, as the library has it
ANSWER = 256  # new tokens where a task does not say how many
TOKENS = 4096  # run together

Request = tuple[Any, list[int], list[int]]  # what was asked, the tokens before, those whose likelihood is asked


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a task wants its answers: until one of some texts, of at most so many tokens."""

    until: tuple[str, ...]
    spec: SampleSpec


class HarnessModel(TemplateLM):
    """Texts go in as they are, without a chat template; a text that is too long loses its beginning.

    Numbers are those of the library's own model of transformers.
    """

    def __init__(self, policy: Policy, renderer: Renderer, context: int | None, seed: int) -> None:
        super().__init__()
        self.tokenizer: Any = renderer.tokenizer
        self._policy, self._renderer, self._seed = policy, renderer, seed
        self._context = context or LONGEST

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        begins: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows in which each token is foretold once."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context,
                context_len=1,
            )
            own = [(None, *utils.make_disjoint_window(pair)) for pair in rolling]
            windows += own
            owners += [owner] * len(own)
        found = np.zeros(len(requests))
        np.add.at(found, np.array(owners, dtype=np.int64), [nats for nats, _ in self._loglikelihood_tokens(windows)])
        return found.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers as the task says, greedy ones if it says nothing."""
        asked = [(text, self._drawing(options)) for text, options in (request.args for request in requests)]
        found = [""] * len(asked)
        for drawing in dict.fromkeys(one for _, one in asked):
            places = [number for number, (_, own) in enumerate(asked) if own == drawing]
            room = self._context - drawing.spec.max_new_tokens
            prompts = [self.tok_encode(asked[number][0])[-room:] for number in places]
            for number, completion in zip(places, self._policy.sample(prompts, drawing.spec), strict=True):
                text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                for stop in filter(None, drawing.until):
                    text = text.split(stop)[0]
                found[number] = text
        return found

    def _drawing(self, options: dict[str, Any]) -> Drawing:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, ANSWER))
        until = handle_stop_sequences(kwargs.get("until"), eos=self.tokenizer.decode(self.eot_token_id))
        longest = min(int(kwargs["max_gen_toks"]), self._context - 1)
        top_p, top_k = float(kwargs.get("top_p") or 1.0), int(kwargs.get("top_k") or 0)
        spec = SampleSpec(longest, float(kwargs.get("temperature") or 0.0), top_p, top_k, seed=self._seed)
        return Drawing(tuple(until), spec)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihood (nats) of each request's last tokens, and whether each was the most probable one."""
        policy = self._policy
        texts = [[*before, *asked][-self._context - 1 :] for _, before, asked in requests]
        asked_N = [len(asked) for _, _, asked in requests]
        examples = ExampleList([_example(ids, count) for ids, count in zip(texts, asked_N, strict=True)])
        nats_N, missed_N = np.zeros(len(requests)), np.zeros(len(requests))
        policy.eval()
        for batch in batches(examples, TOKENS, packed=policy.packed, pad_id=policy.tokens.pad):
            placed = place(_ended(batch, texts, asked_N), policy.device)
            scores = policy.score(placed, Want(reduce=_told(placed)))
            assert scores.reduced_UK is not None
            own_U = np.array(batch.examples)[placed.example_U.cpu().numpy()]
            logprob_U, greedy_U = scores.reduced_UK.double().cpu().numpy().T
            np.add.at(nats_N, own_U, logprob_U)
            np.add.at(missed_N, own_U, 1 - greedy_U)
        return [(float(nats), missed == 0) for nats, missed in zip(nats_N, missed_N, strict=True)]


def _example(ids: list[int], asked: int) -> Example:
    """A text without its last token, which is only foretold; the last `asked` of all are to be."""
    weights = np.zeros(len(ids), np.float32)
    weights[max(1, len(ids) - asked) :] = 1
    return Example((Piece(np.array(ids[:-1], np.int32), weights[:-1]),))


def _ended(batch: Batch, texts: Sequence[list[int]], asked_N: Sequence[int]) -> Batch:
    """The batch in which the last position of each segment foretells the last token of its text."""
    target_BT, weight_BT = batch.target_BT.clone(), batch.weight_BT.clone()
    for segment in batch.segments:
        number = batch.examples[segment.example]
        target_BT[segment.row, segment.stop - 1] = texts[number][-1]
        weight_BT[segment.row, segment.stop - 1] = float(asked_N[number] > 0)
    unit_U = weight_BT.flatten().nonzero()[:, 0]
    example_S = torch.tensor([segment.example for segment in batch.segments])
    example_U = example_S[batch.streams["input"].segment_ids_BT.flatten()[unit_U]]
    return replace(batch, target_BT=target_BT, weight_BT=weight_BT, unit_U=unit_U, example_U=example_U)


def _told(batch: Batch) -> Callable[[Tensor, slice], Tensor]:
    """The log-probability of each unit's token, and whether no other is more probable: [R, 2]."""
    target_U = batch.target_BT.flatten()[batch.unit_U]

    def reduce(logits_RV: Tensor, span: slice) -> Tensor:
        target_R = target_U[span]
        logprob_R = logits_RV.log_softmax(-1).gather(1, target_R[:, None])[:, 0]
        return torch.stack([logprob_R, (logits_RV.argmax(-1) == target_R).float()], dim=1)

    return reduce
