"""How much there is to run: the tokens of the longest example, and those of an epoch."""

from __future__ import annotations

from tunesmith import settings
from tunesmith.data.prepare import Prepared
from tunesmith.facts import Facts
from tunesmith.protocols import Mines, Objective


def longest(facts: Facts, prepared: Prepared, objective: Objective, window: int) -> int:
    """Tokens of the longest example, or of a window where examples come in windows."""
    held = [prepared.validation] if prepared.validation is not None else []
    found = max(int(s.lengths.max(initial=1)) for s in [prepared.train, *held, *prepared.tests.values()])
    return min(found, window) if objective.needs.windows else found * _times(facts, prepared, objective)


def longest_answer(prepared: Prepared) -> int:
    return int(prepared.train.trained.max(initial=0))


def epoch(facts: Facts, prepared: Prepared, objective: Objective) -> settings.Epoch:
    repeats, store = prepared.repeats, prepared.train
    once = facts.shares_beginnings or facts.method.feeds_attention  # a micro-batch has its virtual tokens once
    virtual = 0 if once else facts.method.virtual_tokens
    times = _times(facts, prepared, objective)
    tokens, trained = ((count * repeats).sum() for count in (times * store.lengths, store.trained))
    return settings.Epoch(float(repeats.sum()), int(tokens), int(trained), virtual)


def _times(facts: Facts, prepared: Prepared, objective: Objective) -> int:
    """How much longer examples come to be than they are stored.

    Each piece that is added is about as long as all before it. A beginning that each of several pieces has before it
    is at most as often there as there are pieces.
    """
    if objective.needs.branches and not facts.runs_beginnings_once:
        return int(prepared.train.pieces.max(initial=2)) - 1
    return 1 + (objective.mines if isinstance(objective, Mines) else 0)
