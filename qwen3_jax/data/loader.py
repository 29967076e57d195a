"""The training data pipeline: documents -> examples -> lanes -> batches, with a position that is exact at every step.

Row r of a batch is lane r (see `qwen3_jax.data.lanes`). A process owns some lanes, and its workers own parts of these;
who owns a lane changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from qwen3_jax.data.config import DataConfig
from qwen3_jax.data.lanes import order_of, refuse_other_order
from qwen3_jax.data.mixture import Stream, open_streams
from qwen3_jax.data.packing import add_targets
from qwen3_jax.data.workers import LaneGroup, LocalLanes, WorkerLanes
from qwen3_jax.text.tokenizer import load_tokenizer

_AHEAD = 2  # batches made ready while the accelerator works


def make_loader(config: DataConfig, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    """An endless iterator over some rows of the batches: those that a process needs.

    A batch is a dict of arrays [len(rows), sequence_length]: `tokens`, `targets`, `segment_ids`, `positions` (int32)
    and `loss_weights` (float32); `qwen3_jax.data.packing.add_targets` says what they hold.

    `get_state()` is a dict fit for JSON with an entry for each of the rows, after the batch last returned,
    whatever was read ahead. `set_state()` takes these dicts of all processes joined into one, however many processes
    there were, and goes on with bit-identical batches.

    Args:
      rows: their numbers in the whole batch; None is all of them.

    Raises:
      ValueError: for files that do not fit; while iterating, `file:line: reason` for a malformed
        document; in `set_state`, naming what is missing or was configured otherwise.
    """
    lanes = range(config.batch_size) if rows is None else rows
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
