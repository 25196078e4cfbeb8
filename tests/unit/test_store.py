"""TokenStore: what goes in comes out; whole on disk or not there; damage is noticed and mended."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import aside
from tunesmith.data.rows import RowStore, encode, write_rows
from tunesmith.data.store import TokenStore
from tunesmith.errors import InputError, ResourceError
from tunesmith.types import Example, Piece, Row


def piece(ids: list[int], weights: list[float] | None = None, role: str = "text", stream: str = "input") -> Piece:
    weights_T = None if weights is None else np.array(weights, dtype=np.float32)
    return Piece(np.array(ids, dtype=np.int32), weights_T, role, stream)


def plain(example: Example) -> Any:
    """An example as nested Python values, so that == compares all of it."""
    pieces = [
        (p.input_ids_T.tolist(), None if p.weights_T is None else p.weights_T.tolist(), p.role, p.stream)
        for p in example.pieces
    ]
    return pieces, dict(example.columns), example.cut, example.cut_trained


PAIRS = [
    (Example((piece([1, 2, 3], [0, 0, 1]),), {"label": 3, "reward": 1}, 0, 0), Row({"text": "a"}, "f:1")),
    (
        Example(
            (piece([4], None, "query"), piece([5, 6], [0.5, 0], "passage", "decoder")), {"label": 4, "reward": 0.5}
        ),
        Row({"text": "\u00e9\n"}, "f:2"),
    ),
    (Example((), {"label": -1, "reward": 2}, 7, 2), Row({"messages": [{"role": "user"}]}, "f:3")),
]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", PAIRS)
    assert len(store) == 3
    assert [plain(store.example(i)) for i in range(3)] == [plain(example) for example, _ in PAIRS]
    assert [store.row(i) for i in range(3)] == [row for _, row in PAIRS]
    assert store.lengths.tolist() == [3, 3, 0]
    assert store.trained.tolist() == [1, 1, 0]
    assert store.lengths.dtype == store.trained.dtype == np.int64
    assert (store.cut.tolist(), store.cut_trained.tolist()) == ([0, 0, 7], [0, 0, 2])
    assert store.columns == ("label", "reward")
    assert store.column("label").dtype == np.int64
    assert store.column("reward").tolist() == [1.0, 0.5, 2.0]
    with pytest.raises(KeyError, match="label, reward"):
        store.column("score")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.example(index)
    store.example(0).pieces[0].input_ids_T[0] = 9  # a copy: torch takes it without a warning, the file stays
    assert store.example(0).pieces[0].input_ids_T[0] == 1


_NUMBER = st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=False))
_PIECE = st.builds(
    lambda pairs, weighted, role, stream: piece(
        [i for i, _ in pairs], [w for _, w in pairs] if weighted else None, role, stream
    ),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(0, 1, width=32)), max_size=5),
    st.booleans(),
    st.sampled_from(["text", "chosen", "rejected"]),
    st.sampled_from(["input", "decoder"]),
)
_EXAMPLE = st.builds(
    lambda pieces, a, b, cut: Example(tuple(pieces), {"a": a, "b": b}, cut, cut // 2),
    st.lists(_PIECE, max_size=3),
    _NUMBER,
    st.integers(),
    st.integers(0, 99),
).filter(lambda e: abs(e.columns["b"]) < 2**63)
_VALUE = st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3)


@settings(max_examples=40)
@given(st.lists(st.tuples(_EXAMPLE, _VALUE), max_size=6), st.data())
def test_round_trip_and_views(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], data: st.DataObject) -> None:
    pairs = [(example, Row(value, f"f:{i}")) for i, (example, value) in enumerate(drawn)]
    store = TokenStore.build(tmp_path_factory.mktemp("store") / "s", pairs)
    assert [plain(store.example(i)) for i in range(len(store))] == [plain(example) for example, _ in pairs]
    if pairs:
        index = data.draw(st.lists(st.integers(0, len(pairs) - 1), max_size=8))
        view = store.select(np.array(index, dtype=np.int64))
        assert [view.row(i) for i in range(len(view))] == [pairs[i][1] for i in index]
        assert view.lengths.tolist() == [store.lengths[i] for i in index]
        assert view.column("a").tolist() == [store.column("a")[i] for i in index]


def test_views_of_views_and_their_fingerprints(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", PAIRS)
    view = store.select(np.array([2, 1, 1]))
    assert [view.select(np.array([1, 0])).row(i).where for i in range(2)] == ["f:2", "f:3"]
    assert len({store.fingerprint, view.fingerprint, store.select(np.array([2])).fingerprint}) == 3
    assert store.select(np.array([2, 1, 1])).fingerprint == view.fingerprint
    with pytest.raises(IndexError):
        view.select(np.array([3]))
    again = pickle.loads(pickle.dumps(view))
    assert plain(again.example(1)) == plain(view.example(1))
    assert again.fingerprint == view.fingerprint


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, same = TokenStore.build(tmp_path / "a", PAIRS), TokenStore.build(tmp_path / "b", PAIRS)
    assert one.fingerprint == same.fingerprint
    weights = Example((piece([1, 2, 3], [0, 1, 1]),), {"label": 3, "reward": 1.0})
    assert TokenStore.build(tmp_path / "c", [(weights, PAIRS[0][1]), *PAIRS[1:]]).fingerprint != one.fingerprint


def test_mistakes_of_an_objective_stop_the_build_and_leave_nothing(tmp_path: Path) -> None:
    row = Row({"text": "a"}, "f:1")
    with pytest.raises(ValueError, match="2 tokens and 1 weights"):
        TokenStore.build(tmp_path / "s", [(Example((piece([1, 2], [1]),)), row)])
    pairs = [(Example((), {"a": 1}), row), (Example((), {"b": 1}), row)]
    with pytest.raises(ValueError, match=r"columns \['b'\], others \['a'\]"):
        TokenStore.build(tmp_path / "s", pairs)
    assert [p.name for p in tmp_path.iterdir()] == ["s.lock"]


def refuse() -> Iterator[tuple[Example, Row]]:
    raise AssertionError("a whole store must not be built again")
    yield


def test_a_whole_store_is_not_built_again(tmp_path: Path) -> None:
    first = TokenStore.build(tmp_path / "s", PAIRS)
    assert TokenStore.build(tmp_path / "s", refuse()).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tokens", "weights", "pieces", "examples", "rows.jsonl", "column-0", "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_a_damaged_store_is_rebuilt(tmp_path: Path, name: str, how: str) -> None:
    first = TokenStore.build(tmp_path / "s", PAIRS)
    file = tmp_path / "s" / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[1:-1])
    again = TokenStore.build(tmp_path / "s", PAIRS)
    assert again.fingerprint == first.fingerprint
    assert plain(again.example(1)) == plain(PAIRS[1][0])


def _build_slowly(path: Path) -> None:
    def slowly() -> Iterator[tuple[Example, Row]]:
        while True:
            yield PAIRS[0]
            time.sleep(0.001)

    TokenStore.build(path, slowly())


def test_a_kill_leaves_no_half_store(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_build_slowly, args=(tmp_path / "s",))
    process.start()
    while not (tmp_path / "s.part" / "tokens").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "s").exists()
    assert len(TokenStore.build(tmp_path / "s", PAIRS)) == 3
    assert not (tmp_path / "s.part").exists()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def fill(build: aside.Build) -> dict[str, Any]:
        build.file("a").write(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="the disk is full"):
        aside.open_or_build(tmp_path / "s", fill)
    assert not (tmp_path / "s.part").exists()


def test_reading_takes_pages_of_the_file_not_memory(tmp_path: Path) -> None:
    ids, weights = np.arange(2**20, dtype=np.int32), np.ones(2**20, dtype=np.float32)
    pairs = ((Example((Piece(ids, weights),)), Row({"text": "x" * 1000}, f"f:{i}")) for i in range(32))
    store = TokenStore.build(tmp_path / "s", pairs)  # 256 MB
    memory = psutil.Process().memory_info()
    before = memory.rss - memory.shared
    assert sum(int(store.example(i).pieces[0].input_ids_T[-1]) for i in range(32)) == 32 * (2**20 - 1)
    memory = psutil.Process().memory_info()
    assert memory.rss - memory.shared - before < 64 * 2**20
    shutil.rmtree(tmp_path / "s")


# ---------------------------------------------------------------- rows


def row_store(path: Path, values: list[dict[str, Any]], format: str) -> RowStore:
    def make(build: aside.Build) -> dict[str, Any]:
        rows = (Row(value, f"f:{i}") for i, value in enumerate(values))
        return {**write_rows(build, rows), "kind": "label", "format": format, "sources": []}

    aside.open_or_build(path, make)
    return RowStore(path)


def test_row_store_numbers_labels_by_name(tmp_path: Path) -> None:
    store = row_store(
        tmp_path / "r", [{"text": t, "label": label} for t, label in ("az", "ba", "cz", "dm")], "text+label"
    )
    assert store.labels == ["a", "m", "z"]
    assert store.codes.tolist() == [2, 0, 2, 1]
    assert store.stratifies
    assert pickle.loads(pickle.dumps(store)).row(1) == Row({"text": "b", "label": "a"}, "f:1")
    several = row_store(
        tmp_path / "m", [{"text": "a", "labels": ["y", "x"]}, {"text": "b", "labels": []}], "text+labels"
    )
    assert (several.codes.tolist(), several.starts.tolist()) == ([1, 0], [0, 2, 2])
    assert not several.stratifies
    assert several.labelled


@pytest.mark.parametrize("value", [{"text": "\ud800"}, {"text": object()}, {1: "a"}])
def test_what_json_cannot_hold_is_refused(value: dict[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"f:1: the row cannot be written as JSON"):
        encode(Row(value, "f:1"))
