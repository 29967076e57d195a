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
import hashlib
import json
import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import fsspec
from array_record.python.array_record_module import ArrayRecordReader

from qwen3_jax.data import manifest
from qwen3_jax.text.records import other_than_text

# What `qwen3_jax.data.records` reads.
RECORD_KEYS = (
    *("text", "messages", "tools", "no_loss", "labels", "conversations", "system"),
    *("instruction", "input", "output", "history", "prompt", "completion"),
)
_TAIL = 65536  # bytes of a Parquet or ArrayRecord file, from its end, that its digest is of

# It would print a traceback for what is raised here in one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

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


class DocumentSource:
    """Random access to the documents of `paths` (files or globs), in the given order, the files of a glob sorted.

    It uses 16 bytes of memory per document of .jsonl and .txt. A file listed twice is used twice.

    tokenizers: the fingerprints of the tokenizers that made the files of token ids.
    content: a digest of the files, which tells whether they are those of an earlier run. It covers all of .jsonl and
      .txt; size and end of .parquet and .arrayrecord. Shards of token ids have that of the files they were made from.

    Args:
      field: the configuration's name for `paths`, for error messages.

    Raises:
      ValueError: naming the path that matches no file, has an unknown format, or holds no document.
    """

    def __init__(self, paths: Sequence[str], field: str = "paths") -> None:
        self._files: list[_File] = []
        for name in (file for path in paths for file in expand(path, field)):
            try:
                file = _FORMATS[Path(name).suffix](name)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{field}: {name!r} cannot be read ({error})") from None
            if not len(file):
                raise ValueError(f"{field}: {name!r} holds no document; use a file with at least one")
            self._files.append(file)
        tokenised = [file for file in self._files if isinstance(file, _ArrayRecordFile)]
        self.tokenizers = {file.tokenizer for file in tokenised if file.tokenizer is not None}
        self._starts = list(accumulate(map(len, self._files), initial=0))
        self.content = self._content()

    def _content(self) -> str:
        made_from = {file.made_from if isinstance(file, _ArrayRecordFile) else None for file in self._files}
        if len(made_from) == 1 and (whole := made_from.pop()) is not None:
            return whole
        contents = "".join(file.content for file in self._files)
        return hashlib.blake2b(contents.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        number = bisect_right(self._starts, index) - 1
        return self._files[number][index - self._starts[number]]

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def expand(path: str, field: str) -> list[str]:
    """The files of a path or glob, sorted.

    Raises:
      ValueError: there is none, or one has an unknown format.
    """
    if "://" in path:
        try:
            fs, inner = fsspec.core.url_to_fs(path)
            files = sorted(fs.unstrip_protocol(file) for file in fs.glob(inner))
        except Exception as error:  # each file system has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{field}: {path!r} cannot be listed ({reason:.200}); use gs:// or a path") from None
    else:
        files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(f"{field}: {path!r} matches no file; use an existing file or a glob of some")
    for file in files:
        if Path(file).suffix not in _FORMATS:
            hint = ", of an array one object a line (jq -c '.[]')" if file.endswith(".json") else ""
            raise ValueError(f"{field}: {file!r} has an unknown format; use one of {', '.join(_FORMATS)}{hint}")
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
        self._form: Literal["text", "json"] = "text" if path.endswith(".txt") else "json"
        self._starts, self._stops = array("q"), array("q")
        inside, position, digest = False, 0, hashlib.blake2b(digest_size=8)
        with fsspec.open(path, "rb") as file:
            for line in file:
                if position == 0:
                    self._refuse(line)
                digest.update(line)
                if not line.strip():
                    inside = False
                elif inside:
                    self._stops[-1] = position + len(line)
                else:
                    self._starts.append(position)
                    self._stops.append(position + len(line))
                    inside = self._form == "text"
                position += len(line)
        self.content = digest.hexdigest()

    def _refuse(self, first: bytes) -> None:
        if what := other_than_text(first):
            raise ValueError(what)
        if self._form == "json" and first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise ValueError("begins as a JSON array; use one object a line")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Document:
        start = self._starts[index]
        return Document(self._path, start, _read(self._path, start, self._stops[index]), self._form)


class _ParquetFile:
    """.parquet; a row becomes the JSON of a .jsonl line, without nulls."""

    def __init__(self, path: str) -> None:
        self._path = path
        file = _parquet(path)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        self._starts = list(accumulate((group.num_rows for group in groups), initial=0))
        if not {"text", "messages", "conversations", "instruction", "prompt"} & set(file.schema_arrow.names):
            raise ValueError(f"columns {', '.join(file.schema_arrow.names)}; use text, or messages")
        self.content = _digest_of_end(path)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        group = bisect_right(self._starts, index) - 1
        (row,) = _row_group(self._path, group).slice(index - self._starts[group], 1).to_pylist()
        try:
            text = json.dumps(_without_nulls(row), ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._path}:{index + 1}: {error}") from None
        return Document(self._path, index, text.encode("utf-8", "surrogatepass"))


def _digest_of_end(path: str) -> str:
    fs, inner = fsspec.core.url_to_fs(path)
    size = fs.size(inner)
    end = f"{size}:".encode() + _read(path, max(0, size - _TAIL), size)
    return hashlib.blake2b(end, digest_size=8).hexdigest()


def first_document(paths: Sequence[str], field: str) -> Document:
    """The first document of `paths`, without reading the files that it is not in.

    Raises:
      ValueError: of `DocumentSource`.
    """
    path = expand(paths[0], field)[0]
    if Path(path).suffix in (".jsonl", ".txt"):
        with fsspec.open(path, "rb") as file:
            position = 0
            for line in file:
                if line.strip():
                    return Document(path, position, line, "text" if path.endswith(".txt") else "json")
                position += len(line)
    return DocumentSource([path], field)[0]


def _without_nulls(value: Any) -> Any:
    """A value of Arrow as JSON data: bytes as text, and without nulls. Arrow's structs have every field that one of
    their rows has, null in the other rows: a tool would get the parameters of all other tools."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


class _ArrayRecordFile:
    """.arrayrecord; only token ids have a manifest in their directory."""

    def __init__(self, path: str) -> None:
        self._path = path
        found = manifest.beside(path)
        self.made_from = None if found is None else found.content
        self.tokenizer = None if found is None else found.tokenizer
        self._count = _array_record(path).num_records()
        # A truncated file opens without an error, as a file without records.
        if found is not None and self._count != found.shards.get(path.rpartition("/")[2]):
            raise ValueError(f"{self._count} records; its {manifest.NAME} lists another number")

    @property
    def content(self) -> str:
        return _digest_of_end(self._path)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        (content,) = _array_record(self._path).read([index])
        return Document(self._path, index, content, "tokens" if self.tokenizer else "json")


_File = _TextFile | _ParquetFile | _ArrayRecordFile
_FORMATS: dict[str, type[_File]] = {
    ".jsonl": _TextFile,
    ".txt": _TextFile,
    ".parquet": _ParquetFile,
    ".arrayrecord": _ArrayRecordFile,
}


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
