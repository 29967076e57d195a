"""The training data pipeline: files -> shuffled documents -> examples -> packed rows -> batches, all Grain's.

Each process reads every `process_count`-th document of the globally shuffled order, so the processes' shares are
disjoint and together one epoch; each goes on to its next epoch by itself.
"""

from __future__ import annotations

import dataclasses
import functools

import grain
import jax

from qwen3_jax.data.examples import Encoder
from qwen3_jax.data.packing import add_targets, pack
from qwen3_jax.data.source import DocumentSource
from qwen3_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and in what shape.

    Attributes:
      paths: files or globs, .jsonl or .txt.
      tokenizer: directory of the tokenizer.
      sequence_length: tokens of a packed row.
      batch_size: rows of a step, over all processes.
      seed: of the shuffle; epoch e is ordered by seed + e.
      shuffle: off, documents come in the order of the files in every epoch.

    Raises:
      ValueError: naming the field, its value and what would fit.
    """

    paths: tuple[str, ...]
    tokenizer: str
    sequence_length: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f"paths: {self.paths!r}; a list of at least one file or glob fits")
        object.__setattr__(self, "paths", tuple(self.paths))
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length: {self.sequence_length!r}; a number >= 2 fits")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size!r}; a number >= 1 fits")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed!r}; a number from 0 to 2**32 - 1 fits")


def make_loader(
    config: DataConfig, *, process_index: int | None = None, process_count: int | None = None
) -> grain.DatasetIterator:
    """An endless iterator over this process's part of the batches.

    A batch is a dict of arrays [batch_size / process_count, sequence_length]: `tokens`, `targets`, `segment_ids`,
    `positions` (int32) and `loss_weights` (float32); `qwen3_jax.data.packing.add_targets` says what they hold.

    The iterator's `get_state()` is a small dict fit for JSON; `set_state()` on an iterator of the same config and
    process goes on with bit-identical batches. Orbax saves it by `grain.checkpoint.CheckpointSave(iterator)`.

    Args:
      process_index, process_count: which share to read; by default those of jax.

    Raises:
      ValueError: for files or a batch size that do not fit; while iterating, `file:line: reason` for a malformed
        document.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if config.batch_size % process_count:
        raise ValueError(f"batch_size: {config.batch_size}; a multiple of the {process_count} processes fits")
    source = DocumentSource(config.paths)
    if len(source) < process_count:
        raise ValueError(f"paths: {len(source)} documents; at least one for each of {process_count} processes fits")
    tokenizer = load_tokenizer(config.tokenizer)

    documents = grain.MapDataset.source(source)
    if config.shuffle:
        documents = documents.shuffle(config.seed)
    documents = documents[process_index::process_count].repeat()
    # No reading threads: tokenisation holds the interpreter's lock, and they would only fight for it.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    examples = grain.experimental.FlatMapIterDataset(stream, Encoder(tokenizer, config.sequence_length))
    rows = pack(
        examples,
        sequence_length=config.sequence_length,
        pad_id=tokenizer.pad_id,
        shuffle_seed=config.seed if config.shuffle else None,
    )
    batches = rows.batch(config.batch_size // process_count).map(
        functools.partial(add_targets, pad_id=tokenizer.pad_id)
    )
    # One thread works ahead while the accelerator does; the state stays that of the batch last returned.
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))
