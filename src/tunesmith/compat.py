"""What tunesmith needs of upstream's private parts, and the quirks it works around, in one place.

Every name here was seen in transformers 5.23; each function degrades to a safe answer or a clear
error where a later version differs.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

# Pre-tokenizers whose digits are split one by one before GPT-2's pattern: llama.cpp's group of the
# same rule. transformers 5.23 does not know them and falls back to GPT-2's pattern alone, which
# joins two spaces before a digit differently.
GGUF_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
GRAPHS = 64  # of one function that torch compiles
# They fill their masks with fp32's smallest number, which bf16 does not hold.
FP32_ONLY = frozenset({"deberta", "deberta-v2"})
GGUF_PLAIN_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "phi-2"})


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bars, advice or loading reports of transformers inside; what matters is reported by us."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # torch's own code still calls what torch has deprecated; nothing here can mend that.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|transformers)\b")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\b")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def compiling() -> Generator[None]:
    """torch.compile may make a graph for many lengths inside, and its own warnings are not shown."""
    import torch

    private: Any = torch
    with warnings.catch_warnings(), private._dynamo.config.patch(recompile_limit=GRAPHS):
        warnings.simplefilter("ignore")
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, for any number of positions and without its warnings.

    Numbers that happen to be equal at first are not taken for one. The limits stay set, because setting them at each
    call would take longer than the guards of a graph do (28 us of a core).
    """
    import torch

    private: Any = torch
    private._dynamo.config.recompile_limit = max(private._dynamo.config.recompile_limit, GRAPHS)
    private.fx.experimental._config.use_duck_shape = False
    inner: Any = torch.compile(function, dynamic=True)

    def run(*given: Any, **named: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return inner(*given, **named)

    return run


def recompute(model: Any, kept: Iterable[Any]) -> bool:
    """Layers of `model` are run again in the backward, but for those in `kept`, where its family can tell them apart.

    False for a family that cannot run layers again. transformers has a method for it, whose name differs between
    versions; the attributes below are older than both.
    """
    from torch.utils.checkpoint import checkpoint

    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in able:
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        module.gradient_checkpointing = True
    for layer in kept:
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False
    return bool(able)


def segments_grow() -> None:
    """torch's allocator on CUDA enlarges what it has reserved, so that batches of other lengths leave no holes in it.

    By its own variable, which is read with the first allocation; one that the user has set stays.
    """
    if sys.platform.startswith("linux") and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def free_workspaces() -> None:
    """Gives back what cuBLAS keeps for its products on CUDA; the next one takes it again."""
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # pyright: ignore[reportPrivateUsage]
    if clear is not None and torch.cuda.is_available():
        clear()


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot compile."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


@contextmanager
def values_unread() -> Generator[None]:
    """Inside, transformers looks into no token ids or positions, to search or to warn: on meta they have no values."""
    from transformers import PreTrainedModel, masking_utils

    readers = [
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name in readers if hasattr(owner, name)]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    for owner, name, _ in kept:
        setattr(owner, name, nothing)
    try:
        yield
    finally:
        for owner, name, reader in kept:
            setattr(owner, name, reader)


@contextmanager
def gguf_progress(report: Callable[[int, int], None]) -> Generator[None]:
    """Report tensors done while transformers dequantises a GGUF file, in place of its progress bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(items: Iterable[Any], *_: Any, total: int | None = None, **__: Any) -> Iterator[Any]:
        listed = items if hasattr(items, "__len__") else list(items)
        count = total or len(listed)  # type: ignore[arg-type]
        for done, item in enumerate(listed, start=1):
            yield item
            report(done, count)

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    setattr(reader, "tqdm", counted)  # noqa: B010 - not a public name
    try:
        yield
    finally:
        setattr(reader, "tqdm", bar)  # noqa: B010


def gguf_splits() -> dict[str, str]:
    """Names of byte-level pre-tokenizers that transformers itself converts from GGUF, with their patterns."""
    with suppress(ImportError):
        from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

        return dict(getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}))
    return {}


def gguf_remedy() -> str:
    """What to do first where GGUF's rules to split text are not known, in words; nothing where they are."""
    return "" if gguf_splits() else "install transformers 5.18 or newer, which knows more such rules, or "


def model_types() -> frozenset[str]:
    """Every `model_type` that transformers has built in."""
    from transformers.models.auto import configuration_auto as auto

    return frozenset(auto.CONFIG_MAPPING_NAMES)  # pyright: ignore[reportPrivateImportUsage]


def encoder_types() -> frozenset[str]:
    """Model types that are trained to fill masks: encoders, and a few that are encoder and decoder."""
    from transformers.models.auto import modeling_auto as auto

    return frozenset(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def decoder_types() -> frozenset[str]:
    """Model types that can predict the next token; many encoders are among them."""
    from transformers.models.auto import modeling_auto as auto

    return frozenset(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def backbone_class(config: Any) -> type[Any]:
    """The class that AutoModel would build for `config`."""
    from transformers import AutoModel

    mapping: Any = AutoModel._model_mapping  # pyright: ignore[reportPrivateUsage]
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def config_class(model_type: str) -> type[Any]:
    """The config class of a built-in `model_type`."""
    from transformers.models.auto import configuration_auto as auto

    return auto.CONFIG_MAPPING[model_type]


@cache
def config_keys(config_class: type[Any]) -> frozenset[str]:
    """The keys of config.json that a transformers config class understands.

    Its fields, its aliases, and the older spellings that it or a base class reads out of `kwargs`
    (`rope_theta`, `torch_dtype`, ...). These are read from the classes' own source, because
    nothing else tells them: a list kept here would silently drop what the next version reads.
    """
    keys: set[str] = set(getattr(config_class, "__dataclass_fields__", {}))
    keys |= set(getattr(config_class, "attribute_map", {}))
    for base in config_class.__mro__:
        if "__init__" in vars(base) and not hasattr(base, "__dataclass_fields__") and base is not object:
            keys |= set(inspect.signature(base.__init__).parameters)
        with suppress(OSError, TypeError, SyntaxError):
            keys |= _read_from_kwargs(textwrap.dedent(inspect.getsource(base)))
    return frozenset(key for key in keys if not key.startswith("_")) - {"self", "kwargs", "args"}


def _read_from_kwargs(source: str) -> set[str]:
    """Keys that a config's own methods use as kwargs.pop("k"), kwargs.get("k"), kwargs["k"] or "k" in kwargs.

    Class methods and savers are left out: what they read are arguments of a call, not keys of a file.
    """

    def is_kwargs(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == "kwargs"

    found: set[str] = set()
    for method in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        if method.name in ("save_pretrained", "push_to_hub") or "classmethod" in map(
            ast.unparse, method.decorator_list
        ):
            continue
        for node in ast.walk(method):
            candidates: list[ast.AST] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_kwargs(node.func.value):
                candidates = list(node.args[:1])
            elif isinstance(node, ast.Subscript) and is_kwargs(node.value):
                candidates = [node.slice]
            elif isinstance(node, ast.Compare) and any(is_kwargs(c) for c in node.comparators):
                candidates = [node.left]
            found |= {c.value for c in candidates if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return found


# Their position ids start after the padding token's, so the table holds that many more than the text may have.
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def positions_before_text(config: Any) -> int:
    """How many entries of the position table come before the first token's (RoBERTa's pad id + 1)."""
    if config.model_type in _OFFSET_POSITIONS:
        return int(config.pad_token_id if config.pad_token_id is not None else 1) + 1
    return 0
