"""A checkpoint is whole or it is not there: round trips, every kind of damage, kills and a full disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from tunesmith import rundir
from tunesmith.engine import checkpoint
from tunesmith.errors import RefusedError, ResourceError, TunesmithError


def states(seed: int = 0) -> dict[str, dict[str, Any]]:
    torch.manual_seed(seed)
    return {
        "engine": {
            "parameters": {"a.b": torch.randn(3, 2), "half": torch.randn(5).bfloat16()},
            "moments": {"a.b": {"step": torch.tensor(4.0), "exp_avg": torch.randn(3, 2)}},
            "empty": {},
        },
        "source": {
            "step": 7,
            "epoch": 1,
            "list": [1, [2, None]],
            "text": "é",
            "best": 0.1 + 0.2,
            "ids": torch.arange(4),
        },
    }


def assert_equal(found: Any, expected: Any) -> None:
    """The same mappings, numbers, dtypes and bits."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    else:
        assert found == expected


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path / "deep" / "checkpoints", 12, states())
    assert written.path.name == "step-000012"
    assert checkpoint.found(tmp_path / "deep" / "checkpoints") == [written]
    assert_equal(checkpoint.read(written), states())
    assert not [p for p in written.path.rglob("*") if p.suffix not in (".json", ".safetensors")]


def test_strided_tensors_and_parts_of_one_are_written_as_they_look(tmp_path: Path) -> None:
    whole, halves = torch.arange(12.0).reshape(3, 4), torch.arange(10)
    state = {"s": {"turned": whole.T, "part": whole[1:, ::2], "one": halves[:5], "other": halves[5:]}}
    assert_equal(checkpoint.read(checkpoint.write(tmp_path, 1, state)), state)


def test_a_number_that_json_has_not_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write(tmp_path, 1, {"s": {"best": float("nan")}})
    assert checkpoint.found(tmp_path) == []


@pytest.mark.parametrize("file", ["engine.safetensors", "engine.json", "source.safetensors", "source.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_is_refused_by_name(file: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path, 3, states())
    damage(written.path / file)
    with pytest.raises(RefusedError) as error:
        checkpoint.read(written)
    assert error.value.exit_code == 3
    word = "missing" if damage is Path.unlink else "damaged"
    assert error.value.cause.startswith(f"{written.path / file} is {word}")
    assert str(written.path) in error.value.remedy


def test_any_bit_of_the_hashes_is_noticed(tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path, 3, {"s": {"n": 1}})
    path = written.path / "hashes.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content)):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(TunesmithError, match=re.escape(str(written.path))):
            checkpoint.read(written)


@pytest.mark.parametrize("content", [b'{"s.json": "ab', b"[1]", b"\xff\xfe", b"", None])
def test_broken_hashes_are_refused_like_any_other_file(content: bytes | None, tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path, 3, {"s": {"n": 1}})
    path = written.path / "hashes.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RefusedError) as error:
        checkpoint.read(written)
    assert error.value.cause.startswith(f"{path} is {'missing' if content is None else 'damaged'}: ")
    assert error.value.remedy.startswith(f"delete {written.path} to go on from the checkpoint before it")


def test_only_whole_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert checkpoint.found(tmp_path / "nowhere") == []
    made = [checkpoint.write(tmp_path, step, {"s": {"n": step}}) for step in (1000000, 5, 40)]
    (tmp_path / "step-000050").mkdir()  # no hashes: copied by hand, or not a checkpoint
    (tmp_path / ".step-000060.part").mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "hashes.json").write_text("{}")
    assert checkpoint.found(tmp_path) == [made[1], made[2], made[0]]
    assert [c.step for c in checkpoint.found(tmp_path)] == [5, 40, 1000000]


def test_pruning_keeps_what_it_is_told_and_sweeps_after_kills(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.write(tmp_path, step, {"s": {"n": step}})
    for name in (".step-000009.part", ".step-000008.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.json").write_text("{}")
    checkpoint.prune(tmp_path, [2, 4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004"]
    assert [checkpoint.read(c)["s"]["n"] for c in checkpoint.found(tmp_path)] == [2, 4]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 2, {"s": {"n": 1}, "gone": {}})
    again = checkpoint.write(tmp_path, 2, {"s": {"n": 2}})
    assert checkpoint.read(again) == {"s": {"n": 2}}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("code", sorted(rundir.FULL))
@pytest.mark.parametrize("write", range(1, 6))
def test_a_full_disk_leaves_the_previous_checkpoint_intact(
    code: int, write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.write(tmp_path, 1, states())
    calls: list[int] = []

    def full(handle: BinaryIO, content: bytes) -> None:
        calls.append(1)
        if len(calls) == write:
            handle.write(content[: len(content) // 2])
            raise OSError(code, "no space")
        handle.write(content)

    monkeypatch.setattr(rundir, "write_bytes", full)
    with pytest.raises(ResourceError, match="the disk is full while writing") as error:
        checkpoint.write(tmp_path, 2, states(1))
    assert error.value.exit_code == 4
    assert str(tmp_path) in error.value.cause
    assert checkpoint.found(tmp_path) == [before]
    assert_equal(checkpoint.read(before), states())
    monkeypatch.undo()
    assert_equal(checkpoint.read(checkpoint.write(tmp_path, 2, states(1))), states(1))  # once there is space again


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("place", ["write_bytes", "sync_file", "rename", "sync_folder"])
def test_killed_at_any_call_a_save_is_whole_or_not_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(rundir, place)
    for number in range(1, 20):
        folder = tmp_path / str(number)
        before = checkpoint.write(folder, 1, states())
        calls: list[int] = []

        def killed(*given: Any, number: int = number, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == number:
                raise KilledError
            real(*given)

        monkeypatch.setattr(rundir, place, killed)
        with suppress(KilledError):
            checkpoint.write(folder, 2, states(1))
        monkeypatch.setattr(rundir, place, real)
        assert_equal(checkpoint.read(before), states())
        found = checkpoint.found(folder)
        assert [c.step for c in found] in ([1], [1, 2])
        assert_equal(checkpoint.read(found[-1]), states(len(found) - 1))
        assert_equal(checkpoint.read(checkpoint.write(folder, 2, states(2))), states(2))  # the resumed run's
        if len(calls) < number:
            assert number > 1
            return
    raise AssertionError(f"{place} was never free of kills")


def test_a_disk_that_fails_otherwise_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: BinaryIO) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(rundir, "sync_file", failing)
    with pytest.raises(ResourceError, match=r"cannot write .*engine\.safetensors: Input/output error"):
        checkpoint.write(tmp_path, 2, states())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_while_a_step_is_saved_again_one_of_both_is_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rundir.RunDir(tmp_path)
    checkpoint.write(run.checkpoints, 1, states())
    real = rundir.rename
    calls: list[Path] = []

    def killed(source: Path, target: Path) -> None:
        calls.extend([source] if source.is_dir() else [])
        if len(calls) == number and source.is_dir():
            raise KilledError
        real(source, target)

    monkeypatch.setattr(rundir, "rename", killed)
    with suppress(KilledError):
        checkpoint.write(run.checkpoints, 1, states(1))
    monkeypatch.undo()
    assert len(calls) == min(number, 2)  # the old one aside, the new one into place
    with run.hold():
        (found,) = checkpoint.found(run.checkpoints)
        assert_equal(checkpoint.read(found), states(1 if number == 3 else 0))
        checkpoint.prune(run.checkpoints, [1])
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000001"]
