"""A planned run, carried out in its folder: loop, export, evaluation; begun or gone on with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith import decoding, loop, rundir, session
from tunesmith.data.ingest import code_version, digest
from tunesmith.data.source import Batching, DataSource, Examples, Extended
from tunesmith.engine import checkpoint, features
from tunesmith.engine.native import NativeEngine, Optimization
from tunesmith.engine.precision import device_name
from tunesmith.errors import InputError, RefusedError
from tunesmith.evaluation import METRICS
from tunesmith.evaluation.calibrated import Calibration
from tunesmith.evaluation.code_metrics import PassAtK
from tunesmith.evaluation.metrics import build, statistics
from tunesmith.evaluation.validate import losses
from tunesmith.events import Deferred, Listen
from tunesmith.gradients.clip import Clip
from tunesmith.measuring import answered, measure_run
from tunesmith.models.cache import cache_dir
from tunesmith.models.drawing import Drawn
from tunesmith.models.heads import Head
from tunesmith.models.policy import Policy
from tunesmith.models.saved import CARD
from tunesmith.monitor import Monitor, StopRequest, stoppable
from tunesmith.planning import Assets, Plan
from tunesmith.protocols import Annotator, GradientRule, Grounded, Mines, Ruled
from tunesmith.recipe_file import dump_recipe
from tunesmith.rundir import RunDir
from tunesmith.types import GradientMode, Prediction, SampleSpec

if TYPE_CHECKING:
    from tunesmith.data.store import TokenStore
    from tunesmith.recipe import Recipe

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "tunesmith")
GROUND_ROWS = 4096  # by which what the base's vectors come to is fitted: a handful of numbers
Columns = dict[str, NDArray[np.generic]]


def begin(run: RunDir, recipe: Recipe, plan: Plan, assets: Assets, plugins: Mapping[str, str]) -> None:
    """Writes what identifies the run; the manifest last, because a folder with one is a run."""
    rundir.write_file(run.path / "recipe.yaml", dump_recipe(recipe).encode())
    rundir.write_json(run.path / "plan.json", plan.to_json())
    prepared = assets.prepared
    for name, keys in ((rundir.TRAIN_KEYS, prepared.keys), (rundir.VALIDATION_KEYS, prepared.validation_keys)):
        rundir.write_file(run.path / name, np.unique(keys).tobytes())
    rundir.write_json(run.path / "manifest.json", _manifest(plan, plugins))


def check_same(run: RunDir, plan: Plan, plugins: Mapping[str, str]) -> None:
    """Raises RefusedError naming all that differs from when the run began."""
    before = rundir.read_record(run.path / "manifest.json", "libraries", "plugins", "machine")
    now = _manifest(plan, plugins)
    stored = rundir.read_record(run.path / "plan.json", "meaning", "resume")
    differences = [
        *(
            line
            for key in plan.meaning
            for line in _changed(key, stored["meaning"].get(key), _plain(plan.meaning[key]))
        ),
        *_differing("library", before["libraries"], now["libraries"]),
        *_differing("plugin", before["plugins"], now["plugins"]),
        *(_differing("machine", before["machine"], now["machine"]) if stored["resume"] == "exact" else []),
    ]
    if differences:
        raise RefusedError(
            f"{run.path} cannot go on as it began: {'; '.join(differences)}",
            "put it back as it was, or start a new run (with `model:` naming this one to go on from its result)",
        )


def load_policy(plan: Plan, assets: Assets, listen: Listen) -> Policy:
    """The policy of a run; a new run is begun only then, so that weights that cannot be loaded leave none behind."""
    listen("phase", {"name": "loading", "what": plan.base["name"]})
    policy = session.build(plan, assets)
    if assets.teacher is not None:
        listen("phase", {"name": "loading", "what": assets.teacher.name})
        session.teach(plan, assets, policy)
    return policy


def execute(run: RunDir, recipe: Recipe, plan: Plan, assets: Assets, policy: Policy, listen: Listen) -> dict[str, Any]:
    """Trains to the end from wherever the run stands, saves the result and measures it.

    Returns what evaluation.json and comparison.json hold. The caller holds the run's lock.
    """
    with stoppable() as stop:  # only steps have something to save first; elsewhere a signal may end the process at once
        _train(run, plan, assets, policy, stop, listen)
    calibration = _calibrated(recipe, plan, assets, policy, listen)
    longest = plan.training.max_new_tokens
    drawn, decoded = decoding.sweep(recipe, assets, policy, longest, listen)
    listen("phase", {"name": "saving"})
    with rundir.replace_folder(run.model) as folder:
        session.save(folder, policy, recipe, plan, assets, calibration, drawn)
    specs = (drawn or Drawn()).specs(longest)
    results = measure_run(run, recipe, plan, assets, policy, listen, specs, calibration, decoded)
    listen("finished", {"run": str(run.path), "records": results["records"], "effects": results["effects"]})
    return results


def _calibrated(recipe: Recipe, plan: Plan, assets: Assets, policy: Policy, listen: Listen) -> Calibration | None:
    """What the validation rows say of the trained model's probabilities, where the recipe asks."""
    asked, store = recipe.evaluate, assets.prepared.validation
    if store is None or not (asked.calibrate or asked.conformal):
        return None
    rows = [store.row(i) for i in range(len(store))]
    listen("phase", {"name": "evaluating", "what": "what its probabilities are worth", "rows": len(rows)})
    found = assets.objective.predict(policy, rows, assets.renderer, SampleSpec(plan.training.max_new_tokens))
    return Calibration.fit(found, rows, asked.calibrate, asked.conformal, recipe.seed)


def _train(run: RunDir, plan: Plan, assets: Assets, policy: Policy, stop: StopRequest, listen: Listen) -> None:
    objective, method, prepared, training = assets.objective, assets.method, assets.prepared, plan.training
    columns, held_columns = _frozen_vectors(plan, assets, policy, listen)
    _ground(assets, policy)
    examples = _mined("train", prepared.train, plan, assets, policy, listen)
    own = method.rules(policy, training.total_steps) if isinstance(method, Ruled) else []
    rules: list[GradientRule] = [*own, Clip(training.clip)]
    engine = engine_of(plan, assets, policy, rules)
    source = _source(plan, assets, policy, examples, columns)
    validation, heard = prepared.validation, Deferred(listen)
    held: Examples | None = validation
    if validation is not None and assets.facts.needs.coupling != "batch":  # else the other rows' passages will do
        held = _mined("validation", validation, plan, assets, policy, listen)
    monitor = Monitor(
        run,
        training,
        plan.placement.save_every,
        engine,
        source,
        rules,
        validate=None if held is None else _validation(plan, assets, policy, held, held_columns, heard),
        selects=_selection(plan),
        stop=stop,
        listen=heard,
    )
    try:
        saved = checkpoint.found(run.checkpoints)
        monitor.restore(checkpoint.read(saved[-1]) if saved else {})
        listen(
            "phase",
            {"name": "training", "total_steps": source.total_steps, "from_step": saved[-1].step if saved else 0},
        )
        if not monitor.best.stopped:
            with monitor.telling():
                loop.train(source, policy, objective, engine, rules, monitor)
        kept = {c.step: c for c in checkpoint.found(run.checkpoints)}
        if monitor.best.step and monitor.best.step in kept and monitor.best.step != max(kept):
            engine.restore(checkpoint.read(kept[monitor.best.step])["engine"])
            listen("best", {"step": monitor.best.step, "value": monitor.best.value})
    finally:
        monitor.close()
    policy.eval()


def engine_of(plan: Plan, assets: Assets, policy: Policy, rules: Sequence[GradientRule]) -> NativeEngine:
    """The engine of a run, before its first step."""
    training = plan.training
    return NativeEngine(
        policy,
        _groups(plan, assets, policy),
        Optimization(
            training.learning_rate,
            training.schedule,
            training.warmup,
            training.weight_decay,
            training.total_steps,
            training.optimizer,
        ),
        seed=training.seed,
        mode=_mode(assets),
        rules=rules,
        ahead=plan.placement.recompute != "away",  # else the host's memory would hold inputs of two steps
    )


def _ground(assets: Assets, policy: Policy) -> None:
    """What a grounded objective takes from the base and the training rows, in their order the first of them."""
    if isinstance(assets.objective, Grounded) and assets.previous is None:
        store = assets.prepared.train
        rows = [store.row(i) for i in range(min(len(store), GROUND_ROWS))]
        with assets.method.reference(policy):
            assets.objective.ground(policy, rows, assets.renderer)


def _groups(plan: Plan, assets: Assets, policy: Policy) -> list[dict[str, Any]]:
    """The method's groups; heads leave them for one of their own where they have a rate of their own."""
    groups, rate = assets.method.parameter_groups(policy), plan.training.head_learning_rate
    if rate is None:
        return groups
    heads = list(policy.heads.parameters())
    fresh = {id(p) for p in heads}
    return [
        *({**group, "params": [p for p in group["params"] if id(p) not in fresh]} for group in groups),
        {"params": heads, "lr": rate},
    ]


def _mined(name: str, store: TokenStore, plan: Plan, assets: Assets, policy: Policy, listen: Listen) -> Examples:
    """Examples with what the objective adds to them by the model as it starts; chosen once for such a start."""
    objective = assets.objective
    if not isinstance(objective, Mines) or not objective.mines:
        return store
    rows = [store.row(i) for i in range(len(store))]
    start = None if assets.previous is None else rundir.sha256_file(assets.previous / "model" / CARD)
    meant = [plan.meaning["base"], plan.meaning["objective"], plan.meaning["data"], plan.meaning["renderer"], start]
    key = digest([name, code_version(), *meant, policy.pooling, plan.placement.precision, str(policy.device)])
    path, shape = cache_dir() / "mined" / f"{key}.i32", (len(rows), objective.mines)
    if path.is_file() and path.stat().st_size == 4 * shape[0] * shape[1]:
        mined_NK = np.fromfile(path, dtype=np.int32).reshape(shape)
    else:
        listen("phase", {"name": "mining", "what": f"negatives of {len(rows):,} rows"})
        with nullcontext() if assets.previous else policy.as_base():
            mined_NK = objective.mine(policy, rows, assets.renderer)
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_file(path, mined_NK.tobytes(), shared=True)
    return Extended(store, objective.added(mined_NK, rows, assets.renderer))


def _source(plan: Plan, assets: Assets, policy: Policy, examples: Examples, columns: Columns) -> DataSource:
    objective, prepared, training = assets.objective, assets.prepared, plan.training
    return DataSource(
        examples,
        Batching(
            training.epochs,
            training.max_steps,
            training.batch_size,
            training.batch_tokens,
            plan.placement.micro_batch_size,
            plan.placement.micro_batch_tokens,
        ),
        seed=training.seed,
        packed=policy.packed,
        pad_id=policy.tokens.pad,
        repeats_N=prepared.repeats,
        easy_first=prepared.easy_first,
        columns=columns,
        annotator=objective if isinstance(objective, Annotator) else None,
        workers=plan.placement.workers,
    )


def _mode(assets: Assets) -> GradientMode:
    return "cached" if assets.facts.needs.coupling == "batch" else "plain"


def _selection(plan: Plan) -> tuple[str, bool]:
    """The validation number that chooses the best checkpoint, and whether more of it is better."""
    name = str((plan.training.early_stopping or {}).get("metric") or "loss")
    return name, name != "loss" and METRICS.get(name)([]).higher_is_better


def _frozen_vectors(plan: Plan, assets: Assets, policy: Policy, listen: Listen) -> tuple[Columns, Columns]:
    """Pooled vectors of train and validation where the backbone is frozen; the heads are standardised by them."""
    if not assets.facts.caches_vectors:
        return {}, {}
    prepared = assets.prepared
    pooled = _vectors("train", prepared.train, plan, policy, listen)
    held = prepared.validation
    train: Columns = {"pooled": pooled}
    validation: Columns = {"pooled": _vectors("validation", held, plan, policy, listen)} if held is not None else {}
    if assets.previous is None:
        for head in policy.heads.values():
            assert isinstance(head, Head)
            head.standardise(torch.from_numpy(pooled))
    return train, validation


def _vectors(name: str, store: TokenStore, plan: Plan, policy: Policy, listen: Listen) -> NDArray[np.float32]:
    key = f"{plan.base['sha256'][:16]}-{store.fingerprint[:16]}-{policy.pooling}-{plan.placement.precision}"
    path = cache_dir() / "vectors" / f"{key}.f32"

    def report(done: int, of: int) -> None:
        listen("progress", {"what": f"embedding {name}", "done": done, "of": of})

    def make() -> NDArray[np.float32]:
        return features.pooled(policy, store, plan.placement.micro_batch_tokens, report)

    return features.cached(path, make, len(store), policy.width)


def _validation(
    plan: Plan, assets: Assets, policy: Policy, examples: Examples, columns: Columns, listen: Listen
) -> Callable[[], dict[str, float]]:
    """Measures the validation rows, and shows an answer to one of them where answers are generated."""
    held = assets.prepared.validation
    assert held is not None
    objective, selected = assets.objective, _selection(plan)[0]

    def validate() -> dict[str, float]:
        numbers = losses(policy, objective, examples, plan.placement.micro_batch_tokens, columns)
        spec = SampleSpec(plan.training.max_new_tokens)
        if selected not in numbers:
            rows = [held.row(i) for i in range(len(held))]
            code = assets.facts.recipe.evaluate.code if isinstance(METRICS.get(selected)([]), PassAtK) else None
            found = answered(policy, rows, objective, assets.renderer, spec, code, [selected])
            numbers[selected] = _value(selected, found, assets)
        if objective.needs.writes:
            listen("sample", _as_sample(objective.predict(policy, [held.row(0)], assets.renderer, spec)[0]))
        return numbers

    return validate


def _value(name: str, predictions: list[Prediction], assets: Assets) -> float:
    (metric,) = build([name], predictions, assets.objective.describe().get("labels"))
    return float(metric.aggregate(statistics(metric, predictions).sum(0)))


def _as_sample(prediction: Prediction) -> dict[str, Any]:
    return {"where": prediction.where, "output": prediction.output, "reference": prediction.reference}


def _manifest(plan: Plan, plugins: Mapping[str, str]) -> dict[str, Any]:
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "plan": plan.hash,
        "seed": plan.training.seed,
        "commit": _commit(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "plugins": dict(plugins),
        "machine": {
            "device": device_name(torch.device(plan.placement.device)),
            "threads": plan.placement.threads,
            "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
            "compiled": False,
            "python": platform.python_version(),
        },
        "base": plan.base,
        "beneath": plan.beneath,
        "teacher": plan.teacher,
        "data": {
            "train": plan.audit["train"]["files"],
            "validation": (plan.audit["validation"] or {}).get("files"),
            "test": {name: split["files"] for name, split in plan.audit["tests"].items()},
            **({"corpus": plan.audit["corpus"]} if plan.audit["corpus"] is not None else {}),
        },
    }


def _version(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "not installed"


def _commit() -> str | None:
    """The commit of the working directory's repository, if there is one."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    import json

    return json.loads(json.dumps(value, default=str))


def _changed(name: str, before: Any, now: Any) -> Iterator[str]:
    """What differs, key by key; of long values, such as hashes, only that they do."""
    if isinstance(before, dict) and isinstance(now, dict):
        then, here = cast("dict[str, Any]", before), cast("dict[str, Any]", now)
        for key in dict.fromkeys([*then, *here]):
            yield from _changed(f"{name}.{key}", then.get(key), here.get(key))
    elif before != now:
        told = f"was {before!r}, is {now!r}"
        yield f"{name} {told if len(told) < 60 else 'changed'}"


def _differing(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *now])
    return [f"{what} {n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


def check_run_folder(path: Path) -> None:
    """Raises InputError where a new run cannot be put; one that was stopped before its manifest gives way."""
    if (path / "manifest.json").exists():
        raise InputError(f"{path} holds a run already", f"go on with `tunesmith resume {path}`, or give another --out")
    if not (path.is_dir() and rundir.is_unbegun(path)):
        rundir.check_free(path)
