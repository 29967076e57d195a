"""What infer.py's input may be: JSON lines, gzip, a JSON array, an OpenAI batch file; and what it may not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qwen3_jax.serve.input_file import STDIN, open_lines, read_record

RECORDS = [{"id": "a", "prompt": "ü"}, {"id": "b", "prompt": "y"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file, read twice, and what was announced."""
    said: list[str] = []
    with open_lines(path, said.append) as file:
        first = [read_record(line) for line in file if line.strip()]
        file.seek(0)
        assert [read_record(line) for line in file if line.strip()] == first
    return first, said


@pytest.mark.parametrize(
    ("content", "taken_for"),
    [
        (LINES, []),
        (b"\xef\xbb\xbf" + LINES, []),
        (gzip.compress(LINES, mtime=0), ["gzip"]),
        (json.dumps(RECORDS).encode(), ["a JSON array of 2 records"]),
        (b"\xef\xbb\xbf \n" + json.dumps(RECORDS, indent=1).encode(), ["a JSON array of 2 records"]),
        (gzip.compress(json.dumps(RECORDS).encode(), mtime=0), ["gzip", "a JSON array of 2 records"]),
    ],
)
def test_what_is_read_says_what_it_was_taken_for(tmp_path: Path, content: bytes, taken_for: list[str]) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    records, said = _read(path)
    assert records == RECORDS
    assert [line.removeprefix(f"{path}: taken for ").split(";")[0] for line in said] == taken_for


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINES, mtime=0))))
    assert _read(STDIN)[0] == RECORDS


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As the shell's `<(...)` is one."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(LINES,))
    writer.start()
    assert _read(tmp_path / "pipe")[0] == RECORDS
    writer.join()


def _parquet(path: Path) -> None:
    parquet.write_table(pa.table({"prompt": ["x"]}), path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in.jsonl", LINES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_parquet, "is Parquet; use JSON lines"),
        (_zip, "is a zip archive; unpack it"),
        (lambda path: path.write_text("{}", encoding="utf-16"), "is UTF-16; use UTF-8"),
        (lambda path: path.write_text('{"prompt": "x"}', encoding="utf-16-le"), "holds zero bytes"),
        (lambda path: path.write_bytes(bz2.compress(LINES)), "is compressed by bzip2; decompress it"),
        (lambda path: path.write_bytes(lzma.compress(LINES)), "is compressed by xz; decompress it"),
        (lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)[:-9]), "is a damaged gzip file"),
        (lambda path: path.write_text('[{"prompt": "x"},'), "begins as a JSON array, but is not valid JSON"),
        (lambda path: path.mkdir(), "does not exist; use a JSONL file"),
    ],
)
def test_what_is_not_text_is_refused_by_name(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "in"
    make(path)
    with pytest.raises(ValueError, match=rf"^input: '{path}' {message}"), open_lines(path, lambda text: None):
        pass


def test_an_openai_batch_line_becomes_a_record() -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {
        "model": "m",
        "messages": messages,
        "max_tokens": 9,
        "temperature": 0,
        "stop": ["x"],
        "stream": False,
        "n": 1,
    }
    body |= {"chat_template_kwargs": {"enable_thinking": False}, "user": None}
    line = {"custom_id": "q-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert read_record(json.dumps(line).encode()) == {
        "id": "q-1",
        "messages": messages,
        "max_new_tokens": 9,
        "temperature": 0,
        "stop": ["x"],
        "enable_thinking": False,
    }
    line["body"] = {"prompt": "Once", "max_completion_tokens": 3}
    assert read_record(json.dumps(line).encode()) == {"id": "q-1", "text": "Once", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (3, "body: 3; use an object"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, r"body\.max_completion_tokens: 3, but 2 under another name"),
        ({"n": 2}, r"body\.n: 2; leave it out \(infer\.py has --samples"),
        ({"stream": True}, r"body\.stream: True; leave it out"),
        ({"chat_template_kwargs": {"a": 1}}, r"body\.chat_template_kwargs: \{'a': 1\}; use enable_thinking alone"),
    ],
)
def test_what_a_batch_line_cannot_ask_is_refused(body: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        read_record(json.dumps({"custom_id": "a", "body": body}).encode())


@pytest.mark.parametrize("record_id", [1.5, [1], True, {}])
def test_an_id_is_a_string_or_a_number(record_id: Any) -> None:
    with pytest.raises(ValueError, match=r"^id: .*; use a string or a whole number"):
        read_record(json.dumps({"id": record_id}).encode())
