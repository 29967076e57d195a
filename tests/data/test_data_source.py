"""Documents are found by offset, row or record, whatever blank lines, encodings and file ends surround them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from qwen3_jax.data.source import DocumentSource

RECORDS: list[dict[str, Any]] = [
    {"text": "é\n\n1", "labels": {"domain": "math"}},
    {"text": "2"},
    {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]},
    {"text": "5", "labels": {"domain": "web"}},
]


def test_jsonl_lines_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}\n\n  \r\n{"text": 2}\r\n{"text": 3}'.encode())
    documents = list(DocumentSource([str(path)]))
    assert [document.content for document in documents] == [
        '{"text": "é"}\n'.encode(),
        b'{"text": 2}\r\n',
        b'{"text": 3}',
    ]
    assert [document.location for document in documents] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_text_blocks_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\none\nline two\n \n\n\nthree\n\nfour")
    documents = list(DocumentSource([str(path)]))
    assert [document.content for document in documents] == [b"one\nline two\n", b"three\n", b"four"]
    assert [document.location for document in documents] == [f"{path}:2", f"{path}:7", f"{path}:9"]


def _write(path: Path) -> None:
    """RECORDS in the format of the path's suffix; Parquet in row groups of 3 with a column that nobody asked for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif path.suffix == ".parquet":
        rows = [{"url": "u", **record} for record in RECORDS]
        parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()), path, row_group_size=3)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in RECORDS:
            writer.write(json.dumps(record).encode())
        writer.close()


def _schema() -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    labels = pa.struct([("domain", pa.string())])
    return pa.schema([("url", pa.string()), ("text", pa.string()), ("messages", pa.list_(message)), ("labels", labels)])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrayrecord"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_format_holds_the_same_records(
    tmp_path: Path, suffix: str, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local, and on a file system reached through fsspec as gs:// is."""
    _write(tmp_path / f"a.{suffix}")
    path = str(tmp_path / f"a.{suffix}")
    if remote:
        monkeypatch.setenv("HOME", str(tmp_path))
        path = f"memory://{tmp_path.name}/a.{suffix}"
        fsspec.filesystem("memory").put(str(tmp_path / f"a.{suffix}"), path)
        source = DocumentSource([path.replace("/a.", "/*.")])
    else:
        source = DocumentSource([path])
    assert len(source) == len(RECORDS)
    for index in (3, 0, 2, 1):
        assert json.loads(source[index].content) == RECORDS[index]
        assert source[index].location.endswith(f"a.{suffix}:{index + 1}")


def test_random_access_over_globs_and_files(tmp_path: Path) -> None:
    for name, count in (("b2", 1), ("b1", 3), ("a", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{name}-{i}\n" for i in range(count)))
    source = DocumentSource([str(tmp_path / "b*.jsonl"), str(tmp_path / "a.jsonl")])
    expected = [b"b1-0\n", b"b1-1\n", b"b1-2\n", b"b2-0\n", b"a-0\n", b"a-1\n"]
    assert len(source) == 6
    for index in (5, 0, 3, 2, 4, 1):
        assert source[index].content == expected[index]
    with pytest.raises(IndexError):
        source[6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.jsonl", "x\n", r"sources\.web\.paths: '.*a\.\*' matches no file"),
        ("a.jsonl", "\n \n", r"sources\.web\.paths: '.*a\.jsonl' holds no document"),
        ("a.csv", "x", r"sources\.web\.paths: '.*a\.csv' has an unknown format; use one of \.jsonl, .*\.arrayrecord"),
        ("a.parquet", "x" * 100, r"(?s)sources\.web\.paths: '.*a\.parquet' cannot be read"),
        ("a.arrayrecord", "x" * 100, r"sources\.web\.paths: '.*a\.arrayrecord'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        DocumentSource([str(tmp_path / "a.*")], "sources.web.paths")
    assert len(str(error.value).splitlines()) == 1


def test_parquet_gives_bytes_as_text_and_no_padding_of_structs(tmp_path: Path) -> None:
    """Tools of two shapes share one Arrow struct: each row has the other's fields, as nulls."""
    tools = [[{"name": "f", "parameters": {"x": 1}}], [{"name": "g", "parameters": {"y": {"z": "a"}}}]]
    rows = [{"text": b"\xc3\xa9", "tools": tool} for tool in tools]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents = list(DocumentSource([str(tmp_path / "a.parquet")]))
    assert [json.loads(document.content) for document in documents] == [{"text": "é", "tools": tool} for tool in tools]
    parquet.write_table(pa.table({"text": [b"\xff"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet:1: 'utf-8' codec can't decode byte 0xff"):
        list(DocumentSource([str(tmp_path / "b.parquet")]))


@pytest.mark.parametrize("path", ["s3://b/x.jsonl", "abc://x.jsonl", "https://localhost:1/x.jsonl"])
def test_what_no_file_system_here_reads_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^sources\.c\.paths: '{path}' (cannot be listed|matches no file)[^\n]*; use "
    ):
        DocumentSource([path], "sources.c.paths")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "is gzip; decompress it"),
        ('{"text": "a"}'.encode("utf-16"), "is UTF-16; use UTF-8"),
        (b"PAR1", "is Parquet; use JSON lines"),
        (b'\xef\xbb\xbf[{"text": "a"}]', "begins as a JSON array; use one object a line"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^paths: '.*a\.jsonl' cannot be read \({message}"):
        DocumentSource([str(tmp_path / "a.jsonl")])


def test_parquet_without_the_columns_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet\' cannot be read \(columns body; use text, or messages\)"):
        DocumentSource([str(tmp_path / "*")])
