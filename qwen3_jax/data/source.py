"""Documents in files, with random access: only what is drawn is read.

| file | a document is | read by |
|---|---|---|
| .jsonl | a line; blank lines are skipped | byte offset |
| .txt | a block of lines; blocks are separated by blank lines | byte offset |
| .parquet | a row with the columns of a .jsonl record | row group |
| .arrayrecord | a record: the JSON of a .jsonl line, or ids if `qwen3-jax tokenize` wrote the file | record |

Paths with a protocol (gs://, ...) go through fsspec. Two things suit only small sources: a row of Parquet costs its
row group, unless that is among the last few read, and remote ArrayRecord files are copied to ~/.cache/qwen3-jax first.
Large Parquet is best tokenised once, and a bucket with more shards than the disk holds mounted (gcsfuse).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec
from array_record.python.array_record_module import ArrayRecordReader

from qwen3_jax.data import manifest

RECORD_KEYS = ("text", "messages", "tools", "no_loss", "labels")

_ROW_GROUPS = 8  # kept in memory, all Parquet files of a process together


@dataclasses.dataclass(frozen=True)
class Document:
    """One undecoded document: what starts at `start` (a byte offset, or the number of a row or record) of `path`."""

    path: str
    start: int
    content: bytes
    form: Literal["text", "json", "tokens"] = "json"

    @property
    def place(self) -> str:
        """`file:line` (or row or record, from 1) of the document, for error messages; may read the file up to there."""
        if Path(self.path).suffix not in (".jsonl", ".txt"):
            return f"{self.path}:{self.start + 1}"
        lines = _read(self.path, 0, self.start).count(b"\n")
        return f"{self.path}:{lines + 1}"


class _File(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


class DocumentSource:
    """Random access to the documents of `paths` (files or globs), in the order given, a glob's files sorted.

    Memory is 16 bytes a document of .jsonl and .txt. A file named twice is read twice. `manifests` are those of the
    files that hold token ids, one for each directory of such files.

    Args:
      field: the configuration's name for `paths`, for error messages.

    Raises:
      ValueError: naming the path that matches no file, is of no known format, or holds no document.
    """

    def __init__(self, paths: Sequence[str], field: str = "paths") -> None:
        names = [file for path in paths for file in expand(path, field)]
        self.manifests: list[manifest.Manifest] = []
        self._files = [self._open(name, field) for name in names]
        self._ends = list(accumulate(len(file) for file in self._files))

    def _open(self, name: str, field: str) -> _File:
        file: _File
        try:
            if name.endswith(".arrayrecord"):
                found = manifest.beside(name)
                if found is not None and found not in self.manifests:
                    self.manifests.append(found)
                file = _Records(name, found)
            else:
                file = _Rows(name) if name.endswith(".parquet") else _Lines(name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{field}: {name!r} cannot be read ({error})") from None
        if not len(file):
            raise ValueError(f"{field}: {name!r} holds no document; a file with at least one fits")
        return file

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        number = bisect_right(self._ends, index)
        return self._files[number][index - self._ends[number] + len(self._files[number])]


def expand(path: str, field: str) -> list[str]:
    """The files of a path or glob, sorted.

    Raises:
      ValueError: there is none, or one is of no known format.
    """
    if "://" in path:
        fs, inner = fsspec.core.url_to_fs(path)
        files = sorted(fs.unstrip_protocol(file) for file in fs.glob(inner))
    else:
        files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(f"{field}: {path!r} matches no file; an existing file or a glob of some fits")
    formats = (".jsonl", ".txt", ".parquet", ".arrayrecord")
    for file in files:
        if Path(file).suffix not in formats:
            raise ValueError(f"{field}: {file!r} is of no known format; one of {', '.join(formats)} fits")
    return files


def _read(path: str, start: int, stop: int) -> bytes:
    # Opened anew each time: no limit on the number of files, nothing shared between threads and processes.
    if "://" not in path:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    fs, inner = fsspec.core.url_to_fs(path)
    return fs.cat_file(inner, start=start, end=stop)


class _Lines:
    """.jsonl and .txt, by the byte offsets at which documents start and stop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._starts, self._stops = array("q"), array("q")
        blocks = path.endswith(".txt")
        inside, position = False, 0
        with fsspec.open(path, "rb") as file:
            for line in file:
                if not line.strip():
                    inside = False
                elif inside:
                    self._stops[-1] = position + len(line)
                else:
                    self._starts.append(position)
                    self._stops.append(position + len(line))
                    inside = blocks
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Document:
        start = self._starts[index]
        content = _read(self._path, start, self._stops[index])
        return Document(self._path, start, content, "text" if self._path.endswith(".txt") else "json")


class _Rows:
    """.parquet; a row becomes the JSON of a .jsonl line, nulls left out."""

    def __init__(self, path: str) -> None:
        self._path = path
        file = _parquet(path)
        self._ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
        if not {"text", "messages"} & set(file.schema_arrow.names):
            raise ValueError('no column "text" or "messages"')

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        group = bisect_right(self._ends, index)
        table = _row_group(self._path, group)
        (row,) = table.slice(index - self._ends[group] + len(table), 1).to_pylist()
        record = {key: value for key, value in row.items() if value is not None}
        return Document(self._path, index, json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))


class _Records:
    """.arrayrecord."""

    def __init__(self, path: str, found: manifest.Manifest | None) -> None:
        self._path = path
        self._form: Literal["json", "tokens"] = "json" if found is None else "tokens"
        self._count = _array_record(path).num_records()
        # A file that was cut short opens without complaint, as one without records.
        if found is not None and self._count != found.shards.get(path.rpartition("/")[2]):
            raise ValueError(f"{self._count} records, which is not what its {manifest.NAME} says")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        (content,) = _array_record(self._path).read([index])
        return Document(self._path, index, content, self._form)


# Open files and decoded row groups belong to the process, so that sources can be sent to others.


@functools.lru_cache(maxsize=64)
def _parquet(path: str) -> Any:
    from pyarrow import parquet  # slow to import, and few sources need it

    return parquet.ParquetFile(fsspec.open(path, "rb").open())


@functools.lru_cache(maxsize=_ROW_GROUPS)
def _row_group(path: str, group: int) -> Any:
    file = _parquet(path)
    return file.read_row_group(group, columns=[name for name in file.schema_arrow.names if name in RECORD_KEYS])


@functools.lru_cache(maxsize=1024)
def _array_record(path: str) -> ArrayRecordReader:
    if "://" in path:
        cache = Path.home() / ".cache" / "qwen3-jax" / "arrayrecord"
        path = fsspec.open_local(f"filecache::{path}", filecache={"cache_storage": str(cache), "check_files": True})
    return ArrayRecordReader(path, "readahead_buffer_size:0")
