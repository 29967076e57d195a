"""The training data pipeline: documents -> examples -> lanes -> batches, with an exact position at every step.

Row r of a batch comes from lane r (see `qwen3_jax.data.lanes`). A process owns some lanes and may divide them among
worker processes. Rows and positions do not depend on who owns a lane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from qwen3_jax.data.config import DataConfig
from qwen3_jax.data.lanes import Lane, refuse_other_order
from qwen3_jax.data.mixture import Mixture
from qwen3_jax.data.workers import end_with_parent

_BATCHES_AHEAD = 2  # prefetched by the thread
_STEPS_AHEAD = 4  # prefetched by each worker


def make_loader(config: DataConfig, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    """An endless iterator over some rows of each batch: those that a process needs.

    A batch is a dict of arrays [len(rows), sequence_length]: `tokens`, `targets`, `segment_ids`, `positions` (int32)
    and `loss_weights` (float32), see `qwen3_jax.data.packing.to_arrays`.

    `get_state()` is the position after the batch last returned (whatever was prefetched): JSON data with an entry for
    each of the rows. `set_state()` takes the union of all processes' positions, for any number of processes. The
    batches after it are bit-identical.

    Args:
      rows: their indices in the complete batch; None: all rows.

    Raises:
      ValueError: a path cannot be used. While iterating: `file:line: reason` for a malformed document. In
        `set_state`: naming what is missing or was configured differently.
    """
    lanes = range(config.batch_size) if rows is None else rows
    # The thread stores the state of each prefetched batch with it.
    return grain.experimental.ThreadPrefetchDatasetIterator(_Batches(config, lanes), _BATCHES_AHEAD)


@dataclasses.dataclass
class _Step:
    """By lane: its next row, and its state after it. Grain does not look inside: it is not a pytree."""

    lanes: dict[str, tuple[dict[str, np.ndarray], Any]]


class _Lanes(grain.IterDataset[_Step]):
    """The steps of the lanes in `states`; a worker process of `mp_prefetch` gets a part of the lanes."""

    def __init__(self, mixture: Mixture, states: Mapping[str, Any]) -> None:
        super().__init__(grain.MapDataset.source(list(states)).to_iter_dataset(grain.ReadOptions(num_threads=0)))
        self._mixture, self._states = mixture, states

    def __iter__(self) -> grain.DatasetIterator[_Step]:
        return _Steps({name: Lane(self._mixture, int(name), self._states[name]) for name in self._parent})


class _Steps(grain.DatasetIterator[_Step]):
    """The steps of `lanes`. Each carries the lanes' states, so the iterator itself has none."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        super().__init__()
        self._lanes = lanes

    def __next__(self) -> _Step:
        return _Step({name: (lane.next_row(), lane.get_state()) for name, lane in self._lanes.items()})

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state


class _Batches(grain.DatasetIterator[dict[str, np.ndarray]]):
    """The batches of some lanes, by `config.workers` processes."""

    def __init__(self, config: DataConfig, lanes: Sequence[int]) -> None:
        super().__init__()
        self._steps: grain.DatasetIterator[_Step] | None = None  # first: Grain calls `close` even if `__init__` fails
        self._mixture = Mixture(config)
        self._workers = min(config.workers, len(lanes))
        self._state = {str(lane): Lane(self._mixture, lane).get_state() for lane in lanes}

    def __next__(self) -> dict[str, np.ndarray]:
        if self._steps is None:
            flags.FLAGS.mark_as_parsed()  # mp_prefetch reads absl flags, which only absl.app parses
            options = grain.MultiprocessingOptions(self._workers, _STEPS_AHEAD)
            lanes = _Lanes(self._mixture, self._state)
            self._steps = iter(lanes.mp_prefetch(options, worker_init_fn=end_with_parent))
        done: dict[str, tuple[dict[str, np.ndarray], Any]] = {}
        for _ in range(max(self._workers, 1)):  # one step of each worker, in turn
            done |= next(self._steps).lanes
        self._state = {name: done[name][1] for name in self._state}
        rows = [done[name][0] for name in self._state]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        accept = self._mixture.config.accept_changed
        refuse_other_order(self._mixture.order, state, self._state, accept_changed=accept)
        self.close()
        self._state = {name: state[name] for name in self._state}

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
