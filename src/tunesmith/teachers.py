"""The model that a student learns from: found before weights load, and checked to speak the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import InputError
from tunesmith.models.fetch import LocalModel, resolve
from tunesmith.models.load import load_tokenizer, meta_model
from tunesmith.models.saved import CARD, folder_of, read_card
from tunesmith.types import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Teacher:
    """A base, or a trained model (`folder`) on it. `sha256` is of the weights that answer, adapter and all."""

    name: str
    local: LocalModel
    folder: Path | None
    sha256: str
    kind: ModelKind
    parameters: int
    packable: bool

    def told(self) -> dict[str, str]:
        """What plan, manifest and card say of it."""
        return {"name": self.name, "base": self.local.name, "sha256": self.sha256}


def find(named: str, base: Path) -> Teacher:
    """A run, an exported model, or anything that a recipe may name as `model`; relative paths start at `base`.

    Raises InputError where it is none of them, or gives no words' probabilities; what loading a base raises.
    """
    from tunesmith.facts import is_packable

    path = (base / named).resolve()
    folder = folder_of(path) if any((place / CARD).is_file() for place in (path, path / "model")) else None
    if folder is None and (path / "manifest.json").is_file():
        folder = folder_of(path)  # which says that the run is not finished
    if folder is None:
        local = resolve(str(path) if path.exists() else named)
        sha256 = local.sha256
    else:
        card = read_card(folder)
        if card["head"] != "lm":
            raise InputError(
                f"teacher: {named} was trained for {card['objective']['name']}, and tells no token's probability",
                "name a language model",
            )
        local = resolve(card["base"]["name"])
        sha256 = _digest(card)
    meta = meta_model(local, "lm")
    return Teacher(named, local, folder, sha256, meta.kind, meta.parameters, is_packable(meta))


def check_tokens(teacher: Teacher, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises InputError where the two read a text as different tokens: then neither judges the other's."""
    theirs, ours = _reading(load_tokenizer(teacher.local)), _reading(tokenizer)
    if theirs != ours:
        raise InputError(
            f"teacher: {teacher.name} has another tokenizer than the student, so it has no opinion of the same tokens",
            "let it answer the training prompts (`tunesmith predict`) and train on its answers by sft, or choose a "
            "student of its family",
        )


def _reading(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """What decides the tokens of a text."""
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.model)
    return (tokenizer.get_vocab(), *(part.__getstate__() if part is not None else None for part in parts))


def _digest(card: dict[str, Any]) -> str:
    """sha256 over all that answers: the base, and what was saved with the card."""
    import hashlib

    weights = sorted((name, digest) for name, digest in card["files"].items() if name.endswith(".safetensors"))
    return hashlib.sha256(repr([card["base"]["sha256"], weights]).encode()).hexdigest()
