"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def complete(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block ends, and is deleted where the block fails.

    Raises:
      ValueError: its directory does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"output: {str(path.parent)!r} is not a directory; use a file in one")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put(file: IO[bytes], record: Mapping[str, Any]) -> None:
    """Writes one line of JSON."""
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
