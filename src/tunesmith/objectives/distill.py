"""Distillation: a student learns what a teacher thinks of every next token, beside the token itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tunesmith.data.kept import Kept
from tunesmith.data.pack import place, split
from tunesmith.data.source import batches
from tunesmith.declared import ObjectiveNeeds
from tunesmith.errors import InputError
from tunesmith.losses.divergence import Kind, coarse, divergence, most_probable, with_rest
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.sft import Learned, Sft, counted
from tunesmith.recipe_keys import Positive
from tunesmith.types import Batch, Part, Terms, Want

if TYPE_CHECKING:
    from tunesmith.data.store import TokenStore


class Held(Learned):
    """How the student is held to its teacher."""

    divergence: Kind = Field(
        "forward_kl",
        description="what is made small: forward_kl covers all that the teacher finds likely, reverse_kl keeps to "
        "what is likeliest, jsd lies between them",
    )
    beta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="the teacher's share in the mixture of jsd; 0.5 by default"
    )
    temperature: Annotated[float, Field(ge=0.1, le=100)] = Field(
        1.0, description="above 1 the teacher's less likely tokens count for more"
    )
    teacher_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="what the teacher counts in the loss; the rows' own answers count the rest"
    )
    top_k: Positive | None = Field(
        None,
        description="keep only so many of the teacher's tokens, which are computed once before training; all of "
        "them, in every step, if left out",
    )
    hidden: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="weight of the angle between the last hidden states of both, which must be equally wide"
    )

    @model_validator(mode="after")
    def _only_of_jsd(self) -> Held:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta is the mixture of jsd, and divergence is {self.divergence}; leave it out")
        return self


@OBJECTIVES.register("distill")
class Distill(Sft):
    """loss = sum_t w_t [share T^2 D(p_t | q_t) - (1 - share) log q_t(x_t) + hidden (1 - cos(h_t, g_t))] / sum_t w_t.

    p and q are teacher's and student's distributions of the next token, both at temperature T in D (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1), which is a divergence of `losses.divergence`; h and g their last hidden states
    (Sanh et al. 2019, arXiv 1910.01108, section 3). With `top_k` the teacher is asked before training, once, and D is
    between its k most probable tokens and all others together.
    """

    needs: ClassVar[ObjectiveNeeds] = replace(
        Sft.needs,
        summary="learn what a larger model, the recipe's `teacher`, thinks of every next token of the answers",
        formats=frozenset({"messages"}),
        teacher=True,
    )

    Options: ClassVar[type[Any]] = Held

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._teacher: Policy | None = None
        self._kept: Kept | None = None

    def learn_from(self, teacher: Policy, student: Policy, examples: TokenStore, tokens: int, cache: Path) -> None:
        """Takes the teacher, and asks it about every training example where its answers are kept.

        `tokens` of examples run at once; `cache` is a folder for what was computed. Raises InputError where hidden
        states are to be compared that are not equally wide.
        """
        if self.options.hidden and teacher.width != student.width:
            raise InputError(
                f"objective.hidden compares hidden states, which are {teacher.width} numbers wide in the teacher and "
                f"{student.width} in the student",
                "leave objective.hidden out, or choose a student of the teacher's width (`tunesmith shrink`)",
            )
        self._teacher = teacher.requires_grad_(False).eval()
        if self.options.top_k is not None:
            asked = [examples.fingerprint, self.options.top_k, self.options.temperature, teacher.packed]
            name = hashlib.sha256(repr(asked).encode()).hexdigest()[:32]
            self._kept = Kept.made(cache / name, lambda: self._ask(teacher, examples, tokens))

    def normalisers(self, step: Any) -> dict[str, float]:
        (total,) = super().normalisers(step).values()
        return dict.fromkeys(self._weights, total)

    def terms(self, policy: Policy, batch: Batch) -> Terms:
        assert self._teacher is not None
        teacher_UE = self._hidden(self._teacher, batch, policy.packed) if self._asks(policy) else None
        kept = self._kept.of(batch) if self._kept is not None and policy.training else None

        def reduce(logits_RV: Tensor, rows: slice) -> Tensor:
            logprob_RV = logits_RV.log_softmax(-1)
            target_R1 = batch.target_BT.flatten()[batch.unit_U[rows], None]
            parts = [-logprob_RV.gather(-1, target_R1)[:, 0]]
            if kept is not None:
                token_RK, teacher_RK = (table[rows].to(logits_RV.device) for table in kept)
                parts.append(self._apart(with_rest(teacher_RK), coarse(self._soft(logits_RV), token_RK)))
            else:
                assert teacher_UE is not None
                parts.append(self._from_teacher(self._logits(teacher_UE[rows]), logits_RV))
            return torch.stack(parts, dim=-1)

        with policy.noisy(self.options.neftune_alpha):
            scores = policy.score(batch, Want(reduce=reduce, hidden=bool(self.options.hidden)))
        assert scores.reduced_UK is not None
        assert scores.weight_U is not None
        assert scores.example_U is not None
        weight_U, example_U = counted(batch) if policy.training else scores.weight_U, scores.example_U
        found = {"nll": scores.reduced_UK[:, 0], "divergence": scores.reduced_UK[:, 1]}
        if scores.hidden_BTD is not None:
            assert teacher_UE is not None
            own_UD = scores.hidden_BTD.flatten(0, 1)[batch.unit_U]
            found["hidden"] = 1 - F.cosine_similarity(own_UD.float(), teacher_UE.float(), dim=-1)
        sums = {name: float((loss_U.detach() * weight_U).sum()) for name, loss_U in found.items()}
        total = float(weight_U.sum())
        parts = {name: Part(weight * found[name], weight_U, example_U) for name, weight in self._weights.items()}
        return Terms(parts, {f"{name}_per_token": (value, total) for name, value in sums.items()})

    @property
    def _weights(self) -> dict[str, float]:
        """The parts of the loss that count, and how much."""
        options = self.options
        weights = {"nll": 1 - options.teacher_share, "divergence": options.teacher_share, "hidden": options.hidden}
        return {name: weight for name, weight in weights.items() if weight}

    def _asks(self, policy: Policy) -> bool:
        """Whether the teacher must run on the batch itself: its answers are kept for training rows alone."""
        return self._kept is None or not policy.training or bool(self.options.hidden)

    def _hidden(self, teacher: Policy, batch: Batch, packed: bool) -> Tensor:
        """The teacher's last hidden states at the units, in their order: [U, E]."""
        if teacher.packed != packed:
            whole = [list(range(len(batch.examples)))]
            (batch,) = split(batch, whole, packed=teacher.packed, pad_id=teacher.tokens.pad)
        placed = place(batch, teacher.device)
        with torch.no_grad():
            hidden_BTE = teacher.score(placed, Want(hidden=True)).hidden_BTD
        assert hidden_BTE is not None
        return hidden_BTE.flatten(0, 1)[placed.unit_U]

    def _logits(self, hidden_RE: Tensor) -> Tensor:
        assert self._teacher is not None
        with torch.no_grad():
            return self._teacher.logits(hidden_RE)

    def _from_teacher(self, teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
        """The divergence over what both vocabularies have: rows that only fill one up to a round number differ."""
        shared = min(teacher_RV.shape[-1], student_RV.shape[-1])
        teacher, student = self._soft(teacher_RV[:, :shared]), self._soft(student_RV[:, :shared])
        if self.options.top_k is not None:
            token_RK, teacher_RK = most_probable(teacher, self.options.top_k)
            return self._apart(with_rest(teacher_RK), coarse(student, token_RK))
        return self._apart(teacher, student)

    def _apart(self, teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
        options = self.options
        return options.temperature**2 * divergence(teacher_RV, student_RV, options.divergence, options.beta or 0.5)

    def _soft(self, logits_RV: Tensor) -> Tensor:
        return (logits_RV / self.options.temperature).log_softmax(-1)

    def _ask(self, teacher: Policy, examples: TokenStore, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The teacher's most probable tokens at the units of every example, and their log-probabilities."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in batches(examples, tokens, packed=teacher.packed, pad_id=teacher.tokens.pad):
            placed = place(batch, teacher.device)
            hidden_UE = self._hidden(teacher, placed, teacher.packed)
            for position, number in enumerate(batch.examples):
                logprob_RV = self._soft(self._logits(hidden_UE[placed.example_U == position]))
                token_RK, value_RK = most_probable(logprob_RV, self.options.top_k)
                found[number] = token_RK.cpu(), value_RK.cpu()
        return (found[number] for number in range(len(examples)))
