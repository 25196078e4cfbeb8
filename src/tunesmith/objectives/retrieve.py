"""Retrieval: queries and passages as vectors of one encoder, near each other where one answers the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.contrastive import info_nce
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.pooled import Pooling, read_each
from tunesmith.recipe_keys import Heat
from tunesmith.types import Batch, Example, Part, Piece, Prediction, Row, SampleSpec, Step, Terms, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Encoded, Renderer
    from tunesmith.data.corpus import Corpus

QUERY, POSITIVE, NEGATIVE = "query", "passage", "negative"
MARGIN = 0.95  # of the right passage's cosine: above it a wrong one may be right
TOP = 10  # the first passages, of `recall_at_10` and `ndcg_at_10`
CHUNK = 256  # queries that are compared with all passages at once


@OBJECTIVES.register("retrieve")
class Retrieve:
    """loss = sum_i mean_p -log(e^s_ip / (e^s_ip + sum_n e^s_in)) / N, s = cos(query, passage) / temperature.

    p are the passages of row i that answer its query, n all other passages of the whole step, negatives that were given
    or mined among them (van den Oord et al. 2018, arXiv 1807.03748). A passage that a row of the same query has as an
    answer is no n, and passages of the same tokens count once.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="find the passages that answer a query, by vectors of both",
        head="pooled",
        formats=frozenset({"retrieval"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="batch",
        modes=frozenset({"plain", "cached"}),
        metrics=("mrr", "recall_at_10", "ndcg_at_10"),
        fresh_head=False,
        searches=True,
        asks=(("query",),),
    )

    class Options(Pooling):
        """How texts become vectors, and how these are told apart."""

        temperature: Heat = Field(
            0.05, description="by which cosines are divided: the smaller, the more the nearest wrong passages count"
        )
        symmetric: bool = Field(
            False, description="also tell each passage's query from the other queries; half of the loss then"
        )
        negatives: Annotated[int, Field(ge=0, le=64)] = Field(
            0,
            description="wrong passages that each row is given beside those of its step: of all that are searched the "
            "nearest to its query, by the vectors of the model before its first step",
        )
        margin: Annotated[float, Field(gt=0, le=2)] | None = Field(
            None,
            description="a passage whose cosine is above this share of the right one's is not taken for wrong, as it "
            "may answer too; 0.95 by default; only with `negatives`",
        )
        query_prefix: str = Field("", description="text before each query, as some bases ask for", examples=["query: "])
        passage_prefix: str = Field("", description="text before each passage", examples=["passage: "])

    def __init__(self, options: Any) -> None:
        self.options = options
        self.corpus: Corpus | None = None

    @property
    def mines(self) -> int:
        return int(self.options.negatives)

    def search_in(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def fit(self, rows: Iterable[Row]) -> None:
        del rows
        if self.options.margin is not None and not self.mines:
            raise InputError(
                "objective.margin does nothing where no negatives are mined", "set objective.negatives, or leave it out"
            )

    def describe(self) -> dict[str, Any]:
        return {}

    def adopt(self, description: Mapping[str, Any]) -> None:
        del description

    def heads(self) -> list[HeadSpec]:
        return []

    def example(self, row: Row, renderer: Renderer) -> Example:
        """The query, the passages that answer it, and those that are known not to."""
        roles = ((QUERY, [row.value["query"]]), (POSITIVE, self.texts(row, "positive")))
        asked = [(role, text) for role, texts in (*roles, (NEGATIVE, self.texts(row, "negative"))) for text in texts]
        found = [(role, self._read(role, text, renderer)) for role, text in asked]
        pieces = tuple(Piece(encoded.input_ids, role=role) for role, encoded in found)
        return Example(pieces, cut=sum(encoded.cut for _, encoded in found))

    def prompts(self) -> dict[str, str]:
        return {"query": self.options.query_prefix, "document": self.options.passage_prefix}

    def normalisers(self, step: Step) -> dict[str, float]:
        return {"contrastive": float(step.examples)}

    def embed(self, policy: Policy, batch: Batch) -> Tensor:
        """[S, D] of length 1: one for each query and passage."""
        pooled_SD = policy.score(batch, Want(pooled=True)).pooled_SD
        assert pooled_SD is not None
        return F.normalize(pooled_SD.float(), dim=-1)

    def couple(self, embeddings_SD: Tensor, step: Step) -> Terms:
        found = _layout(step)
        device = embeddings_SD.device
        own_NM, known_NM = (torch.from_numpy(mask).to(device) for mask in (found.own_NM, found.known_NM))
        query_ND, passage_MD = (embeddings_SD[torch.from_numpy(at).to(device)] for at in (found.query_N, found.place_M))
        alone_N = torch.from_numpy(found.alone_N).to(device) if self.options.symmetric else None
        loss_N = info_nce(query_ND, passage_MD, own_NM, known_NM, self.options.temperature, alone_N)
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=device))
        return Terms({"contrastive": part}, {"batch_mrr": _batch_mrr(query_ND, passage_MD, own_NM, known_NM)})

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        return self.couple(self.embed(policy, batch), Step(0, [batch], {}))

    def mine(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> NDArray[np.int32]:
        """[N, K] positions among the passages: nearest first, none that answers the query in any row.

        Passages above `margin` of the nearest right one's cosine are passed over (Moreira et al. 2024, arXiv
        2407.15831, section 3, TopK-PercPos).
        """
        texts, spec = list(self.passages(rows)), SampleSpec(1)
        place = {text: at for at, text in enumerate(texts)}
        known: dict[str, set[int]] = {}
        own_NA = [[place[text] for text in self.texts(row, "positive")] for row in rows]
        for row, own in zip(rows, own_NA, strict=True):
            known.setdefault(row.value["query"], set()).update(own)
        passage_PD = self.vectors(policy, POSITIVE, texts, renderer, spec)
        query_QD = self.vectors(policy, QUERY, [row.value["query"] for row in rows], renderer, spec)
        mined_NK = np.full((len(rows), self.mines), -1, dtype=np.int32)
        for at, (row, own) in enumerate(zip(rows, own_NA, strict=True)):
            cosine_P = passage_PD @ query_QD[at]
            limit = float(cosine_P[own].max()) * (MARGIN if self.options.margin is None else self.options.margin)
            cosine_P[list(known[row.value["query"]])] = -np.inf
            cosine_P[cosine_P > limit] = -np.inf
            nearest = np.argsort(-cosine_P, kind="stable")[: self.mines]
            nearest = nearest[np.isfinite(cosine_P[nearest])]
            mined_NK[at, : len(nearest)] = nearest
        return mined_NK

    def added(self, mined_NK: NDArray[np.int32], rows: Sequence[Row], renderer: Renderer) -> list[tuple[Piece, ...]]:
        texts = list(self.passages(rows))
        wanted = np.unique(mined_NK[mined_NK >= 0]).tolist()
        pieces = {at: Piece(self._read(POSITIVE, texts[at], renderer).input_ids, role=NEGATIVE) for at in wanted}
        return [tuple(pieces[at] for at in own if at >= 0) for own in mined_NK.tolist()]

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The nearest passage of each query: its id, or its text where it has none, with how near it is.

        Searched are the corpus, if there is one, and the passages of the rows; each different text is one passage.
        """
        passages = self.passages(rows)
        place = {text: at for at, text in enumerate(passages)}
        passage_PD = self.vectors(policy, POSITIVE, list(passages), renderer, spec)
        query_QD = self.vectors(policy, QUERY, [row.value["query"] for row in rows], renderer, spec)
        names = list(passages.values())
        found: list[Prediction] = []
        for start in range(0, len(rows), CHUNK):
            cosine_CP = query_QD[start : start + CHUNK] @ passage_PD.T
            for row, cosine_P in zip(rows[start : start + CHUNK], cosine_CP, strict=True):
                answers = [place[text] for text in self.texts(row, "positive")]
                found.append(ranked(row, names, answers, cosine_P, self.options.temperature))
        return found

    def passages(self, rows: Sequence[Row]) -> dict[str, str]:
        """All that is searched: each text with what it is called."""
        found: dict[str, str] = {}
        for name, text in self.corpus.passages() if self.corpus is not None else ():
            found.setdefault(text, name)
        for row in rows:
            for text in (*self.texts(row, "positive"), *self.texts(row, "negative")):
                found.setdefault(text, text)
        if not found:
            raise InputError(
                f"{rows[0].where}: there is no passage to be found: neither a corpus nor the rows have one",
                "give the passages as a file with --corpus FILE",
            )
        return found

    def texts(self, row: Row, what: str) -> list[str]:
        """The row's passages, which it has itself or names by the ids of a corpus."""
        names: Sequence[str] = row.value.get(f"{what}_ids", ())
        if names and self.corpus is None:
            raise InputError(
                f"{row.where}: passages are named by ids, such as {names[0]!r}, and there is no corpus",
                "set data.corpus to the file that has them (of a model's folder, give it with --corpus FILE)",
            )
        own = [self.corpus.text(name) for name in names] if self.corpus is not None else []
        return list(dict.fromkeys([*own, *row.value.get(f"{what}s", ())]))

    def vectors(
        self, policy: Policy, role: str, texts: Sequence[str], renderer: Renderer, spec: SampleSpec
    ) -> NDArray[np.float32]:
        """[N, D] of length 1, of texts of one role."""
        examples = [Example((Piece(self._read(role, text, renderer).input_ids, role=role),)) for text in texts]
        return torch.stack(read_each(policy, self.embed, examples, spec)).numpy()

    def _read(self, role: str, text: str, renderer: Renderer) -> Encoded:
        prefix = self.options.query_prefix if role == QUERY else self.options.passage_prefix
        return renderer.text(prefix + text)


def ranked(
    row: Row, names: Sequence[str], answers: Sequence[int], score_P: NDArray[np.floating[Any]], temperature: float
) -> Prediction:
    """The passage of the highest score, and where those stand that answer, whose positions are `answers`.

    Equal scores count against them. The nll is that of the softmax of scores / temperature.
    """
    best = int(score_P.argmax())
    scores = {"score": float(score_P[best]), "candidates": float(len(names))}
    if not answers:
        return Prediction(names[best], None, row.where, scores)
    others_P = np.delete(score_P, answers)
    own_A = np.sort(score_P[list(answers)])[::-1]
    rank_A = np.array([np.count_nonzero(others_P >= own) for own in own_A]) + np.arange(1, len(own_A) + 1)
    score_A, other_P = (score.astype(np.float64) / temperature for score in (own_A, others_P))
    against = np.logaddexp.reduce(other_P) if len(other_P) else -np.inf
    nll = float(np.logaddexp(0.0, against - score_A).mean())
    found = {"rank": float(rank_A[0]), "recall_at_10": float((rank_A <= TOP).mean()), "ndcg_at_10": ndcg(rank_A)}
    scores |= {**found, "nll": nll, "tokens": 1.0}
    return Prediction(names[best], "\n".join(names[answer] for answer in answers), row.where, scores)


def ndcg(rank_A: NDArray[np.int64]) -> float:
    """Discounted gain of ranks among the first TOP, by that of the best ranks that so many can have.

    Each counts the same: Järvelin and Kekäläinen 2002, with the discount 1 / log2(1 + rank).
    """
    best_A = np.arange(1, len(rank_A) + 1)
    gain, most = (float((1 / np.log2(1 + ranks[ranks <= TOP])).sum()) for ranks in (rank_A, best_A))
    return gain / most


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which of a step's vectors are queries, and which passages; of passages of the same tokens only the first.

    `own_NM`, `known_NM`, `alone_N`: as in `losses.contrastive`.
    """

    query_N: NDArray[np.int64]
    place_M: NDArray[np.int64]
    own_NM: NDArray[np.bool_]
    known_NM: NDArray[np.bool_]
    alone_N: NDArray[np.bool_]


def _layout(step: Step) -> _Layout:
    query_N = np.zeros(step.examples, dtype=np.int64)
    asked: dict[bytes, list[int]] = {}  # the examples of each query
    passages: dict[bytes, int] = {}
    places: list[int] = []
    own: list[tuple[int, int]] = []
    first = at = 0
    for batch in step.batches:
        ids_BT = batch.streams["input"].input_ids_BT.cpu().numpy()
        for segment in batch.segments:
            number, key = first + segment.example, ids_BT[segment.row, segment.start : segment.stop].tobytes()
            if segment.role == QUERY:
                query_N[number] = at
                asked.setdefault(key, []).append(number)
            else:
                if key not in passages:
                    passages[key] = len(passages)
                    places.append(at)
                if segment.role == POSITIVE:
                    own.append((number, passages[key]))
            at += 1
        first += len(batch.examples)
    own_NM = np.zeros((len(query_N), len(places)), dtype=np.bool_)
    own_NM[tuple(np.array(own).T)] = True
    known_NM, alone_N = own_NM.copy(), np.ones(len(query_N), dtype=np.bool_)
    for numbers in asked.values():
        known_NM[numbers] = own_NM[numbers].any(0)
        alone_N[numbers[1:]] = False
    return _Layout(query_N, np.array(places, dtype=np.int64), own_NM, known_NM, alone_N)


@torch.no_grad()
def _batch_mrr(query_ND: Tensor, passage_MD: Tensor, own_NM: Tensor, known_NM: Tensor) -> tuple[float, float]:
    """Reciprocal ranks of each query's nearest own passage among those of the step: their sum and number."""
    cosine_NM = query_ND @ passage_MD.T
    best_N1 = cosine_NM.masked_fill(~own_NM, -2.0).max(1, keepdim=True).values
    rank_N = 1 + ((cosine_NM >= best_N1) & ~known_NM).sum(1)
    return float((1.0 / rank_N).sum()), float(len(rank_N))
