"""Strict readers: what they read, and the line, the column and the remedy of what they refuse."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data import hub, jsonl, read
from tunesmith.errors import InputError, ResourceError


def rows(path: Path, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read.read(path.name, path.parent, split))


def refused(path: Path, content: bytes) -> InputError:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        rows(path)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_jsonl_rows_come_with_their_lines(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\xc3\xa9"}')
    assert rows(file) == [({"text": "a"}, "rows.jsonl:1"), ({"text": "é"}, "rows.jsonl:4")]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"a": }', "rows.jsonl:2 column 7: not JSON"),
        (b"hello", "rows.jsonl:2 column 1: not JSON"),
        (b'{"a": 1} {"a": 2}', "rows.jsonl:2 column 10: not JSON: unexpected content after document"),
        (b'{"a": NaN}', "rows.jsonl:2 column 7: NaN and Infinity are not JSON numbers"),
        (b'{"a": -Infinity}', "rows.jsonl:2 column 8: NaN and Infinity are not JSON numbers"),
        (b'{"a": 1e999}', "rows.jsonl:2 column 7: a number beyond all bounds"),
        ('{"é": "'.encode() + b'\xff"}', "rows.jsonl:2 byte column 9: not UTF-8 (byte 0xff)"),
        (b'{"a": 1, "b": 2, "a": 3}', "rows.jsonl:2: the key 'a' is given twice"),
        (b'{"m": [{"role": "user", "x": {"k": 1, "k" : 2}}]}', "rows.jsonl:2: the key 'k' is given twice"),
        (b'{"a": 1, "\\u0061": 2}', "rows.jsonl:2: the key 'a' is given twice"),
        (b'{"a": 1, "a"\t:\t2}', "rows.jsonl:2: the key 'a' is given twice"),
        (b'["a"]', "rows.jsonl:2: a record must be a JSON object, this is an array"),
        (b"null", "rows.jsonl:2: a record must be a JSON object, this is null"),
        (b'"a"', "rows.jsonl:2: a record must be a JSON object, this is the str 'a'"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "rows.jsonl:2: nested more than 64 deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "rows.jsonl:2: nested more than 64 deep"),
    ],
)
def test_jsonl_refusals_name_line_and_column(file: Path, line: bytes, cause: str) -> None:
    error = refused(file, b'{"a": 0}\n' + line + b'\n{"a": 4}\n')
    assert error.cause.startswith(cause)
    assert error.remedy


def test_an_array_in_a_jsonl_file_is_told_where_it_belongs(file: Path) -> None:
    assert refused(file, b'[{"a": 0}]\n').remedy.endswith("a JSON array belongs in a .json file")
    assert ".json file" not in refused(file, b"null\n").remedy


def test_colons_and_quotes_inside_strings_are_no_duplicate_keys(file: Path) -> None:
    row = {"a": 'say "b": c', ":": ' :) \\":', "c ": {"a": ["x :", "\t:"]}}
    file.write_text(json.dumps(row) + "\n")
    assert rows(file) == [(row, "rows.jsonl:1")]


_TEXT = st.text(alphabet='ab":\\ \t{},')
_PAIRS = st.lists(st.tuples(st.sampled_from(["a", "b", 'a"', ":", " :"]), _TEXT), min_size=1, max_size=4)


@given(_PAIRS, st.sampled_from([":", " :", ": ", "\t: "]))
def test_duplicate_keys_are_found_exactly(pairs: list[tuple[str, str]], colon: str) -> None:
    line = "{" + ", ".join(json.dumps(k) + colon + json.dumps(v) for k, v in pairs) + "}"
    if len(dict(pairs)) == len(pairs):
        assert jsonl.parse_object(line.encode(), "f:1") == dict(pairs)
    else:
        with pytest.raises(InputError, match="given twice"):
            jsonl.parse_object(line.encode(), "f:1")


def test_a_line_of_100_mb_is_refused_without_reading_it(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            stream.write(b"a" * 2**20)
        stream.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the line is longer than 32 MB"):
        rows(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    if content == b"\n \n" and name[-3:] in ("csv", "tsv"):
        content = b"text\n"  # a header alone
    assert refused(tmp_path / name, content).cause == f"{name}: the file holds no rows"


# ---------------------------------------------------------------- json


def test_json_is_a_list_or_an_object_with_data(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n {"a": 1},\n\n {"a": "]"}\n]\n')
    assert rows(file) == [({"a": 1}, "a.json:2"), ({"a": "]"}, "a.json:4")]
    file.write_text('{"version": {"x": [1]},\n "data": [{"a": 1}, {"a":\n 2}, {"b": 3}],\n "n": 2}')
    assert [where for _, where in rows(file)] == ["a.json:2", "a.json:2", "a.json:3"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ('[{"a": 1},\n {"a": 1 "b"}]', "a.json:2 column 10: not JSON"),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2 column 2: expected a comma or the end of the list"),
        ('[{"a": 1},\n {"a": NaN}]', "a.json:2 column 7: NaN and Infinity are not JSON numbers"),
        ('[{"a": 1},\n {"a": 1, "a": 2}]', "a.json:2: the key 'a' is given twice"),
        ('[{"a": 1}, 3]', "a.json:1: a record must be a JSON object, this is the int 3"),
        ('{"a": 1}', 'a.json:1 column 9: an object without "data"'),
        ('{"a": 1}\n{"a": 2}', "a.json:2 column 1: more text after the end of an object"),
        ('{"data": [{"a": 1}], "data": []}', "a.json:1 column 28: the key 'data' is given twice"),
        ('[{"a": 1}]\n{"a": 2}', "a.json:2 column 1: more text after the end of the list"),
        ('[{"a": 1}', "a.json:1 column 10: expected a comma or the end of the list"),
        ("3", "a.json:1 column 1: a .json file must hold a list of objects"),
        ("[" * 100_000, "a.json:1: nested more than 64 deep"),
    ],
)
def test_json_refusals(tmp_path: Path, content: str, cause: str) -> None:
    assert refused(tmp_path / "a.json", content.encode()).cause.startswith(cause)


def test_json_bad_utf8_names_line_and_byte(tmp_path: Path) -> None:
    error = refused(tmp_path / "a.json", b'[{"a": 1},\n{"a": "\xe9"}]')
    assert error.cause == "a.json:2 byte column 8: not UTF-8 (byte 0xe9)"


# ---------------------------------------------------------------- csv and tsv


def test_csv_rows_have_the_line_where_they_begin(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbftext, label\r\n"a, ""b""\r\nc",x\r\n\r\nd,y\r\n')
    assert rows(file) == [({"text": 'a, "b"\r\nc', "label": "x"}, "a.csv:2"), ({"text": "d", "label": "y"}, "a.csv:5")]
    tabs = tmp_path / "a.tsv"
    tabs.write_bytes(b"text\tlabel\na, b\tx\n")
    assert rows(tabs) == [({"text": "a, b", "label": "x"}, "a.tsv:2")]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"text,label\na,b\nc\n", "a.csv:3: 1 fields where the header has 2"),
        (b'text,label\n"a\nb",x\nc,d,e\n', "a.csv:4: 3 fields where the header has 2"),
        (b"text,text\na,b\n", "a.csv:1: the header has the column 'text' twice"),
        (b"text;label\na;b\n", "a.csv:1: the header is one column 'text;label'"),
        (b"text,label\na,b\nc\0d,e\n", "a.csv:3 byte column 2: a NUL byte, which no text has"),
        (b"text,label\na,\xff\n", "a.csv:2 byte column 3: not UTF-8 (byte 0xff)"),
        (b'text,label\na,b\n"c,d\n', "a.csv:3: not CSV: unexpected end of data"),
        (b'text,label\n"a"b,c\n', "a.csv:2: not CSV"),
    ],
)
def test_csv_refusals(tmp_path: Path, content: bytes, cause: str) -> None:
    assert refused(tmp_path / "a.csv", content).cause.startswith(cause)


# ---------------------------------------------------------------- parquet


def test_parquet_is_read_in_batches_with_row_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(3000)], "label": list(range(3000))}), file)
    found = rows(file)
    assert len(found) == 3000
    assert found[2999] == ({"text": "t2999", "label": 2999}, "a.parquet:3000")


def test_parquet_refusals(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.parquet", b"PAR1 nonsense").cause.startswith("a.parquet: not a whole parquet file")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: the file holds no rows"):
        rows(tmp_path / "b.parquet")
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")])
    pq.write_table(pa.table({"text": latin}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: not a whole parquet file: 'utf-8' codec"):
        rows(tmp_path / "c.parquet")


# ---------------------------------------------------------------- folders, names, memory


def write(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_folder_gives_the_files_of_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "train-00001-of-00002.jsonl", "b")
    write(folder / "train-00000-of-00002.jsonl", "a")
    write(folder / "dev.jsonl", "v")
    write(folder / "domains.jsonl", "other")
    assert [where for _, where in rows(folder)] == [
        "set/train-00000-of-00002.jsonl:1",
        "set/train-00001-of-00002.jsonl:1",
    ]
    assert rows(folder, "validation") == [({"text": "v"}, "set/dev.jsonl:1")]
    with pytest.raises(InputError, match="the folder has files for train, validation, none for test"):
        rows(folder, "test")


def test_a_folder_without_split_names_is_read_in_name_order(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "b.jsonl", "2")
    write(folder / "a.jsonl", "1")
    write(folder / ".hidden.jsonl", "no")
    assert [raw["text"] for raw, _ in rows(folder)] == ["1", "2"]
    (folder / "c.csv").write_text("text\n3\n")
    with pytest.raises(InputError, match=r"data files of more than one kind: \.csv, \.jsonl"):
        rows(folder)
    (folder / "c.csv").unlink()
    write(folder / "deep" / "c.jsonl", "3")
    with pytest.raises(InputError, match="data files of more than one folder"):
        rows(folder)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "tickets.jsonl", "a")
    with pytest.raises(InputError) as caught:
        rows(tmp_path / "tickts.jsonl")
    assert caught.value.remedy == f"did you mean 'tickets.jsonl'? it was looked for at {tmp_path / 'tickts.jsonl'}"
    for name, remedy in (("tickts.jsonl", "did you mean 'tickets.jsonl'?"), ("foo.jsonl", "check the path")):
        with pytest.raises(InputError) as caught:
            list(read.read(tmp_path / name))  # the cause has the whole path already; .jsonl alone is not near
        assert (caught.value.cause, caught.value.remedy) == (f"{tmp_path / name}: no such file or folder", remedy)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"files of kind '\.txt' are not read"):
        rows(tmp_path / "a.txt")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError) as caught:
        rows(tmp_path / "a.xlsx")
    assert caught.value.remedy.startswith("save the sheet as CSV (UTF-8); known kinds: .jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder holds no data files"):
        rows(tmp_path / "empty")
    with pytest.raises(InputError, match="there is no folder"):
        list(read.read("no/such/folder.jsonl", tmp_path))


def test_a_hub_id_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        list(read.read("nobody/nothing", tmp_path))
    assert "no such file or folder" in caught.value.cause
    assert caught.value.remedy == "go online, or give a local file or folder"


def test_a_hub_snapshot_is_read_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        write(tmp_path / "snapshot" / "data" / "test.jsonl", "t")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert list(read.read("some/set", tmp_path, "test")) == [({"text": "t"}, "some/set/data/test.jsonl:1")]
    assert asked["repo_type"] == "dataset"
    assert not any(pattern.endswith((".py", "*")) for pattern in asked["allow_patterns"])
    assert hub.hub_folder("some/set", tmp_path, (".csv",)) == tmp_path / "snapshot"


def test_rows_in_memory() -> None:
    assert list(read.read_memory([{"a": 1}, {"a": 2}], "train"))[1] == ({"a": 2}, "train[1]")
    with pytest.raises(InputError, match=r"train\[0\]: a row must be a mapping, this is str"):
        list(read.read_memory(["a"], "train"))  # type: ignore[list-item]
    with pytest.raises(InputError, match="there are no rows in memory"):
        list(read.read_memory([], "train"))


def test_fingerprint_is_sha256_of_the_content(file: Path) -> None:
    file.write_bytes(b"abc" * 10**6)
    assert read.fingerprint(file) == hashlib.sha256(b"abc" * 10**6).hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        read.fingerprint(file.with_name("absent"))
