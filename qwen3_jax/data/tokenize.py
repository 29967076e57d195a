"""Documents to ArrayRecord shards of token ids, in parallel.

Each source becomes a directory with a manifest and numbered shards of `documents_per_shard` documents, in the order of
the files. Documents are not split, so the shards serve every sequence length. Training on the shards, under the same
source name, gives the same batches as training on the documents.

A shard gets its name when it is complete. After a kill, the same command writes the missing shards only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from qwen3_jax.data import manifest
from qwen3_jax.data.config import Encoding, SourceConfig
from qwen3_jax.data.counts import Counts
from qwen3_jax.data.examples import Encoded, Encoder, fingerprint_of
from qwen3_jax.data.manifest import Manifest
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.data.workers import end_with_parent

DOCUMENTS_PER_SHARD = 10_000


def tokenize_source(
    source: SourceConfig,
    encoding: Encoding,
    directory: Path,
    *,
    workers: int,
    documents_per_shard: int = DOCUMENTS_PER_SHARD,
    progress: Callable[[Counts, int], None] = lambda done, total: None,
) -> Manifest:
    """Writes the shards and the manifest of one source; complete shards in the directory are used as they are.

    Args:
      encoding: how documents become ids.
      directory: of the shards.
      workers: number of processes.
      progress: called after each shard, in their order, with the counts so far and the total number of documents.

    Raises:
      ValueError: the source is already tokenised; the directory was begun from another source or with another
        tokenizer; `file:line: reason` for a malformed document.
    """
    documents = DocumentSource(source.paths, f"sources.{source.name}.paths")
    if documents.tokenizers:
        raise ValueError(f"sources.{source.name}.paths: token ids already; use files of documents")
    begun = Manifest(
        source.name,
        source.licence,
        source.origin,
        list(source.languages),
        tokenizer=fingerprint_of(encoding),
        documents=len(documents),
        documents_per_shard=documents_per_shard,
        content=documents.content,
    )
    directory.mkdir(parents=True, exist_ok=True)
    _begin(directory / manifest.NAME, begun)
    # Of each shard, its file and the indices of its documents.
    starts = range(0, len(documents), documents_per_shard)
    files = [directory / f"{number:06d}.arrayrecord" for number in range(len(starts))]
    indices = [range(len(documents))[start : start + documents_per_shard] for start in starts]
    make_shard = functools.partial(_make_shard, source.paths, encoding)
    total, shards = Counts(), {}
    spawn = multiprocessing.get_context("spawn")  # a forked child of a process with jax's threads may hang
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
        try:
            for file, counts in zip(files, pool.map(make_shard, files, indices), strict=True):
                total = total.plus(counts)
                shards[file.name] = counts.documents
                progress(total, len(documents))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    finished = dataclasses.replace(begun, tokens=total.tokens, loss_tokens=total.loss_tokens, shards=shards)
    _write_manifest(directory / manifest.NAME, finished)
    return finished


def _begin(path: Path, begun: Manifest) -> None:
    """Writes the manifest of unfinished work, or checks that an existing one describes the same work."""
    if not path.exists():
        _write_manifest(path, begun)
        return
    found = manifest.from_json(path.read_bytes())
    for name in ("name", "tokenizer", "documents", "documents_per_shard", "content"):
        then, now = getattr(found, name), getattr(begun, name)
        if then != now:
            raise ValueError(f"{path.parent}: begun with {name} {then!r}, not {now!r}; use an empty directory")


@functools.cache  # once in each worker process
def _open(paths: tuple[str, ...], encoding: Encoding) -> tuple[DocumentSource, Encoder]:
    return DocumentSource(paths), Encoder.of(encoding)


def _make_shard(paths: tuple[str, ...], encoding: Encoding, path: Path, indices: range) -> Counts:
    documents, encode = _open(paths, encoding)
    if (found := _count(path)).documents == len(indices):
        return found
    counts = Counts()
    with _complete_or_absent(path) as hidden:
        writer = ArrayRecordWriter(str(hidden), "group_size:1")
        for index in indices:
            encoded = encode(documents[index])
            writer.write(encoded.to_bytes())
            counts = counts.plus(_counts(encoded))
        writer.close()
    return counts


def _count(path: Path) -> Counts:
    """The counts of a shard; zeros where it is missing or truncated."""
    try:
        records = ArrayRecordReader(str(path)).read_all() if path.exists() else []
    except RuntimeError:
        records = []
    return functools.reduce(Counts.plus, (_counts(Encoded.from_bytes(record)) for record in records), Counts())


def _counts(encoded: Encoded) -> Counts:
    parts = (Counts.of(example, begins=number == 0) for number, example in enumerate(encoded.examples))
    return functools.reduce(Counts.plus, parts, Counts())


def _write_manifest(path: Path, content: Manifest) -> None:
    with _complete_or_absent(path) as hidden:
        hidden.write_text(content.to_json(), encoding="utf-8")


@contextlib.contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` at the end of the block and deleted if the block fails."""
    hidden = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
