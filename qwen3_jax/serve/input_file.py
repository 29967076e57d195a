"""The files that infer.py reads: JSON lines, as they are or gzipped, a JSON array, or an OpenAI batch file."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qwen3_jax.text.records import other_than_text, parse_json, parse_record

STDIN = Path("-")

_HEAD = 4096
_GZIP = b"\x1f\x8b"
# OpenAI's names of settings that have another one here.
_OPENAI_NAMES: dict[str, str] = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OPENAI_NEUTRAL = {"stream": (False,), "n": (1,), "logprobs": (False,), "store": (False, True), "top_logprobs": (0,)}
_OPENAI_IGNORED = ("model", "user", "metadata", "stream_options")


@contextlib.contextmanager
def open_lines(source: Path, announce: Callable[[str], None]) -> Iterator[IO[bytes]]:
    """A file of JSON lines that can be read more than once. Standard input (`-`), gzip and JSON arrays are written to
    a temporary file first.

    Raises:
      ValueError: the file does not exist, is not text, or is a damaged gzip or array.
    """
    if source != STDIN and (not source.exists() or source.is_dir()):
        raise ValueError(f"input: {str(source)!r} does not exist; use a JSONL file, or - for standard input")
    with contextlib.ExitStack() as stack:
        if source == STDIN:
            file = _copy(sys.stdin.buffer, stack.enter_context(tempfile.TemporaryFile()))
        else:
            file = stack.enter_context(source.open("rb"))
            if not source.is_file():  # a pipe, as the shell's <(...), which is read once only
                file = _copy(file, stack.enter_context(tempfile.TemporaryFile()))
        if file.read(len(_GZIP)) == _GZIP:
            file.seek(0)
            announce(f"{source}: taken for gzip")
            try:
                with gzip.open(file) as unzipped:
                    file = _copy(unzipped, stack.enter_context(tempfile.TemporaryFile()))
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"input: {str(source)!r} is a damaged gzip file ({error})") from None
        file.seek(0)
        head = file.read(_HEAD)
        if what := other_than_text(head):
            raise ValueError(f"input: {str(source)!r} {what}")
        file.seek(0)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            elements = _elements(source, file.read())
            announce(f"{source}: taken for a JSON array of {len(elements)} records; line n is the n-th")
            file = stack.enter_context(tempfile.TemporaryFile())
            file.writelines(json.dumps(element, ensure_ascii=False).encode() + b"\n" for element in elements)
            file.seek(0)
        yield file


def read_record(line: bytes) -> dict[str, Any]:
    """The record of a line; one of an OpenAI batch file is turned into ours.

    Raises:
      ValueError: `field: value; what to use instead`, or the line is no JSON object.
    """
    record = parse_record(line)
    if "custom_id" in record and "body" in record:
        record = _from_openai(record)
    if isinstance(record.get("id"), bool) or not isinstance(record.get("id", 0), str | int):
        raise ValueError(f"id: {record['id']!r:.40}; use a string or a whole number")
    return record


def _copy(file: Any, to: IO[bytes]) -> IO[bytes]:
    shutil.copyfileobj(file, to)
    to.seek(0)
    return to


def _elements(source: Path, content: bytes) -> list[Any]:
    try:
        return list(parse_json(content))
    except ValueError as error:
        raise ValueError(f"input: {str(source)!r} begins as a JSON array, but is {error}") from None


def _from_openai(request: dict[str, Any]) -> dict[str, Any]:
    """Our record of an OpenAI batch request: `custom_id` becomes `id`, the `body` its fields."""
    body: dict[str, Any] = request["body"]
    if not isinstance(body, dict):
        raise ValueError(f"body: {body!r:.40}; use an object")
    record: dict[str, Any] = {"id": request["custom_id"]}
    for name, value in body.items():
        if value is None or name in _OPENAI_IGNORED:
            continue
        if name in _OPENAI_NEUTRAL:
            if not any(value is neutral for neutral in _OPENAI_NEUTRAL[name]):
                raise ValueError(f"body.{name}: {value!r:.40}; leave it out (infer.py has --samples and --logprobs)")
        elif name == "chat_template_kwargs":
            if not isinstance(value, dict) or set(value) - {"enable_thinking"}:
                raise ValueError(f"body.{name}: {value!r:.60}; use enable_thinking alone in it")
            record |= value
        elif name == "prompt":
            record["text" if isinstance(value, str) else "prompt_ids"] = value  # of the completions API
        else:
            ours = _OPENAI_NAMES.get(name, name)
            if record.get(ours, value) != value:
                raise ValueError(f"body.{name}: {value!r:.40}, but {record[ours]!r:.40} under another name; use one")
            record[ours] = value
    return record
