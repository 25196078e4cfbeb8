"""Checkpoints beside training: the copy is of its step, one write at a time, and no failure is lost."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from tunesmith import rundir
from tunesmith.engine import checkpoint, snapshot
from tunesmith.engine.saving import Writer
from tunesmith.errors import ResourceError


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).mul(50).to(dtype)


def mixed() -> dict[str, Tensor]:
    """Every dtype, wide and narrow in turn, with a scalar, nothing at all, and views."""
    found = {f"{dtype}/{size}": drawn(dtype, size, 3) for size in (1, 5, 0) for dtype in reversed(snapshot.DTYPES)}
    whole = drawn(torch.float32, 6, 4)
    return found | {"scalar": torch.tensor(4.0), "turned": whole.T, "strided": whole[1::2, ::3], "é": whole[:, 1]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert (
            found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().contiguous().view(torch.uint8).tolist()
        )


def test_safetensors_reads_what_was_laid_out_and_each_tensor_is_aligned() -> None:
    tensors = mixed()
    content = bytes(snapshot.safetensors(tensors))
    assert_same(load(content), tensors)
    header = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + header]).items():
        assert (8 + header + entry["data_offsets"][0]) % tensors[name].itemsize == 0
    assert load(bytes(snapshot.safetensors({}))) == {}


def test_loads_are_the_pieces_in_order_and_none_is_above_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BUFFER", 10)
    pieces = [
        torch.arange(start, start + size) for start, size in ((0, 3), (3, 7), (10, 1), (11, 25), (36, 0), (36, 9))
    ]
    loads = list(snapshot._loads(pieces))
    assert [sum(map(len, load)) for load in loads] == [10, 1, 10, 10, 5, 9]
    assert torch.cat([piece for load in loads for piece in load]).tolist() == list(range(45))


@pytest.mark.gpu
@pytest.mark.parametrize("buffer", [64, 1000, snapshot.BUFFER])
def test_what_comes_from_a_device_is_of_its_step(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BUFFER", buffer)
    tensors = {**mixed(), **{f"large/{i}": torch.randn(2**22) for i in range(20 if buffer > 1000 else 0)}}
    placed = {name: tensor.cuda() for name, tensor in tensors.items()} | {"here": torch.arange(7)}
    for tensor in placed.values():
        tensor.copy_(tensor.clone())  # still under way when the copy is asked for
    content = snapshot.safetensors(placed)
    for tensor in placed.values():
        tensor.zero_()
    assert_same(load(bytes(content)), tensors | {"here": torch.arange(7)})


class Held:
    """`checkpoint.put`, held up until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._put = checkpoint.put

    def __call__(self, *given: Any) -> checkpoint.Checkpoint:
        self.begun.set()
        assert self.go.wait(30)
        return self._put(*given)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    made = Held()
    monkeypatch.setattr(checkpoint, "put", made)
    return made


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path)
    yield made
    made.close()


def state(number: float) -> dict[str, Any]:
    return {"s": {"t": torch.full((3,), number), "nested": {"list": [number]}}}


def read(folder: Path) -> dict[int, list[float]]:
    """What the complete checkpoints hold, by step."""
    return {found.step: checkpoint.read(found)["s"]["t"].tolist() for found in checkpoint.found(folder)}


def test_a_snapshot_is_not_changed_by_what_follows(writer: Writer, held: Held, tmp_path: Path) -> None:
    states = state(1.0)
    writer.write(1, states, keep=())
    assert held.begun.wait(30)
    states["s"]["t"].add_(1)
    states["s"]["nested"]["list"].append(2.0)
    states["s"]["nested"]["more"] = 3
    assert checkpoint.found(tmp_path) == []
    held.go.set()
    writer.wait()
    (found,) = checkpoint.found(tmp_path)
    assert checkpoint.read(found)["s"]["nested"] == {"list": [1.0]}
    assert read(tmp_path) == {1: [1.0] * 3}


def test_a_save_waits_for_the_one_before_and_copies_only_then(
    writer: Writer, held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = checkpoint.snapshot
    monkeypatch.setattr(checkpoint, "snapshot", lambda states: taken.append(1) or real(states))
    writer.write(1, state(1.0), keep=())
    second = threading.Thread(target=writer.write, args=(2, state(2.0), ()))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert len(taken) == 1
    held.go.set()
    second.join(30)
    writer.wait()
    assert read(tmp_path) == {2: [2.0] * 3}


def test_the_last_complete_one_goes_only_when_the_next_is_complete(writer: Writer, held: Held, tmp_path: Path) -> None:
    held.go.set()
    for step, keep in ((1, ()), (2, (1,)), (3, (2,))):
        writer.write(step, state(step), keep)
    writer.wait()
    assert list(read(tmp_path)) == [2, 3]
    held.go.clear()
    held.begun.clear()
    writer.write(4, state(4.0), keep=())
    assert held.begun.wait(30)
    assert list(read(tmp_path)) == [2, 3]
    held.go.set()
    writer.wait()
    assert list(read(tmp_path)) == [4]


@pytest.mark.parametrize("tells", [lambda w: w.write(2, state(2.0), ()), Writer.wait, Writer.close])
def test_what_a_write_fails_with_is_told_once_by_whatever_comes_next(
    tells: Callable[[Writer], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_bytes", full)
        writer.write(1, state(1.0), keep=())
        with pytest.raises(ResourceError, match=r"the disk is full while writing .*s\.safetensors") as caught:
            tells(writer)
    assert caught.value.exit_code == 4
    assert checkpoint.found(tmp_path) == []
    writer.close()


def test_what_json_has_not_is_told_at_once(writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write(1, {"s": {"best": float("nan")}}, keep=())
    writer.close()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_of_the_wait_loses_no_failure(
    writer: Writer, held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    writer.write(1, state(1.0), keep=())
    with monkeypatch.context() as patch:
        patch.setattr(futures, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.wait()
    (tmp_path / ".step-000001.part").write_text("in the way of a folder")
    held.go.set()
    with pytest.raises(ResourceError, match=r"cannot write .*step-000001"):
        writer.close()
