"""The training data pipeline: documents -> examples -> lanes -> batches, with a position that is exact at every step.

Row r of a batch is lane r (see `qwen3_jax.data.lanes`). A process owns consecutive lanes, and its workers own parts of
these; who owns a lane changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from qwen3_jax.data.config import DataConfig
from qwen3_jax.data.lanes import order_of, refuse_other_order
from qwen3_jax.data.mixture import Stream, open_streams
from qwen3_jax.data.packing import add_targets
from qwen3_jax.data.workers import LaneGroup, LocalLanes, WorkerLanes
from qwen3_jax.tokenizer import load_tokenizer

_AHEAD = 2  # batches made ready while the accelerator works


def make_loader(
    config: DataConfig, process_index: int | None = None, process_count: int | None = None
) -> grain.DatasetIterator:
    """An endless iterator over this process's rows of the batches.

    A batch is a dict of arrays [batch_size / process_count, sequence_length]: `tokens`, `targets`, `segment_ids`,
    `positions` (int32) and `loss_weights` (float32); `qwen3_jax.data.packing.add_targets` says what they hold.

    `get_state()` is a dict fit for JSON with an entry for each lane of this process, after the batch last returned,
    whatever was read ahead. `set_state()` takes these dicts of all processes joined into one, however many processes
    there were, and goes on with bit-identical batches.

    Args:
      process_index, process_count: whose rows; by default those of jax.

    Raises:
      ValueError: for files or a batch size that do not fit; while iterating, `file:line: reason` for a malformed
        document; in `set_state`, naming what is missing or was configured otherwise.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if config.batch_size % count:
        raise ValueError(f"batch_size: {config.batch_size}; a multiple of the {count} processes fits")
    rows = config.batch_size // count
    lanes = range(index * rows, (index + 1) * rows)
    # The thread keeps the state of each batch beside it.
    return grain.experimental.ThreadPrefetchDatasetIterator(_Batches(config, lanes, open_streams(config)), _AHEAD)


class _Batches(grain.DatasetIterator):
    """The batches of some lanes."""

    def __init__(self, config: DataConfig, lanes: Sequence[int], streams: Sequence[Stream]) -> None:
        super().__init__()
        self._names = [str(lane) for lane in lanes]
        self._order = order_of(config, streams)
        self._pad_id = load_tokenizer(config.tokenizer).pad_id
        parts = [part.tolist() for part in np.array_split(np.array(lanes), min(config.workers, len(lanes)) or 1)]
        make = WorkerLanes if config.workers else LocalLanes
        self._groups: list[LaneGroup] = [make(config, part, streams) for part in parts]
        self._state = {name: state for group in self._groups for name, state in group.get_state().items()}

    def __next__(self) -> dict[str, np.ndarray]:
        for group in self._groups:
            group.start()
        steps = [group.next() for group in self._groups]
        self._state = {name: state for _, states in steps for name, state in states.items()}
        rows = [row for rows, _ in steps for row in rows]
        return add_targets({name: np.stack([row[name] for row in rows]) for name in rows[0]}, pad_id=self._pad_id)

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        refuse_other_order(self._order, state, self._names)
        for group in self._groups:
            group.set_state(state)
        self._state = {name: state[name] for name in self._names}

    def close(self) -> None:
        for group in self._groups:
            group.close()
