"""Documents are found by their byte offsets, whatever blank lines, encodings and file ends surround them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_jax.data.source import DocumentSource


def test_jsonl_lines_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}\n\n  \r\n{"text": 2}\r\n{"text": 3}'.encode())
    documents = list(DocumentSource([str(path)]))
    assert [document.content for document in documents] == [
        '{"text": "é"}\n'.encode(),
        b'{"text": 2}\r\n',
        b'{"text": 3}',
    ]
    assert [document.place for document in documents] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_text_blocks_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\none\nline two\n \n\n\nthree\n\nfour")
    documents = list(DocumentSource([str(path)]))
    assert [document.content for document in documents] == [b"one\nline two\n", b"three\n", b"four"]
    assert [document.place for document in documents] == [f"{path}:2", f"{path}:7", f"{path}:9"]


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
        ("other.jsonl", "x\n", r"paths: '.*a\.jsonl' matches no file"),
        ("a.jsonl", "\n \n", r"paths: '.*a\.jsonl' holds no document"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        DocumentSource([str(tmp_path / "a.jsonl")])


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"paths: '.*a\.parquet' is neither \.jsonl nor \.txt"):
        DocumentSource([str(tmp_path / "*")])
