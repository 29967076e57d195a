"""JSON lines, as infer.py reads and writes them."""

from __future__ import annotations

import json
from typing import Any


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object on a line of UTF-8.

    Raises:
      ValueError: the line is not valid JSON (NaN and Infinity are not), not an object, or has an unpaired surrogate in
        a string, which cannot be encoded.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{line.decode(errors='replace').strip()[:40]!r}: not a JSON object")
    return record
