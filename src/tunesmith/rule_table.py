"""Which facts exclude each other, why, and what to do about it: compatibility as rows of data.

A rule that refuses ends the run before weights load. A rule with `substitute` lets it run in
another way, which the plan states. `{...}` in a text is filled from the facts (`rules.judge`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.facts import Facts
from tunesmith.kernels import fp8_linear
from tunesmith.recipe import BY_LABEL


@dataclass(frozen=True, slots=True)
class Rule:
    """`axes` collide when `when` holds of the facts."""

    axes: tuple[str, ...]
    when: Callable[[Facts], bool]
    reason: str
    remedy: str
    substitute: str | None = None


RULES: tuple[Rule, ...] = (
    Rule(
        ("objective", "model"),
        lambda f: f.model.kind not in f.needs.kinds,
        "{f.objective_name} needs a model of kind {kinds_of_objective}, and {f.model.name} is of kind {f.model.kind}",
        "choose such a base (`tunesmith models` lists kinds) or another objective",
    ),
    Rule(
        ("method", "model"),
        lambda f: f.model.kind not in f.method.kinds,
        "{f.method_name} trains models of kind {kinds_of_method}, and {f.model.name} is of kind {f.model.kind}",
        "choose such a base or another method",
    ),
    Rule(
        ("method", "model"),
        lambda f: f.method.feeds_attention and f.model.kind in f.method.kinds and not f.model.takes_keys,
        "{f.method_name} puts keys and values into the attention of every layer, and that of {f.model.model_type} "
        "models takes none",
        "use method prompt, whose virtual tokens are part of the text, or lora",
    ),
    Rule(
        ("method", "objective"),
        lambda f: f.needs.head not in f.method.heads,
        "{f.method_name} trains a {heads_of_method} head, and {f.objective_name} needs a {f.needs.head} head",
        "choose another method: lora serves both heads",
    ),
    Rule(
        ("method", "model"),
        lambda f: f.needs.head == "lm" and f.method.moves_output and f.model.tied_embeddings and not f.method.unties,
        "{f.model.name} shares its output projection with its embeddings, which {f.method_name} would move with it",
        "set method.untie to true, or choose another method",
    ),
    Rule(
        ("method", "model"),
        lambda f: f.method.unties and not (f.needs.head == "lm" and f.model.tied_embeddings),
        "method.untie is given, and nothing that {f.method_name} trains here is shared with the embeddings",
        "leave method.untie out",
    ),
    Rule(
        ("method", "model"),
        lambda f: bool(f.method.tokens) and f.model.kind == "encoder-decoder",
        "method.tokens adds rows to one table of embeddings, and {f.model.name} has one on each side",
        "leave method.tokens out, or choose a decoder or an encoder",
    ),
    Rule(
        ("method", "model"),
        lambda f: f.context_length is not None and f.context_length < 1,
        "{f.method_name} puts {f.method.virtual_tokens} tokens before each text, "
        "and {f.model.name} sees {f.model.context_length} in all",
        "set method.virtual_tokens to a small part of that",
    ),
    Rule(
        ("train.sequence_length", "model"),
        lambda f: f.context_length is not None and (f.recipe.train.sequence_length or 0) > max(f.context_length, 0),
        "train.sequence_length is {f.recipe.train.sequence_length}, "
        "and {f.model.name} sees {f.model.context_length} tokens{virtual}",
        "set train.sequence_length to {f.context_length} or less",
    ),
    Rule(
        ("evaluate.max_new_tokens", "model"),
        lambda f: f.context_length is not None and (f.recipe.evaluate.max_new_tokens or 0) >= max(f.context_length, 1),
        "evaluate.max_new_tokens is {f.recipe.evaluate.max_new_tokens}, "
        "and {f.model.name} sees {f.model.context_length} tokens, the prompt among them{virtual}",
        "set evaluate.max_new_tokens to the length of a long answer",
    ),
    Rule(
        ("place.device", "hardware"),
        lambda f: not f.device_served,
        "place.device is {f.device}, which this machine or this build of torch does not serve",
        "set place.device to cpu or auto, or install a torch for that device",
    ),
    Rule(
        ("precision", "hardware"),
        lambda f: f.recipe.precision in ("bf16", "int4") and f.device_served and not f.bf16_served,
        "precision is {f.recipe.precision}, and this device does not serve bf16",
        "set precision to fp32 or auto",
    ),
    Rule(
        ("precision", "hardware"),
        lambda f: f.recipe.precision == "fp8" and f.device_served and not f.fp8_served,
        "precision is fp8, which needs a CUDA device of compute capability 8.9 or later and Triton",
        "set precision to bf16 or auto",
    ),
    Rule(
        ("precision", "method"),
        lambda f: (
            f.recipe.precision in ("fp8", "int4")
            and f.recipe.precision not in f.method.frozen_in | f.method.multiplies_in
        ),
        "precision is {f.recipe.precision}, which holds frozen weights beside low-rank updates, "
        "and the method is {method}",
        "use method lora as it starts by default, or set precision to bf16",
    ),
    Rule(
        ("precision", "installed libraries"),
        lambda f: f.multiplies_otherwise and not fp8_linear.is_installed(),
        "precision is fp8, for which {method} needs torchao, and it is not installed here",
        "pip install tunesmith[fp8], or set precision to bf16",
    ),
    Rule(
        ("precision", "place.compile"),
        lambda f: f.multiplies_otherwise and f.recipe.place.compile is False,
        "precision is fp8, which is no faster with {method} unless layers are compiled, and place.compile is false",
        "leave place.compile out, or set precision to bf16",
    ),
    Rule(
        ("precision", "model"),
        lambda f: f.recipe.precision == "int4" and not f.model.linear_parameters,
        "precision is int4, which holds linear layers in 4 bits, and {f.model.model_type} models have other layers",
        "set precision to bf16 or auto",
    ),
    Rule(
        ("precision", "train.dropout"),
        lambda f: f.recipe.precision == "fp8" and "fp8" in f.method.frozen_in and bool(f.recipe.train.dropout),
        "precision is fp8, whose products hold the low-rank update, and train.dropout asks to drop out its input",
        "set train.dropout to 0, or precision to bf16",
    ),
    Rule(
        ("precision", "model"),
        lambda f: f.recipe.precision not in ("auto", "fp32") and not f.model.autocasts,
        "{f.model.model_type} models mask with numbers that {f.recipe.precision} does not hold",
        "set precision to fp32 or auto",
    ),
    Rule(
        ("train.early_stopping", "data.validation"),
        lambda f: f.recipe.train.early_stopping is not None and f.recipe.data.validation is None,
        "train.early_stopping needs a validation set to watch",
        "set data.validation to a file or a fraction such as 0.1",
    ),
    Rule(
        ("train.evaluate_every", "data.validation"),
        lambda f: f.recipe.train.evaluate_every is not None and f.recipe.data.validation is None,
        "train.evaluate_every needs a validation set to evaluate on",
        "set data.validation to a file or a fraction such as 0.1",
    ),
    Rule(
        ("train.balance", "objective.class_weights"),
        lambda f: (
            getattr(f.recipe.train.balance, "by", None) == BY_LABEL
            and f.recipe.objective.options.get("class_weights") == "balanced"
        ),
        "train.balance shows rare labels more often, and objective.class_weights counts them more once again",
        "keep one of the two",
    ),
    Rule(
        ("place.compile", "place.device"),
        lambda f: bool(f.recipe.place.compile) and (f.method.frozen_backbone or not f.device.startswith("cuda")),
        "place.compile is on, and layers are compiled for CUDA alone, where a backward goes through them",
        "leave place.compile out",
    ),
    Rule(
        ("train.recompute", "method"),
        lambda f: bool(f.recipe.train.recompute) and f.method.frozen_backbone,
        "train.recompute is on, and with {f.method_name} no backward goes through the layers",
        "leave train.recompute out",
    ),
    Rule(
        ("data.template", "objective"),
        lambda f: f.recipe.data.template is not None and not f.needs.trains_tokens,
        "data.template is given, and {f.objective_name} reads plain text, not conversations",
        "leave data.template out",
    ),
    Rule(
        ("data.corpus", "objective"),
        lambda f: f.recipe.data.corpus is not None and not f.needs.searches,
        "data.corpus is given, and {f.objective_name} searches nothing",
        "leave data.corpus out, or choose the objective retrieve",
    ),
    Rule(
        ("method", "objective"),
        lambda f: f.method.frozen_backbone and f.needs.head == "pooled" and not f.needs.fresh_head,
        "{f.method_name} trains a fresh head alone, and {f.objective_name} has none: it reads the base's vectors",
        "choose a method that trains the base or an adapter, such as lora",
    ),
    Rule(
        ("train.batch_tokens", "objective"),
        lambda f: (
            f.recipe.train.batch_tokens is not None
            and f.needs.searches
            and bool(f.recipe.objective.options.get("negatives", f.needs.negatives))
        ),
        "train.batch_tokens counts tokens, and objective.negatives adds some that are known once training begins",
        "set train.batch_size",
    ),
    Rule(
        ("train.micro_batch_size", "objective"),
        lambda f: (
            f.needs.coupling == "batch"
            and (f.recipe.train.micro_batch_size or 1 << 40) < (f.recipe.train.batch_size or 1 << 40)
        ),
        "the loss of {f.objective_name} is of all rows of a step together, and train.micro_batch_size cuts it",
        "",
        substitute="each micro-batch runs twice (cached gradients): slower, the same gradient",
    ),
    Rule(
        ("objective", "data.corpus"),
        lambda f: f.needs.rereads > 0,
        "{f.objective_name} takes a pass of the model for each passage that it reads beside a query",
        "",
        substitute="it reads the first {depth} that the vectors of {f.model.name} find, or all where there are fewer",
    ),
    Rule(
        ("evaluate.smallest_group", "evaluate.by"),
        lambda f: f.recipe.evaluate.smallest_group is not None and not f.recipe.evaluate.by,
        "evaluate.smallest_group is given, and evaluate.by names no column whose values are groups",
        "set evaluate.by to such a column, or leave evaluate.smallest_group out",
    ),
    Rule(
        ("evaluate.max_new_tokens", "objective"),
        lambda f: f.recipe.evaluate.max_new_tokens is not None and not f.needs.writes,
        "evaluate.max_new_tokens is given, and {f.objective_name} generates nothing",
        "leave evaluate.max_new_tokens out",
    ),
    Rule(
        ("model", "method"),
        lambda f: f.previous is not None and f.previous.method["name"] != f.method_name,
        "the earlier run trained {f.previous.method[name]}, and this recipe asks for {f.method_name}",
        "go on with method {f.previous.method[name]}; for a fresh adapter name the base itself as model, "
        "and that run under adapters where it is to stay in use",
    ),
    Rule(
        ("model", "method"),
        lambda f: (
            f.previous is not None
            and f.previous.method["name"] == f.method_name
            and any(f.previous.method["options"].get(k) != v for k, v in f.recipe.method.options.items())
        ),
        "the earlier run had method options {f.previous.method[options]}, and this recipe asks for others",
        "leave the options out: they are taken from the earlier run",
    ),
    Rule(
        ("model", "objective"),
        lambda f: f.previous is not None and f.previous.objective["name"] != f.objective_name,
        "the earlier run was trained for {f.previous.objective[name]}, and this recipe asks for {f.objective_name}",
        "go on with the same objective, or name the base itself as model",
    ),
    Rule(
        ("train.head_learning_rate", "method", "objective"),
        lambda f: (
            f.recipe.train.head_learning_rate is not None
            and (f.needs.head != "pooled" or not f.needs.fresh_head or f.method.frozen_backbone)
        ),
        "train.head_learning_rate: {f.objective_name} by {f.method_name} trains no head beside a base that learns too",
        "set train.learning_rate, which is that of all that trains there",
    ),
    Rule(
        ("teacher", "objective"),
        lambda f: f.needs.teacher and f.recipe.teacher is None,
        "{f.objective_name} learns from another model, and the recipe names none",
        "set teacher to a run, a folder or the name of a model",
    ),
    Rule(
        ("teacher", "objective"),
        lambda f: not f.needs.teacher and f.recipe.teacher is not None,
        "teacher is given, and {f.objective_name} learns from the rows alone",
        "leave teacher out, or set objective to distill",
    ),
    Rule(
        ("teacher", "model"),
        lambda f: f.teacher is not None and f.teacher.kind != f.model.kind,
        "the teacher {f.teacher.name} is of kind {f.teacher.kind}, and {f.model.name} is of kind {f.model.kind}",
        "choose a student of the teacher's kind",
    ),
    Rule(
        ("objective", "model"),
        lambda f: f.recipe.objective.options.get("learn") == "all" and f.model.kind == "encoder-decoder",
        "objective.learn is all, and the decoder of {f.model.name} has the answers alone",
        "leave objective.learn out",
    ),
    Rule(
        ("adapters", "model"),
        lambda f: f.previous is not None and bool(f.recipe.adapters),
        "model names an earlier run, which goes on with its own adapter and those beneath it, "
        "and adapters asks for a fresh one on {listed}",
        "name the base itself as model, and that run under adapters",
    ),
    Rule(
        ("adapters", "model"),
        lambda f: f.first_beneath(lambda one: one.base_sha256 != f.base_sha256) is not None,
        "{other_base.path} was trained on {other_base.base} ({other_base.base_sha256:.12}...), "
        "and {f.model.name} has other weights ({f.base_sha256:.12}...)",
        "name that base as model, or leave the adapter out",
    ),
    Rule(
        ("adapters", "method"),
        lambda f: f.first_beneath(lambda one: one.method not in f.method.stands_on) is not None,
        "{other_method.path} is by {other_method.method}, and {f.method_name} stands on {stands_on}",
        "train by a method that does, or export that adapter with --merge and name its folder as model",
    ),
    Rule(
        ("adapters", "objective"),
        lambda f: f.first_beneath(lambda one: one.head != f.needs.head) is not None,
        "{other_head.path} was trained below a {other_head.head} head, and {f.objective_name} needs a "
        "{f.needs.head} head, whose layers go by other names",
        "export that adapter with --merge and name its folder as model",
    ),
    Rule(
        ("adapters", "tokens"),
        lambda f: f.first_beneath(lambda one: bool(one.tokens)) is not None,
        "{with_tokens.path} added tokens to the vocabulary, whose rows its base does not have",
        "export that adapter with --merge and name its folder as model",
    ),
    Rule(
        ("adapters", "tokens"),
        lambda f: bool(f.beneath) and bool(f.method.tokens),
        "method.tokens trains rows of the embeddings, and PEFT loads no adapter beside one that has such rows",
        "leave method.tokens out, or export the earlier adapter with --merge and name its folder as model",
    ),
    Rule(
        ("adapters", "precision"),
        lambda f: bool(f.beneath) and f.recipe.precision == "fp8",
        "precision is fp8, whose products hold the update of one adapter, and adapters names {listed}",
        "set precision to bf16",
    ),
    Rule(
        ("report_to", "installed libraries"),
        lambda f: bool(f.missing_trackers),
        "report_to names what is not installed here: {missing_trackers}",
        "install it with `pip install {missing_packages}`, or take it out of report_to",
    ),
    Rule(
        ("packing", "model"),
        lambda f: not f.model.packable,
        "attention of {f.model.model_type} models cannot be held inside segments",
        "",
        substitute="one padded row for each example: slower, the same result",
    ),
    Rule(
        ("packing", "method"),
        lambda f: f.model.packable and not f.method.packs,
        "{f.method_name} cannot be held inside segments",
        "",
        substitute="one padded row for each example: slower, the same result",
    ),
    Rule(
        ("train.recompute", "method"),
        lambda f: bool(f.recipe.train.recompute) and not f.method.recomputes,
        "train.recompute is on, and {f.method_name} cannot run layers again in the backward",
        "leave train.recompute out",
    ),
    Rule(
        ("evaluate.base", "objective"),
        lambda f: f.recipe.evaluate.base and f.needs.baseline is not None,
        "a base without a trained head gives no answers",
        "",
        substitute="compared with {baseline}",
    ),
)
