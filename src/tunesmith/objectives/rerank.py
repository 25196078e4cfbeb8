"""Re-ranking: a query and a passage read in one piece, which of the passages found by the base's vectors come first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.grouped_softmax import grouped_logprobs
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import PooledOptions, head_outputs, read_all
from tunesmith.objectives.retrieve import NEGATIVE, POSITIVE, QUERY, Retrieve, ranked
from tunesmith.recipe_keys import Positive
from tunesmith.types import Batch, Example, Part, Piece, Prediction, Row, SampleSpec, Step, Terms

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer
    from tunesmith.data.corpus import Corpus

WRONG = 7  # passages beside the right one, as in Gao et al.
DEPTH = 50
CHUNK = 64  # queries whose pairs are in memory at once


@OBJECTIVES.register("rerank")
class Rerank:
    """loss = - sum_i mean_p log(e^s_ip / (e^s_ip + sum_n e^s_in)) / N, s = head(pooled(query with passage)).

    The cross-encoder of Nogueira and Cho 2019 (arXiv 1901.04085). p are the passages that answer query i, n wrong ones
    drawn from the first that the base's vectors find, which it will have to tell apart: localized contrastive
    estimation (Gao et al. 2021, arXiv 2101.08751).
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="put the passages that the base's vectors find into a better order, each read beside the query",
        head="pooled",
        formats=frozenset({"retrieval"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("mrr", "recall_at_10", "ndcg_at_10"),
        baseline="vectors",
        vectors="texts",
        searches=True,
        asks=(("query",),),
        negatives=WRONG,
        rereads=DEPTH,
    )

    class Options(PooledOptions):
        """Which passages are read beside a query, in training and to answer, and how the base finds them."""

        negatives: Annotated[int, Field(ge=0, le=64)] = Field(
            WRONG,
            description="wrong passages that each row is given, drawn from the first `depth` that the base finds; "
            "with 0 each row needs `negatives` of its own",
        )
        depth: Positive = Field(
            DEPTH, description="passages, of those that the base finds, that are read beside the query to answer it"
        )
        query_prefix: str = Field(
            "", description="text before each query where the base makes it a vector", examples=["query: "]
        )
        passage_prefix: str = Field("", description="likewise before each passage", examples=["passage: "])

        @model_validator(mode="after")
        def _enough(self) -> Rerank.Options:
            if "negatives" in self.model_fields_set and self.negatives > self.depth:
                raise ValueError(
                    f"negatives are drawn from the first {self.depth} passages, and {self.negatives} are asked"
                )
            return self

    def __init__(self, options: Any) -> None:
        self.options = options
        prefixes = {name: getattr(options, name) for name in ("query_prefix", "passage_prefix")}
        self._first = Retrieve(Retrieve.Options.model_validate(prefixes))

    @property
    def mines(self) -> int:
        return int(self.options.negatives)

    def search_in(self, corpus: Corpus) -> None:
        self._first.search_in(corpus)

    def fit(self, rows: Iterable[Row]) -> None:
        """Nothing; raises InputError for a row without a wrong passage where none is added."""
        for row in rows if not self.mines else ():
            if not self._first.texts(row, "negative"):
                raise InputError(
                    f"{row.where}: this row has no wrong passage, and objective.negatives is 0",
                    "give the row `negatives`, or set objective.negatives to how many are added",
                )

    def describe(self) -> dict[str, Any]:
        return {}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """Nothing: see `fit`."""

    def heads(self) -> list[HeadSpec]:
        return [HeadSpec("rank", 1, hidden=self.options.hidden or 0)]

    def example(self, row: Row, renderer: Renderer) -> Example:
        """The query with each passage that answers it, and with each that is known not to."""
        texts = [(POSITIVE, text) for text in self._first.texts(row, "positive")]
        texts += [(NEGATIVE, text) for text in self._first.texts(row, "negative")]
        found = [_read(row, text, role, renderer) for role, text in texts]
        return Example(tuple(piece for piece, _ in found), cut=sum(cut for _, cut in found))

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"contrastive": float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        place, sizes, counts = _groups(batch)
        place_U, sizes_G, count_N = (torch.tensor(numbers, device=policy.device) for numbers in (place, sizes, counts))
        logprob_U = grouped_logprobs(head_outputs(policy, "rank", batch)[place_U], sizes_G)[:, 0]
        right_G = logprob_U[sizes_G.cumsum(0) - sizes_G]
        loss_N = -torch.segment_reduce(right_G, "mean", lengths=count_N)
        first_G = (right_G >= torch.segment_reduce(logprob_U, "max", lengths=sizes_G)).detach().float()
        hits = float(torch.segment_reduce(first_G, "max", lengths=count_N).sum())
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({"contrastive": part}, {"accuracy": (hits, float(len(loss_N)))})

    def mine(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> NDArray[np.int32]:
        """[N, K] positions among the passages: of each query's first `depth` wrong ones some, drawn by its text."""
        place = {text: at for at, text in enumerate(self._first.passages(rows))}
        known: dict[str, set[int]] = {}
        for row in rows:
            own = [*self._first.texts(row, "positive"), *self._first.texts(row, "negative")]
            known.setdefault(row.value["query"], set()).update(place[text] for text in own)
        mined_NK = np.full((len(rows), self.mines), -1, dtype=np.int32)
        for at, (row, order_P) in enumerate(zip(rows, self._orders(policy, rows, renderer), strict=True)):
            wrong = [p for p in order_P.tolist() if p not in known[row.value["query"]]][: self.options.depth]
            digest = hashlib.blake2b(row.value["query"].encode(), digest_size=8).digest()
            drawn = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(wrong))[: self.mines]
            mined_NK[at, : len(drawn)] = [wrong[i] for i in sorted(drawn.tolist())]
        return mined_NK

    def added(self, mined_NK: NDArray[np.int32], rows: Sequence[Row], renderer: Renderer) -> list[tuple[Piece, ...]]:
        texts = list(self._first.passages(rows))
        return [
            tuple(_read(row, texts[at], NEGATIVE, renderer)[0] for at in own if at >= 0)
            for row, own in zip(rows, mined_NK.tolist(), strict=True)
        ]

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The best passage of each query: its id, or its text where it has none, with its score.

        The first `depth` passages by the base's vectors are read beside the query; the others stand behind them, in
        the order that the base has them in.
        """
        passages = self._first.passages(rows)
        texts, names = list(passages), list(passages.values())
        place = {text: at for at, text in enumerate(texts)}
        orders = self._orders(policy, rows, renderer)
        found: list[Prediction] = []
        for start in range(0, len(rows), CHUNK):
            chunk = range(start, min(start + CHUNK, len(rows)))
            pairs = [(i, int(p)) for i in chunk for p in orders[i][: self.options.depth]]
            examples = [Example((_read(rows[i], texts[p], POSITIVE, renderer)[0],)) for i, p in pairs]
            scores = iter(read_all(policy, "rank", examples, spec))
            for i in chunk:
                order_P, count = orders[i], min(self.options.depth, len(texts))
                read = np.array([float(next(scores)) for _ in range(count)])
                score_P = np.empty(len(texts))
                score_P[order_P[:count]] = read
                score_P[order_P[count:]] = read.min() - 1.0 - np.arange(len(texts) - count)
                answers = [place[text] for text in self._first.texts(rows[i], "positive")]
                found.append(ranked(rows[i], names, answers, score_P, 1.0))
        return found

    def ground(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> None:
        """Nothing: no head begins from the base's order."""

    def untuned(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The order of the passages by the base's vectors."""
        return self._first.predict(policy, rows, renderer, spec)

    def _orders(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> list[NDArray[np.int64]]:
        """For each query the passages' positions, nearest first, by the vectors of the base."""
        texts, spec = list(self._first.passages(rows)), SampleSpec(1)
        with policy.as_base():
            passage_PD = self._first.vectors(policy, POSITIVE, texts, renderer, spec)
            query_QD = self._first.vectors(policy, QUERY, [row.value["query"] for row in rows], renderer, spec)
        return [np.argsort(-(passage_PD @ query_D), kind="stable") for query_D in query_QD]


def _groups(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """Each right passage with all wrong ones of its row behind it: segments by position, their number in each group.

    Last, how many groups each example has.
    """
    right: list[list[int]] = [[] for _ in batch.examples]
    wrong: list[list[int]] = [[] for _ in batch.examples]
    for at, segment in enumerate(batch.segments):
        (right if segment.role == POSITIVE else wrong)[segment.example].append(at)
    groups = [[at, *others] for own, others in zip(right, wrong, strict=True) for at in own]
    return [at for group in groups for at in group], [len(group) for group in groups], [len(own) for own in right]


def _read(row: Row, passage: str, role: str, renderer: Renderer) -> tuple[Piece, int]:
    """The query with a passage, and how many tokens were cut."""
    encoded = renderer.pair(row.value["query"], passage)
    return Piece(encoded.input_ids, role=role, typed_from=encoded.typed_from), encoded.cut
