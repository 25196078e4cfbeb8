"""What of the facts is refused, and what runs in another way, by the rules of compatibility."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.evaluation.baselines import BASELINES
from tunesmith.facts import Facts
from tunesmith.rule_table import RULES


@dataclass(frozen=True, slots=True)
class Conflict:
    """A rule that refused, with its texts filled in."""

    axes: tuple[str, ...]
    reason: str
    remedy: str


def _as_asked(facts: Facts) -> str:
    """The method, with the options that the recipe gives it."""
    options = ", ".join(f"{key}: {value}" for key, value in facts.recipe.method.options.items())
    return f"{facts.method_name} ({options})" if options else facts.method_name


def judge(facts: Facts) -> tuple[list[Conflict], list[str]]:
    """Conflicts that refuse the run, and substitutions that the plan states."""
    words = {
        "f": facts,
        "method": _as_asked(facts),
        "kinds_of_objective": " or ".join(sorted(facts.needs.kinds)),
        "kinds_of_method": " or ".join(sorted(facts.method.kinds)),
        "heads_of_method": " or ".join(sorted(facts.method.heads)),
        "virtual": f", {facts.method.virtual_tokens} of them virtual" if facts.method.virtual_tokens else "",
        "listed": ", ".join(one.path for one in facts.beneath),
        "stands_on": f"adapters by {' or '.join(sorted(facts.method.stands_on))}" * bool(facts.method.stands_on)
        or "no other adapter",
        "other_base": facts.first_beneath(lambda one: one.base_sha256 != facts.base_sha256),
        "other_method": facts.first_beneath(lambda one: one.method not in facts.method.stands_on),
        "other_head": facts.first_beneath(lambda one: one.head != facts.needs.head),
        "with_tokens": facts.first_beneath(lambda one: bool(one.tokens)),
        "depth": facts.recipe.objective.options.get("depth", facts.needs.rereads),
        "baseline": BASELINES[facts.needs.baseline].shown if facts.needs.baseline else "",
        "missing_trackers": ", ".join(name for name, _ in facts.missing_trackers),
        "missing_packages": " ".join(package for _, package in facts.missing_trackers),
    }
    hit = [rule for rule in RULES if rule.when(facts)]
    conflicts = [
        Conflict(r.axes, r.reason.format(**words), r.remedy.format(**words)) for r in hit if r.substitute is None
    ]
    substitutions = [
        f"{r.reason.format(**words)}: {r.substitute.format(**words)}" for r in hit if r.substitute is not None
    ]
    return conflicts, substitutions
