"""JSON from outside: strict about what JSON is, and about text that cannot be encoded."""

from __future__ import annotations

import json
from typing import Any

# What begins a file that is no text, and what to do with it.
_OTHERS = {
    b"PAR1": "is Parquet; use JSON lines, as pandas writes them with to_json(..., orient='records', lines=True)",
    b"\x1f\x8b": "is gzip; decompress it",
    b"\xff\xfe": "is UTF-16; use UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; use UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it",
    b"BZh": "is compressed by bzip2; decompress it",
    b"\xfd7zXZ": "is compressed by xz; decompress it",
    b"PK\x03\x04": "is a zip archive; unpack it",
}


def other_than_text(head: bytes) -> str:
    """What the first bytes of a file say that it is, and what to use instead; empty for UTF-8 text."""
    found = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), "")
    return found or ("holds zero bytes, which no text does; use UTF-8" if b"\0" in head else "")


def parse_json(content: bytes) -> Any:
    """The JSON value in UTF-8 bytes, with or without a byte order mark.

    Raises:
      ValueError: the bytes are not valid JSON (NaN and Infinity are not), or a string has an unpaired surrogate, which
        cannot be encoded.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        # Of one line of a file the position in it: its number in the file is named by whoever read it.
        line = f"line {error.lineno}, " if b"\n" in content.rstrip() else ""
        raise ValueError(f"not valid JSON ({error.msg}: {line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    return value


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
      ValueError: of `parse_json`, or for another JSON value.
    """
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"{line.decode(errors='replace').strip()[:40]!r}: not a JSON object")
    return record
