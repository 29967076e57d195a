"""Random access to documents in files; only the requested documents are read.

| file | a document is | read by |
|---|---|---|
| .jsonl | a line; blank lines are skipped | byte offset |
| .txt | a block of lines; blocks are separated by blank lines | byte offset |
| .parquet | a row with the columns of a .jsonl record | row group |
| .arrayrecord | a record: the JSON of a .jsonl line, or ids if `qwen3-jax tokenize` wrote the file | record |

Paths with a protocol (gs://, ...) are read through fsspec. Two cases are slow for large sources. A row of Parquet needs
its row group, of which the last few are cached: tokenise large Parquet files first. Remote ArrayRecord files are copied
to ~/.cache/qwen3-jax: if the disk is too small for them, mount the bucket (gcsfuse).
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

_ROW_GROUPS = 8  # cached per process, over all Parquet files


@dataclasses.dataclass(frozen=True)
class Document:
    """One undecoded document. `start` is its byte offset in `path`, or the number of its row or record."""

    path: str
    start: int
    content: bytes
    form: Literal["text", "json", "tokens"] = "json"

    @property
    def location(self) -> str:
        """`file:line` (or row or record, from 1), for error messages. It may read the file up to the document."""
        if Path(self.path).suffix not in (".jsonl", ".txt"):
            return f"{self.path}:{self.start + 1}"
        lines = _read(self.path, 0, self.start).count(b"\n")
        return f"{self.path}:{lines + 1}"


class _File(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


class DocumentSource:
    """Random access to the documents of `paths` (files or globs), in the given order, the files of a glob sorted.

    It uses 16 bytes of memory per document of .jsonl and .txt. A file listed twice is used twice. `manifests` holds the
    manifest of each directory with tokenised files.

    Args:
      field: the configuration's name for `paths`, for error messages.

    Raises:
      ValueError: naming the path that matches no file, has an unknown format, or holds no document.
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
                file = _ArrayRecordFile(name, found)
            else:
                file = _ParquetFile(name) if name.endswith(".parquet") else _TextFile(name)
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
      ValueError: there is none, or one has an unknown format.
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
            raise ValueError(f"{field}: {file!r} has an unknown format; one of {', '.join(formats)} fits")
    return files


def _read(path: str, start: int, stop: int) -> bytes:
    # Open for each read: the number of open files is limited, and threads must not share a file position.
    if "://" not in path:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    fs, inner = fsspec.core.url_to_fs(path)
    return fs.cat_file(inner, start=start, end=stop)


class _TextFile:
    """.jsonl and .txt, indexed by the byte offsets at which documents start and stop."""

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


class _ParquetFile:
    """.parquet; a row becomes the JSON of a .jsonl line, without nulls."""

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


class _ArrayRecordFile:
    """.arrayrecord; `found` is the manifest of its directory, which only token ids have."""

    def __init__(self, path: str, found: manifest.Manifest | None) -> None:
        self._path = path
        self._form: Literal["json", "tokens"] = "json" if found is None else "tokens"
        self._count = _array_record(path).num_records()
        # A truncated file opens without an error, as a file without records.
        if found is not None and self._count != found.shards.get(path.rpartition("/")[2]):
            raise ValueError(f"{self._count} records; its {manifest.NAME} lists another number")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        (content,) = _array_record(self._path).read([index])
        return Document(self._path, index, content, self._form)


# Open files and decoded row groups are cached per process and not in the sources, so that sources can be pickled.


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
