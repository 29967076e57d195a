"""Lines of JSON, as infer.py reads and writes them."""

from __future__ import annotations

import json
from typing import Any


def parse_record(line: bytes) -> dict[str, Any]:
    """The object on a line of UTF-8.

    Raises:
      ValueError: for what is no JSON (NaN and Infinity among it), no object, or has half a surrogate pair in a string,
        which no text has and nothing can write.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{line.decode(errors='replace').strip()[:40]!r}: not a JSON object")
    return record
