"""Recipe + facts -> Plan, or the conflicts that refuse it: everything decided before weights load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith import beneath, extent, rules, settings, teachers
from tunesmith.beneath import Beneath
from tunesmith.data.balance import balanced
from tunesmith.data.curriculum import easy_first
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.defaults import all_defaults
from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation.preflight import measured
from tunesmith.evaluation.run import metric_names
from tunesmith.facts import Facts, ModelFacts, Previous, gather, gather_model
from tunesmith.methods import METHODS
from tunesmith.models import drawing
from tunesmith.models.cache import cache_dir
from tunesmith.models.fetch import LocalModel, resolve
from tunesmith.models.heads import Head
from tunesmith.models.load import MetaModel, decoder_start, load_tokenizer
from tunesmith.models.policy import Policy, Tokens
from tunesmith.models.saved import CARD, read_card
from tunesmith.models.vocabulary import add_tokens, widen
from tunesmith.objectives import OBJECTIVES
from tunesmith.placing import is_measured, placed
from tunesmith.recipe_file import Origin, check_options
from tunesmith.settings import Default
from tunesmith.teachers import Teacher
from tunesmith.types import WINDOW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tunesmith.data.chat import Renderer
    from tunesmith.engine.precision import Speed
    from tunesmith.protocols import Method, Objective
    from tunesmith.recipe import Recipe

Memory = Mapping[str, Sequence[Mapping[str, Any]]]
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. `hash` covers `meaning`: what the run means, not where it runs."""

    meaning: dict[str, Any]
    placement: settings.Placement
    training: settings.Meaning
    prediction: settings.Prediction
    base: dict[str, Any]
    beneath: list[dict[str, str]]
    teacher: dict[str, str] | None
    audit: dict[str, Any]
    parameters: dict[str, int]
    metrics: list[str]
    defaults: list[Default]
    substitutions: list[str]
    warnings: list[str]
    shown: list[tuple[str, bool]]
    resume: str
    trackers: list[str]

    def __repr__(self) -> str:
        return f"<Plan {self.hash[:12]}: {self.training.total_steps} steps on {self.base['name']}>"

    @property
    def hash(self) -> str:
        text = json.dumps(self.meaning, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it."""
        return {
            "hash": self.hash,
            "meaning": self.meaning,
            "placement": settings.as_json(self.placement),
            "prediction": settings.as_json(self.prediction),
            "base": self.base,
            "beneath": self.beneath,
            "teacher": self.teacher,
            "parameters": self.parameters,
            "metrics": self.metrics,
            "resume": self.resume,
            "trackers": self.trackers,
            "audit": self.audit,
            "defaults": [settings.as_json(default) for default in self.defaults],
            "substitutions": self.substitutions,
            "warnings": self.warnings,
            "shown": [list(piece) for piece in self.shown],
        }


@dataclass(frozen=True, slots=True)
class Assets:
    """What planning made on the way and training needs again."""

    local: LocalModel
    renderer: Renderer
    objective: Objective
    method: Method
    prepared: Prepared
    facts: Facts
    previous: Path | None
    beneath: tuple[Beneath, ...]
    teacher: Teacher | None = None


def make_plan(
    recipe: Recipe,
    base: Path,
    origin: Origin | None = None,
    memory: Memory | None = None,
    progress: Progress | None = None,
    *,
    measures: bool = True,
) -> tuple[Plan, Assets]:
    """Plans `recipe`, whose relative paths start at `base`; what fits where a step `is_measured` is left to `measures`.

    Raises InputError with every conflict of the compatibility rules, before any weight is loaded; RefusedError for data
    that would spoil the run; ResourceError where the run cannot fit.
    """
    from tunesmith.data.chat import Renderer

    origin, tell = origin or Origin(), progress or _silent
    if recipe.place.threads is not None:
        torch.set_num_threads(recipe.place.threads)
    previous, previous_run = _previous(recipe.model, base)
    local = resolve(_base_name(recipe.model, base, previous_run), tell)
    objective, method = _chosen(recipe, origin, previous)
    tokenizer = load_tokenizer(local)
    tokens = Tokens((0,), 0, add_tokens(tokenizer, method.facts.tokens))
    model, meta = _model(local, objective, tokenizer)
    under = _beneath(recipe, base, previous_run)
    teacher = _teacher(recipe, objective, base)
    facts, probed = gather(recipe, method, objective, model, previous, under, local.sha256, teacher)
    substitutions, speed = _judged(facts, probed, tokenizer)
    metric_names(objective.needs.metrics, recipe.evaluate.metrics)  # a typing error is told before data are read
    defaults: list[Default] = []
    length = settings.length_limit(facts, defaults)
    renderer = Renderer(tokenizer, _template(recipe, base), length, decoder_start(local))
    prepared = _prepared(recipe, base, objective, renderer, memory, tell)
    _check_labels(objective, previous)
    trainable, total = _count(meta, facts, method, objective, replace(tokens, encode=renderer.plain))
    lengths, answer = prepared.train.lengths, extent.longest_answer(prepared)
    training = settings.resolve_meaning(facts, length, lengths, prepared.repeats, answer, defaults, prepared.easy_first)
    measures = measures and is_measured(facts, objective)
    placement, prediction = placed(facts, prepared, objective, training, speed, trainable, defaults, measured=measures)
    plan = Plan(
        meaning=_meaning(recipe, facts, method, objective, local, renderer, prepared, training),
        placement=placement,
        training=training,
        prediction=prediction,
        base=_describe_base(local, facts),
        beneath=[{**one.told(), "path": one.path} for one in under],
        teacher=teacher and teacher.told(),
        audit=prepared.audit.to_json(),
        parameters={"trainable": trainable, "total": total + beneath.elements(under)},
        metrics=measured(recipe, objective, prepared),
        defaults=all_defaults(recipe, origin, defaults, method),
        substitutions=substitutions,
        warnings=_warnings(recipe, prepared),
        shown=_shown(prepared, renderer),
        resume="exact" if placement.device == "cpu" else "same data",
        trackers=list(dict.fromkeys(recipe.report_to)),
    )
    return plan, Assets(local, renderer, objective, method, prepared, facts, previous_run, under, teacher)


def _prepared(
    recipe: Recipe, base: Path, objective: Objective, renderer: Renderer, memory: Memory | None, tell: Progress
) -> Prepared:
    found = prepare(
        recipe.data,
        base,
        objective,
        renderer,
        recipe.seed,
        cache_dir(),
        recipe.place.workers,
        memory,
        tell,
        recipe.evaluate.tags,
        recipe.evaluate.choosing_tags,
        recipe.training_tags,
    )
    found = replace(found, easy_first=easy_first(recipe.train.curriculum, found.train))
    if recipe.train.balance is None:
        return found
    repeats, times = balanced(recipe.train.balance, found.train, found.repeats)
    return replace(found, repeats=repeats, times=times)


def _silent(what: str, done: int, of: int | None) -> None:
    pass


def _model(local: LocalModel, objective: Objective, tokenizer: PreTrainedTokenizerFast) -> tuple[ModelFacts, MetaModel]:
    pooling = getattr(objective.options, "pooling", None)
    return gather_model(local, objective.needs, tokenizer.chat_template is not None, pooling)


def _teacher(recipe: Recipe, objective: Objective, base: Path) -> Teacher | None:
    """The recipe's, where the objective has use for one: else a rule refuses it."""
    return teachers.find(recipe.teacher, base) if recipe.teacher and objective.needs.teacher else None


def _judged(facts: Facts, speed: Speed | None, tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], Speed]:
    """The substitutions, and the speed, which is known of a device that is served.

    Raises InputError with every conflict, and for a teacher that reads other tokens.
    """
    conflicts, substitutions = rules.judge(facts)
    if conflicts:
        cause = "\n".join(f"{' x '.join(c.axes)}: {c.reason}" for c in conflicts)
        raise InputError(cause, "; ".join(dict.fromkeys(c.remedy for c in conflicts)))
    if facts.teacher is not None:
        teachers.check_tokens(facts.teacher, tokenizer)
    assert speed is not None
    return substitutions, speed


def _previous(model: str, base: Path) -> tuple[Previous | None, Path | None]:
    """The earlier run that `model` names, if it names one."""
    path = (base / model).resolve()
    if not (path / "manifest.json").is_file():
        return None, None
    if not (path / "model" / CARD).is_file():
        raise InputError(f"{model} is a run that has no model yet", f"finish it with `tunesmith resume {model}`")
    saved = read_card(path / "model")
    return Previous(saved["method"], saved["objective"]), path


def _beneath(recipe: Recipe, base: Path, previous_run: Path | None) -> tuple[Beneath, ...]:
    """Those that the recipe names, or those that the earlier run stands on."""
    if recipe.adapters or previous_run is None:
        return beneath.find(recipe.adapters, base)
    folder = previous_run / "model"
    return tuple(beneath.held(folder, read_card(folder)))


def _base_name(model: str, base: Path, previous_run: Path | None) -> str:
    if previous_run is not None:
        return str(read_card(previous_run / "model")["base"]["name"])
    path = base / model
    return str(path.resolve()) if path.exists() else model


def _chosen(recipe: Recipe, origin: Origin, previous: Previous | None) -> tuple[Objective, Method]:
    objective_class = OBJECTIVES.get(recipe.objective.name, origin.place("objective"))
    method_class = METHODS.get(recipe.method.name, origin.place("method"))
    objective = objective_class(check_options(recipe.objective, objective_class.Options, "objective", origin))
    options = check_options(recipe.method, method_class.Options, "method", origin)
    if previous is not None and not recipe.method.options and previous.method["name"] == recipe.method.name:
        options = method_class.Options.model_validate(previous.method["options"])
    if previous is not None and objective.heads() and previous.objective["name"] == recipe.objective.name:
        objective.adopt(previous.objective["learned"])
    return objective, method_class(options, recipe.train.dropout or 0.0)


def _template(recipe: Recipe, base: Path) -> str | None:
    """The chat template that the recipe gives: a file, or the template itself."""
    if recipe.data.template is None:
        return None
    path = base / recipe.data.template
    if "{" not in recipe.data.template:
        if not path.is_file():
            raise InputError(f"data.template: there is no file {path}", "give a jinja file, or the template itself")
        return path.read_text(encoding="utf-8")
    return recipe.data.template


def _check_labels(objective: Objective, previous: Previous | None) -> None:
    if previous is not None and objective.heads() and objective.describe() != previous.objective["learned"]:
        raise InputError(
            "the labels of the training rows are not those of the earlier run, whose head goes on",
            "train on the same label set, or name the base itself as model",
        )


def _count(meta: MetaModel, facts: Facts, method: Method, objective: Objective, tokens: Tokens) -> tuple[int, int]:
    """Trainable and total parameters, counted on a model of shapes."""
    widen(meta.module, max(tokens.added, default=-1) + 1)
    with torch.device("meta"):
        policy = Policy(meta.module, meta.kind, tokens, packed=facts.packed)
        for spec in objective.heads():
            policy.add_head(Head(spec, facts.model.width))
        method.attach(policy)
    counts = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    trainable = sum(n for n, trains in counts if trains)
    if not trainable:
        raise RefusedError(f"{facts.method_name} leaves nothing to train", "check the method's options")
    return trainable, sum(n for n, _ in counts)


def _meaning(
    recipe: Recipe,
    facts: Facts,
    method: Method,
    objective: Objective,
    local: LocalModel,
    renderer: Renderer,
    prepared: Prepared,
    training: settings.Meaning,
) -> dict[str, Any]:
    """What the plan's hash covers, by name, so that a resume can say what differs."""
    return {
        "base": local.sha256,
        "tokenizer": local.tokenizer_sha256,
        "renderer": renderer.fingerprint,
        "earlier run": recipe.model if facts.previous is not None else None,
        "adapters": [one.sha256 for one in facts.beneath] or None,
        "teacher": facts.teacher.sha256 if facts.teacher else None,
        "objective": [recipe.objective.name, recipe.objective.options, objective.describe()],
        "method": [recipe.method.name, method_options(method)],
        "data": {
            "train": prepared.train.fingerprint,
            "repeats": hashlib.sha256(prepared.repeats.tobytes()).hexdigest(),
            "validation": prepared.validation.fingerprint if prepared.validation is not None else None,
            "test": {name: store.fingerprint for name, store in prepared.tests.items()},
            **({"corpus": prepared.corpus.fingerprint} if prepared.corpus is not None else {}),
        },
        "train": settings.as_json(training),
        "precision": recipe.precision,
        "evaluate": recipe.evaluate.model_dump(mode="json"),
    }


def method_options(method: Method) -> dict[str, Any]:
    """The options that a method was made with, defaults included."""
    return method.options.model_dump(mode="json")


def _describe_base(local: LocalModel, facts: Facts) -> dict[str, Any]:
    return {
        "name": local.name,
        "source": local.source,
        "licence": local.licence,
        "sha256": local.sha256,
        "tokenizer_sha256": local.tokenizer_sha256,
        "kind": facts.model.kind,
        "model_type": facts.model.model_type,
        "parameters": facts.model.parameters,
        "context_length": facts.model.context_length,
    }


def _warnings(recipe: Recipe, prepared: Prepared) -> list[str]:
    found: list[str] = []
    if not prepared.tests and not recipe.data.judged_by_folds:
        judged = (
            "the validation rows, which also chose the checkpoint" if prepared.validation is not None else "nothing"
        )
        found.append(f"there is no test set (data.test): the result is judged on {judged}")
    if prepared.audit.duplicates:
        found.append(f"{prepared.audit.duplicates} rows of train repeat an earlier one")
    asked = recipe.evaluate.decoding
    if asked is not None and len(told := drawing.settings(asked)) == 1:
        found.append(f"evaluate.decoding has one setting ({told[0]}): answers are drawn so, and none are compared")
    if prepared.times:
        most, least = (pick(prepared.times.items(), key=lambda one: one[1]) for pick in (max, min))
        told = (f"{times:.3g} times in an epoch where {name!r} is" for name, times in (most, least))
        found.append(f"train.balance: a row is seen {', and '.join(told)}")
    return found


def _shown(prepared: Prepared, renderer: Renderer) -> list[tuple[str, bool]]:
    """The example of median length, in pieces, with whether each is trained; of windows the first."""
    from tunesmith.data.encoded import Encoded
    from tunesmith.data.store import trained_of

    pieces = prepared.train.example(prepared.audit.shown).pieces
    chosen = pieces[:1] if pieces[0].role == WINDOW else pieces
    return [part for p in chosen for part in renderer.show(Encoded(p.input_ids_T, trained_of(p), 0, 0))]
