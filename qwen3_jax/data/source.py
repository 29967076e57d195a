"""Documents in files, read by byte offset: Grain shuffles indices over all of them, and only what is drawn is read.

A `.jsonl` file holds one document a line, a `.txt` file one a block of lines, blocks being separated by blank lines.
Blank lines of a `.jsonl` file are skipped.
"""

from __future__ import annotations

import dataclasses
import glob
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Document:
    """One undecoded document: the bytes of `path` from offset `start`."""

    path: str
    start: int
    content: bytes

    @property
    def place(self) -> str:
        """`file:line` of the document's first line, for error messages; reads the file up to there."""
        with open(self.path, "rb") as file:
            line = file.read(self.start).count(b"\n") + 1
        return f"{self.path}:{line}"


class DocumentSource:
    """Random access to the documents of `paths` (files or globs), in the order given, a glob's files sorted.

    Memory is 16 bytes a document. A file named twice is read twice.

    Raises:
      ValueError: naming the path that matches no file, is neither .jsonl nor .txt, or holds no document.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._files = [file for path in paths for file in _expand(path)]
        self._spans = [_document_spans(file) for file in self._files]
        self._ends = list(accumulate(len(starts) for starts, _ in self._spans))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        number = bisect_right(self._ends, index)
        starts, stops = self._spans[number]
        row = index - self._ends[number] + len(starts)
        # Opened anew each time: no limit on the number of files, nothing shared between Grain's reading threads.
        with open(self._files[number], "rb") as file:
            file.seek(starts[row])
            return Document(self._files[number], starts[row], file.read(stops[row] - starts[row]))


def _expand(path: str) -> list[str]:
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(f"paths: {path!r} matches no file; an existing file or a glob of some fits")
    for file in files:
        if Path(file).suffix not in (".jsonl", ".txt"):
            raise ValueError(f"paths: {file!r} is neither .jsonl nor .txt; one of these fits")
    return files


def _document_spans(path: str) -> tuple[array[int], array[int]]:
    """Byte offsets at which the documents of a file start and stop."""
    starts, stops = array("q"), array("q")
    blocks = path.endswith(".txt")
    inside, position = False, 0
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                inside = False
            elif inside:
                stops[-1] = position + len(line)
            else:
                starts.append(position)
                stops.append(position + len(line))
                inside = blocks
            position += len(line)
    if not starts:
        raise ValueError(f"paths: {path!r} holds no document; a file with at least one fits")
    return starts, stops
