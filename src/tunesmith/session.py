"""A policy ready to train or to answer: loaded, with its heads, its method attached, and how it is saved again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith import __version__, beneath, rundir
from tunesmith.beneath import Beneath
from tunesmith.compat import quiet_transformers
from tunesmith.data.chat import Renderer
from tunesmith.data.source import first_batches
from tunesmith.engine.native import seed_step
from tunesmith.engine.precision import serves_fp8
from tunesmith.errors import InputError, RefusedError
from tunesmith.kernels.accelerate import FP8, LAYERS, accelerate
from tunesmith.methods import METHODS
from tunesmith.models import drawing, sentence_files
from tunesmith.models.cache import cache_dir
from tunesmith.models.convert import convert_gguf
from tunesmith.models.fetch import LocalModel, resolve
from tunesmith.models.heads import Head
from tunesmith.models.layers import layers, set_dropout, whole_state
from tunesmith.models.load import DTYPES, Dtype, context_length, decoder_start, load_backbone, load_tokenizer
from tunesmith.models.policy import Policy, Tokens
from tunesmith.models.recompute import recompute
from tunesmith.models.saved import CARD, read_card
from tunesmith.models.shared import SharedBase
from tunesmith.models.vocabulary import add_tokens, widen
from tunesmith.objectives import OBJECTIVES
from tunesmith.planning import Assets, Plan
from tunesmith.protocols import Embeds, Fitted, Method, Objective, Stacked, Taught
from tunesmith.settings import Placement
from tunesmith.types import Batch

if TYPE_CHECKING:
    from tunesmith.evaluation.calibrated import Calibration
    from tunesmith.recipe import Recipe

HEADS = "heads.safetensors"
WHOLE = "bf16"  # what the base is in where the fewer bits of a run do not serve
FIT_TOKENS = 2048  # of training examples that a method may look at before it trains
BaseOf = Callable[[Any], nn.Module]  # the kind of head that an objective needs -> the model


def build(plan: Plan, assets: Assets, base: BaseOf | None = None) -> Policy:
    """The policy of a run before its first step: the base with the method attached, or the earlier run's.

    `base` makes the base's model where it is not the one on disk.
    """
    placement = plan.placement
    torch.set_num_threads(placement.threads)
    policy = _policy(
        assets.local,
        assets.renderer,
        assets.objective,
        assets.method,
        placement,
        assets.facts.model.pooling,
        assets.method.facts.tokens,
        base,
    )
    set_dropout(policy.model, plan.training.dropout)
    seed_step(plan.training.seed, 0)  # the fresh parameters' draw
    if assets.previous is None:
        assets.method.attach(policy)
        _settle(policy, placement)
        _stand(policy, assets.method, assets.beneath)
        if isinstance(assets.method, Fitted):
            assets.method.fit(policy, _first_batches(plan, assets, policy))
    else:
        _load_trained(policy, assets.method, assets.previous / "model", placement, assets.beneath)
    policy.as_base = _reentrant(partial(assets.method.reference, policy))
    _accelerate(policy, placement.precision, compiled=placement.compiled)
    recompute(policy.model, placement.recompute, placement.recomputed)
    return policy


def teach(plan: Plan, assets: Assets, student: Policy) -> None:
    """Loads the teacher beside the student and hands it to the objective."""
    teacher, objective, placement = assets.teacher, assets.objective, plan.placement
    assert teacher is not None
    assert isinstance(objective, Taught)
    if teacher.folder is None:
        where = replace(placement, packed=teacher.packable)
        policy = _plain(teacher.local, assets.renderer, objective, where)
    else:
        policy = load(teacher.folder, placement.device)[0]
    cache = cache_dir() / "teachers" / f"{teacher.sha256[:16]}-{placement.precision}"
    objective.learn_from(policy, student, assets.prepared.train, placement.micro_batch_tokens, cache)


def save(
    folder: Path,
    policy: Policy,
    recipe: Recipe,
    plan: Plan,
    assets: Assets,
    calibration: Calibration | None = None,
    drawn: drawing.Drawn | None = None,
) -> None:
    """Writes the result into `folder`: what PEFT or transformers loads, fresh heads, tokenizer and tunesmith's card."""
    method, objective = assets.method, assets.objective
    method.export(policy, folder)
    _save_heads(folder, policy)
    assets.renderer.tokenizer.save_pretrained(folder)
    _save_sentence_files(folder, policy, objective, assets.renderer)
    card = {
        "tunesmith": __version__,
        "base": {key: plan.base[key] for key in ("name", "sha256", "tokenizer_sha256", "licence", "source")},
        "method": {"name": recipe.method.name, "options": method.options.model_dump(mode="json")},
        "objective": {
            "name": recipe.objective.name,
            "options": recipe.objective.options,
            "learned": objective.describe(),
        },
        "head": objective.needs.head,
        "pooling": assets.facts.model.pooling,
        "packed": plan.placement.packed,
        "tokens": method.facts.tokens,
        "precision": WHOLE if assets.facts.multiplies_otherwise else plan.placement.precision,
        "columns": dict(recipe.data.columns),
        "format": recipe.data.format,
        "templates": dict(assets.renderer.templates),
        "sequence_length": plan.training.sequence_length,
        "max_new_tokens": plan.training.max_new_tokens,
        **({beneath.FOLDER: beneath.save(assets.beneath, folder)} if assets.beneath else {}),
        **({"teacher": plan.teacher} if plan.teacher else {}),
        **({"calibration": calibration.to_json()} if calibration else {}),
        **({drawing.CARD_KEY: drawn.to_json()} if drawn else {}),
    }
    _save_drawing(folder, policy, card)
    write_card(folder, card)


def save_merged(
    folder: Path, policy: Policy, objective: Objective, renderer: Renderer, card: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Writes a policy whose adapter is merged as what full fine-tuning would have left: a model of transformers."""
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)
    policy.model.config.dtype = dtype
    with quiet_transformers():
        policy.model.save_pretrained(folder, state_dict=whole_state(policy.model))
    _save_heads(folder, policy)
    renderer.tokenizer.save_pretrained(folder)
    _save_sentence_files(folder, policy, objective, renderer)
    _save_drawing(folder, policy, card)
    whole = {"method": {"name": "full", "options": {}}, "merged": card["method"], "precision": _whole(card)}
    write_card(folder, {key: value for key, value in {**card, **whole}.items() if key != beneath.FOLDER})


def _whole(card: Mapping[str, Any]) -> str:
    """What a model answers in whose base is no longer held in fewer bits."""
    return "fp32" if card["precision"] == "fp32" else WHOLE


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """The last file of a model: what it is, and the sha256 of all others."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): rundir.sha256_file(path) for path in files}
    rundir.write_json(folder / CARD, {**card, "files": hashes})


def base_of(folder: Path, card: Mapping[str, Any]) -> LocalModel:
    """The base that a saved model stands on. RefusedError where its bytes are not those it was trained on."""
    local = resolve(card["base"]["name"])
    if local.sha256 != card["base"]["sha256"]:
        raise RefusedError(
            f"{folder} was trained on {card['base']['name']} with sha256 {card['base']['sha256'][:12]}..., "
            f"and the weights found have {local.sha256[:12]}...",
            "restore the base that it was trained on",
        )
    return local


def objective_of(card: Mapping[str, Any]) -> Objective:
    """The objective of a saved model, with what it learned of the training rows."""
    objective_class = OBJECTIVES.get(card["objective"]["name"])
    objective = objective_class(objective_class.Options.model_validate(card["objective"]["options"]))
    objective.adopt(card["objective"]["learned"])
    return objective


def load(
    folder: Path, device: str, shared: SharedBase | None = None, *, trained: bool = True
) -> tuple[Policy, Objective, Method, Renderer, dict[str, Any]]:
    """What `save` wrote, on its base, ready to answer; the card also tells `context_length`, the tokens it sees.

    `shared`: the base's weights where others stand on them too; not `trained`: the base alone. Raises RefusedError
    when a file is not as it was saved, or the base's bytes are not those it was trained on.
    """
    card = read_card(folder)
    local = base_of(folder, card) if shared is None else shared.local
    objective, method_class = objective_of(card), METHODS.get(card["method"]["name"])
    method = method_class(method_class.Options.model_validate(card["method"]["options"]), 0.0)
    tokenizer, tokens = load_tokenizer(local), card.get("tokens", ())
    add_tokens(tokenizer, tokens)
    renderer = Renderer(tokenizer, card["templates"].get("default"), card["sequence_length"], decoder_start(local))
    in_fp8 = shared is None and serves_fp8(torch.device(device))  # weights in fp8 are one adapter's alone
    precision = card["precision"] if card["precision"] != "fp8" or in_fp8 else WHOLE
    placement = Placement(device, torch.get_num_threads(), 1, precision, card["packed"], None, 4096, 1)
    base = None if shared is None else shared.model
    policy = _policy(local, renderer, objective, method, placement, card["pooling"], tokens, base)
    if trained:
        _load_trained(policy, method, folder, placement, beneath.held(folder, card))
        policy.as_base = _reentrant(partial(method.reference, policy))
    if shared is None:
        _accelerate(policy, precision)
    else:
        shared.check(str(folder))
        accelerate(policy, layers=False)
    policy.eval()
    context = context_length(policy.config, local)
    room = None if context is None else context - method.facts.virtual_tokens
    return policy, objective, method, renderer, card | {"context_length": room}


def load_gguf(
    file: Path, aside: Path, like: Policy, objective: Objective, card: Mapping[str, Any]
) -> tuple[Policy, Renderer]:
    """What is in a GGUF file, read as anybody's and ready to answer as `like` does; `aside` is a free folder."""
    convert_gguf(file, aside)
    rope = getattr(like.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":  # transformers reads no frequency factors from a GGUF file
        found = rundir.read_json(aside / "config.json")
        rundir.write_json(aside / "config.json", {**found, "rope_parameters": rope})
    local = resolve(str(aside))
    renderer = Renderer(load_tokenizer(local), None, card["sequence_length"])
    placement = Placement(str(like.device), torch.get_num_threads(), 1, _whole(card), card["packed"], None, 4096, 1)
    return _plain(local, renderer, objective, placement, card["pooling"]), renderer


def _plain(
    local: LocalModel, renderer: Renderer, objective: Objective, placement: Placement, pooling: str = "mean"
) -> Policy:
    """A model that no method of ours changed, ready to answer."""
    whole = METHODS.get("full")
    policy = _policy(local, renderer, objective, whole(whole.Options(), 0.0), placement, pooling)
    policy.eval()
    return policy


def _first_batches(plan: Plan, assets: Assets, policy: Policy) -> Iterator[Batch]:
    prepared, seed = assets.prepared, plan.training.seed
    yield from first_batches(
        prepared.train, prepared.repeats, seed, FIT_TOKENS, packed=policy.packed, pad_id=policy.tokens.pad
    )


def _load_trained(
    policy: Policy, method: Method, folder: Path, placement: Placement, adapters: Sequence[Beneath]
) -> None:
    method.load(policy, folder)
    _load_heads(policy, folder)
    _settle(policy, placement)
    _stand(policy, method, adapters)


def _stand(policy: Policy, method: Method, adapters: Sequence[Beneath]) -> None:
    """Puts frozen adapters beneath the method's own; they stay in fp32, as they were saved."""
    if adapters and isinstance(method, Stacked):
        method.stand_on(policy, [one.folder for one in adapters])


def _settle(policy: Policy, placement: Placement) -> None:
    """What is frozen is in the run's precision; what trains in fp32, or the base's own in what the plan says."""
    frozen = torch.float32 if placement.precision == "fp32" else torch.bfloat16
    own = getattr(torch, DTYPES[placement.trained])
    for name, parameter in policy.named_parameters():
        if parameter.is_floating_point():
            trained = own if name.startswith("model.") else torch.float32
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


def _save_sentence_files(folder: Path, policy: Policy, objective: Objective, renderer: Renderer) -> None:
    """Of whole encoders; what is read of a decoder ends with a token that sentence-transformers does not put there."""
    if isinstance(objective, Embeds) and policy.kind == "encoder" and (folder / "config.json").is_file():
        sentence_files.write(folder, policy, renderer.sequence_length, objective.prompts())


def _save_drawing(folder: Path, policy: Policy, card: Mapping[str, Any]) -> None:
    if drawing.CARD_KEY in card:
        drawing.save(folder, policy, drawing.of_card(card), int(card["max_new_tokens"]))


def _save_heads(folder: Path, policy: Policy) -> None:
    heads = {
        f"{name}.{key}": value.contiguous()
        for name, head in policy.heads.items()
        for key, value in head.state_dict().items()
    }
    if heads:
        save_file(heads, folder / HEADS)


def _load_heads(policy: Policy, folder: Path) -> None:
    """The heads that `save` wrote beside the adapter."""
    if not policy.heads:
        return
    path = folder / HEADS
    if not path.is_file():
        raise InputError(f"{path} is missing", "restore it, or train again")
    saved = load_file(path)
    for name, head in policy.heads.items():
        head.load_state_dict(
            {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        )


def loaded_in(method: Method, placement: Placement) -> Dtype:
    """What the base's weights are loaded in."""
    if method.facts.reference == "snapshot":
        return placement.trained
    return "fp32" if placement.precision == "fp32" else "bf16"


def _policy(
    local: LocalModel,
    renderer: Renderer,
    objective: Objective,
    method: Method,
    placement: Placement,
    pooling: str,
    tokens: Sequence[str] = (),
    base: BaseOf | None = None,
) -> Policy:
    head = objective.needs.head
    in_nf4 = placement.precision == "int4"
    dtype = loaded_in(method, placement)
    model = base(head) if base else load_backbone(local, dtype, head, placement.device, in_nf4=in_nf4)
    added = add_tokens(renderer.tokenizer, tokens)
    widen(model, max(added, default=-1) + 1)
    kind = _kind(model)
    ends = tuple(renderer.end_ids) if head == "lm" and kind != "encoder" else ()
    mask: Any = renderer.tokenizer.mask_token_id
    policy = Policy(
        model,
        kind,
        Tokens(ends, renderer.pad_id, added, renderer.plain, mask),
        packed=placement.packed,
        pooling=pooling,
        autocast=None if placement.precision == "fp32" else torch.bfloat16,
    )

    def weights(folder: Path | None) -> dict[str, torch.Tensor]:
        return load_backbone(local if folder is None else replace(local, folder=folder), "fp32", head).state_dict()

    policy.weights = weights
    if head == "lm":
        policy.check_projection()
    for spec in objective.heads():
        policy.add_head(Head(spec, policy.width))
    return policy


def _reentrant(enter: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Contexts that may be entered inside each other, the inner ones for nothing."""
    inside = False

    @contextmanager
    def entered() -> Generator[None]:
        nonlocal inside
        if inside:
            yield
            return
        inside = True
        try:
            with enter():
                yield
        finally:
            inside = False

    return entered


def _accelerate(policy: Policy, precision: str, *, compiled: bool = False) -> None:
    """Raises RefusedError where fp8 was asked for and serves no layer."""
    fp8 = precision == "fp8"
    layers_to_compile = layers(policy.model).values() if compiled else ()
    taken = accelerate(policy, fp8=fp8, compiled=layers_to_compile)
    if fp8 and not taken[LAYERS] + taken[FP8]:
        name = type(policy.model).__name__
        why = "it serves layers built as Llama's, and widths of a multiple of 16 that train"
        raise RefusedError(f"no layer of {name} can be kept in fp8: {why}", "set precision to bf16")


def _kind(model: Any) -> Any:
    from tunesmith.models.load import kind_of

    return kind_of(model.config)
