"""Documents to ArrayRecord shards of token ids, once, in parallel.

Each source becomes a directory of numbered shards, `documents_per_shard` documents each in the order of the files,
and a manifest. Documents are kept whole, so the shards serve every sequence length, and training on them under the
source's name gives the batches that training on the documents would have given.

A shard appears under its name when it is whole. A command that was killed goes on with the shards that are missing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from qwen3_jax.data import manifest
from qwen3_jax.data.config import SourceConfig
from qwen3_jax.data.counts import Counts
from qwen3_jax.data.examples import Encoded, Encoder
from qwen3_jax.data.manifest import Manifest
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.data.workers import end_with_parent
from qwen3_jax.text.tokenizer import fingerprint, load_tokenizer

DOCUMENTS_PER_SHARD = 10_000


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker process knows from its start: the source, and where its shards go."""

    source: SourceConfig
    tokenizer: str
    directory: Path
    documents_per_shard: int


def tokenize_source(
    source: SourceConfig,
    tokenizer: str,
    directory: Path,
    *,
    workers: int,
    documents_per_shard: int = DOCUMENTS_PER_SHARD,
    progress: Callable[[Counts, int], None] = lambda done, total: None,
) -> Manifest:
    """Writes the shards and the manifest of one source; does nothing for what is already there.

    Args:
      tokenizer: directory of the tokenizer.
      directory: of the shards.
      workers: processes.
      progress: called with what is done and the number of all documents, after each shard.

    Raises:
      ValueError: for a source that holds token ids already, a directory begun from another source or by another
        tokenizer, and `file:line: reason` for a malformed document.
    """
    documents = DocumentSource(source.paths, f"sources.{source.name}.paths")
    if documents.manifests:
        raise ValueError(f"sources.{source.name}.paths: token ids already; files of documents fit")
    begun = Manifest(
        source.name,
        source.licence,
        source.origin,
        list(source.languages),
        tokenizer=fingerprint(tokenizer),
        documents=len(documents),
        documents_per_shard=documents_per_shard,
    )
    directory.mkdir(parents=True, exist_ok=True)
    _begin(directory / manifest.NAME, begun)
    job = _Job(source, tokenizer, directory, documents_per_shard)
    numbers = range(-(-len(documents) // documents_per_shard))
    counts: dict[int, Counts] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,)) as pool:
        futures = {pool.submit(_make_shard, number): number for number in numbers}
        try:
            for future in concurrent.futures.as_completed(futures):
                counts[futures[future]] = future.result()
                progress(_sum(counts.values()), len(documents))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    total = _sum(counts.values())
    shards = {_shard_name(number): counts[number].documents for number in numbers}
    finished = dataclasses.replace(begun, tokens=total.tokens, loss_tokens=total.loss_tokens, shards=shards)
    _write_whole(directory / manifest.NAME, finished.to_json())
    return finished


def _begin(path: Path, begun: Manifest) -> None:
    """Writes the manifest of work that is not finished, or checks that the one there is of the same work."""
    if not path.exists():
        _write_whole(path, begun.to_json())
        return
    found = manifest.from_json(path.read_bytes())
    for name in ("name", "tokenizer", "documents", "documents_per_shard"):
        then, now = getattr(found, name), getattr(begun, name)
        if then != now:
            raise ValueError(f"{path.parent}: begun with {name} {then!r}, not {now!r}; an empty directory fits")


_job: _Job
_documents: DocumentSource
_encode: Encoder


def _start(job: _Job) -> None:
    global _job, _documents, _encode
    end_with_parent()
    _job, _documents, _encode = job, DocumentSource(job.source.paths), Encoder(load_tokenizer(job.tokenizer))


def _make_shard(number: int) -> Counts:
    path = _job.directory / _shard_name(number)
    first = number * _job.documents_per_shard
    indices = range(first, min(first + _job.documents_per_shard, len(_documents)))
    if (found := _count(path)).documents == len(indices):
        return found
    hidden = path.with_name(f".{path.name}-{os.getpid()}")
    writer = ArrayRecordWriter(str(hidden), "group_size:1")
    counts = Counts()
    try:
        for index in indices:
            encoded = _encode(_documents[index])
            writer.write(encoded.to_bytes())
            counts = counts.plus(Counts.of(encoded.whole))
        writer.close()
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    return counts


def _count(path: Path) -> Counts:
    """Of a shard that may be missing or cut short."""
    try:
        records = ArrayRecordReader(str(path)).read_all() if path.exists() else []
    except RuntimeError:
        records = []
    return _sum(Counts.of(Encoded.from_bytes(record).whole) for record in records)


def _sum(counts: Iterable[Counts]) -> Counts:
    return functools.reduce(Counts.plus, counts, Counts())


def _shard_name(number: int) -> str:
    return f"{number:06d}.arrayrecord"


def _write_whole(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}-{os.getpid()}")
    hidden.write_text(text, encoding="utf-8")
    hidden.replace(path)
