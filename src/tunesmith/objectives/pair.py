"""Two texts compared: whether they mean the same, or how alike they are, by their vectors or read as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tunesmith.declared import HeadSpec, ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.imbalance import Imbalance
from tunesmith.objectives.pooled import PooledOptions, read_each
from tunesmith.objectives.regress import Regress
from tunesmith.types import Batch, Example, LabelCounts, Part, Piece, Prediction, Row, SampleSpec, Step, Terms, Want

if TYPE_CHECKING:
    from tunesmith.data.chat import Renderer

FloatArray = NDArray[np.float64]
JUDGE, COSINE = "pair", "cosine"  # the heads: the one that is trained, and the base's cosine as it was fitted
TEXTS = ("text_a", "text_b")


@OBJECTIVES.register("pair")
class Pair:
    """loss = sum_i l(head(z_i), y_i) / N: cross-entropy of labels, or squared error of standardised scores.

    z is the cosine of both vectors u and v, or (u, v, |u - v|, u * v) (Reimers and Gurevych 2019, arXiv 1908.10084,
    section 3, and Conneau et al. 2017, arXiv 1705.02364, section 3.1), or one vector of both texts in one piece. A head
    of the cosine begins as it fits the base's vectors. Weights, focus and smoothing of labels are those of `classify`.
    """

    needs: ClassVar[ObjectiveNeeds] = ObjectiveNeeds(
        summary="tell whether two texts mean the same, or how alike they are",
        head="pooled",
        formats=frozenset({"pair"}),
        kinds=frozenset({"encoder", "decoder"}),
        coupling="example",
        metrics=("accuracy", "roc_auc", "ece", "loss", "pearson", "spearman"),
        baseline=COSINE,
        vectors="pair",
        asks=(TEXTS,),
    )

    class Options(PooledOptions, Imbalance):
        """How two texts become what the head reads, and how much each label counts."""

        encode: Literal["apart", "together"] = Field(
            "apart", description="each text by itself, or both in one piece, which sees more and costs a pass a pair"
        )
        compare: Literal["cosine", "vectors"] | None = Field(
            None,
            description="what the head reads of texts apart: their cosine (the default), or both vectors with their "
            "difference and product",
        )

    def __init__(self, options: Any) -> None:
        self.options = options
        self._of: Classify | Regress = _classify(options)

    def fit(self, rows: Iterable[Row]) -> None:
        """The labels, or the mean and deviation of the scores."""
        if self.options.compare is not None and not self._apart:
            raise InputError(
                "objective.compare does nothing where both texts are one piece", "leave it out, or encode them apart"
            )
        held = list(rows)
        if "score" in held[0].value and isinstance(self._of, Classify):
            self._of = _regress()
        if isinstance(self._of, Regress) and (given := self.options.model_fields_set & set(Imbalance.model_fields)):
            raise InputError(
                f"objective.{min(given)} is about labels, and the training rows have scores", "leave it out"
            )
        self._of.fit(held)

    def describe(self) -> dict[str, Any]:
        return self._of.describe()

    def adopt(self, description: Mapping[str, Any]) -> None:
        self._of = _classify(self.options) if "labels" in description else _regress()
        self._of.adopt(description)

    def heads(self) -> list[HeadSpec]:
        labels = tuple(self._of.labels) if isinstance(self._of, Classify) else ()
        outputs, hidden = len(labels) or 1, self.options.hidden or 0
        return [
            HeadSpec(JUDGE, outputs, labels, hidden, vectors=self._vectors),
            HeadSpec(COSINE, outputs, labels, vectors=0, fitted=True),
        ]

    def example(self, row: Row, renderer: Renderer) -> Example:
        columns = self._of.answers.columns(row)
        if self._apart:
            return _apart(row, renderer, columns)
        encoded = renderer.pair(*(row.value[name] for name in TEXTS))
        return Example((Piece(encoded.input_ids, typed_from=encoded.typed_from),), columns, encoded.cut)

    def normalisers(self, step: Step) -> dict[str, float]:
        return {self._of.answers.loss: float(step.examples)}

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        answers = self._of.answers
        loss_N, metrics = answers.losses(policy.heads[JUDGE](self._read(policy, batch)), batch.columns)
        part = Part(loss_N, torch.ones_like(loss_N), torch.arange(len(loss_N), device=loss_N.device))
        return Terms({answers.loss: part}, metrics)

    def predict(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """The label or number of each row, with the probabilities of labels."""
        examples = [self.example(row, renderer) for row in rows]
        return self._answered(policy, JUDGE, self._read, rows, examples, spec)

    def unread(self, rows: Sequence[Row], label_counts: LabelCounts | None) -> list[Prediction] | None:
        """The most frequent label, or the mean: answers such as will be given, before there is a model."""
        if isinstance(self._of, Classify):
            label_counts = label_counts or LabelCounts(dict.fromkeys(self._of.labels, 1), len(self._of.labels))
        return self._of.unread(rows, label_counts)

    def ground(self, policy: Policy, rows: Sequence[Row], renderer: Renderer) -> None:
        """Fits the base's cosine to the rows; a linear head of the cosine begins there, another standardised."""
        spec = SampleSpec(1)
        found = read_each(policy, _cosine, [_apart(row, renderer, self._of.answers.columns(row)) for row in rows], spec)
        cosine_N1 = torch.stack(found)
        judge, cosine = (policy.heads[name] for name in (JUDGE, COSINE))
        assert isinstance(judge, Head)
        assert isinstance(cosine, Head)
        cosine.standardise(cosine_N1)
        standard_N = ((cosine_N1 - cosine.mean_D.cpu()) / cosine.scale_D.cpu())[:, 0].double().numpy()
        weight_V, bias_V = self._fitted(standard_N, rows)
        with torch.no_grad():
            cosine.linear.weight.copy_(torch.from_numpy(weight_V)[:, None])
            cosine.linear.bias.copy_(torch.from_numpy(bias_V))
        if self._vectors == 0:
            judge.standardise(cosine_N1)
            if judge.hidden is None:
                judge.linear.load_state_dict(cosine.linear.state_dict())
        else:
            examples = [self.example(row, renderer) for row in rows]
            judge.standardise(torch.stack(read_each(policy, self._read, examples, spec)))

    def untuned(self, policy: Policy, rows: Sequence[Row], renderer: Renderer, spec: SampleSpec) -> list[Prediction]:
        """What the cosine of the base's vectors says, as it was fitted to the training rows."""
        examples = [_apart(row, renderer, {}) for row in rows]
        return self._answered(policy, COSINE, _cosine, rows, examples, spec)

    @property
    def _apart(self) -> bool:
        return self.options.encode == "apart"

    @property
    def _vectors(self) -> int:
        """Of how many vectors what the head reads is made; 0 where it is a cosine."""
        return 1 if not self._apart else 4 if self.options.compare == "vectors" else 0

    def _read(self, policy: Policy, batch: Batch) -> Tensor:
        """What the head reads of each example: [N, 1], [N, 4 D] or [N, D]."""
        return (_one, _cosine, _vectors)[0 if not self._apart else 2 if self._vectors else 1](policy, batch)

    def _answered(
        self,
        policy: Policy,
        head: str,
        read: Callable[[Policy, Batch], Tensor],
        rows: Sequence[Row],
        examples: Sequence[Example],
        spec: SampleSpec,
    ) -> list[Prediction]:
        outputs = read_each(policy, lambda policy, batch: policy.heads[head](read(policy, batch)), examples, spec)
        answers = self._of.answers
        return [answers.prediction(row, output_V) for row, output_V in zip(rows, outputs, strict=True)]

    def _fitted(self, standard_N: FloatArray, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Weights and biases [V] of what the rows expect on a number of each."""
        if isinstance(self._of, Classify):
            place = {label: at for at, label in enumerate(self._of.labels)}
            return logistic(standard_N, np.array([place[row.value["label"]] for row in rows]), len(place))
        score_N = np.array([self._of.answers.columns(row)["score"] for row in rows])
        weight = float((standard_N * score_N).sum() / max((standard_N**2).sum(), 1e-12))
        return np.array([weight]), np.array([score_N.mean()])


def logistic(number_N: FloatArray, class_N: NDArray[np.int64], classes: int) -> tuple[FloatArray, FloatArray]:
    """Weights and biases [V] of the softmax of one number that fit its classes best.

    Of two classes, the biases then are those that part them where most of these rows are on their side.
    """
    number, wanted = torch.from_numpy(number_N)[:, None], torch.from_numpy(class_N)
    weight, bias = (torch.zeros(classes, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # A little ridge: of classes that a number tells apart without error, the weight has no end.
        found = F.cross_entropy(number * weight + bias, wanted) + 1e-3 * (weight**2).sum()
        (weight.grad, bias.grad) = torch.autograd.grad(found, (weight, bias))
        return found

    optimizer.step(loss)
    weight_V, bias_V = weight.detach().numpy().copy(), bias.detach().numpy().copy()
    slope = weight_V[-1] - weight_V[0]
    if classes == 2 and slope:
        shift = slope * _threshold(number_N, (class_N == 1) if slope > 0 else (class_N == 0))
        bias_V = np.array([shift, -shift]) / 2
    return weight_V, bias_V


def _classify(options: Imbalance) -> Classify:
    return Classify(Classify.Options.model_validate(options.model_dump(include=set(Imbalance.model_fields))))


def _regress() -> Regress:
    return Regress(Regress.Options.model_validate({}))


def _threshold(number_N: FloatArray, above_N: NDArray[np.bool_]) -> float:
    """Of all halves between two numbers the one that leaves most rows on their side; of equals the middle one."""
    ordered = np.unique(number_N)
    edges = np.concatenate([[ordered[0] - 1], (ordered[1:] + ordered[:-1]) / 2, [ordered[-1] + 1]])
    right = np.array([np.count_nonzero((number_N > edge) == above_N) for edge in edges])
    best = np.flatnonzero(right == right.max())
    return float(edges[best[len(best) // 2]])


def _apart(row: Row, renderer: Renderer, columns: Mapping[str, float | int]) -> Example:
    found = [renderer.text(row.value[name]) for name in TEXTS]
    pieces = tuple(Piece(encoded.input_ids, role=name) for name, encoded in zip(TEXTS, found, strict=True))
    return Example(pieces, columns, sum(encoded.cut for encoded in found))


def _one(policy: Policy, batch: Batch) -> Tensor:
    """[S, D]"""
    pooled_SD = policy.score(batch, Want(pooled=True)).pooled_SD
    assert pooled_SD is not None
    return pooled_SD


def _cosine(policy: Policy, batch: Batch) -> Tensor:
    """[N, 1]"""
    u_ND, v_ND = _both(policy, batch)
    return F.cosine_similarity(u_ND, v_ND, dim=-1)[:, None]


def _vectors(policy: Policy, batch: Batch) -> Tensor:
    """[N, 4 D]"""
    u_ND, v_ND = _both(policy, batch)
    return torch.cat([u_ND, v_ND, (u_ND - v_ND).abs(), u_ND * v_ND], dim=-1)


def _both(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """The vectors of the first and of the second texts."""
    pooled_SD = _one(policy, batch).float()
    return pooled_SD[0::2], pooled_SD[1::2]
