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
from qwen3_jax.data.lanes import Lane, order_of, refuse_other_order
from qwen3_jax.data.mixture import Stream, open_streams
from qwen3_jax.data.packing import add_targets
from qwen3_jax.data.workers import end_with_parent
from qwen3_jax.text.tokenizer import load_tokenizer

_BATCHES_AHEAD = 2  # prefetched by the thread
_STEPS_AHEAD = 4  # prefetched by each worker


def make_loader(config: DataConfig, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    """An endless iterator over some rows of each batch: those that a process needs.

    A batch is a dict of arrays [len(rows), sequence_length]: `tokens`, `targets`, `segment_ids`, `positions` (int32)
    and `loss_weights` (float32), see `qwen3_jax.data.packing.add_targets`.

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
    """The next row of some lanes and the states after it, by lane. Grain does not look inside: it is not a pytree."""

    rows: dict[str, dict[str, np.ndarray]]
    states: dict[str, Any]


class _Lanes(grain.IterDataset[_Step]):
    """The steps of the lanes in `states`; a worker process of `mp_prefetch` gets a part of the lanes."""

    def __init__(self, config: DataConfig, streams: Sequence[Stream], states: Mapping[str, Any]) -> None:
        super().__init__(grain.MapDataset.source(list(states)).to_iter_dataset(grain.ReadOptions(num_threads=0)))
        self._config, self._streams, self._states = config, streams, states

    def __iter__(self) -> grain.DatasetIterator[_Step]:
        pad_id = load_tokenizer(self._config.tokenizer).pad_id
        lanes = {}
        for name in self._parent:
            state = self._states[name]
            lanes[name] = Lane(self._config, self._streams, int(name), pad_id, state["order"])
            lanes[name].set_state(state)
        return _Steps(lanes)


class _Steps(grain.DatasetIterator[_Step]):
    """The steps of `lanes`. Each carries the lanes' states, so the iterator itself has none."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        super().__init__()
        self._lanes = lanes

    def __next__(self) -> _Step:
        rows = {name: lane.next_row() for name, lane in self._lanes.items()}
        return _Step(rows, {name: lane.get_state() for name, lane in self._lanes.items()})

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state


class _Batches(grain.DatasetIterator[dict[str, np.ndarray]]):
    """The batches of some lanes, by `config.workers` processes."""

    def __init__(self, config: DataConfig, lanes: Sequence[int]) -> None:
        super().__init__()
        self._steps: grain.DatasetIterator[_Step] | None = None  # first: Grain calls `close` even if `__init__` fails
        self._config, self._streams = config, open_streams(config)
        self._order = order_of(config, self._streams)
        self._pad_id = load_tokenizer(config.tokenizer).pad_id
        self._workers = min(config.workers, len(lanes))
        new = (Lane(config, self._streams, lane, self._pad_id, self._order) for lane in lanes)
        self._state = {str(number): lane.get_state() for number, lane in zip(lanes, new, strict=True)}

    def __next__(self) -> dict[str, np.ndarray]:
        if self._steps is None:
            flags.FLAGS.mark_as_parsed()  # mp_prefetch reads absl flags, which only absl.app parses
            options = grain.MultiprocessingOptions(self._workers, _STEPS_AHEAD)
            lanes = _Lanes(self._config, self._streams, self._state)
            self._steps = iter(lanes.mp_prefetch(options, worker_init_fn=end_with_parent))
        rows: dict[str, dict[str, np.ndarray]] = {}
        states: dict[str, Any] = {}
        for _ in range(max(self._workers, 1)):  # one step of each worker, in turn
            step = next(self._steps)
            rows |= step.rows
            states |= step.states
        self._state = {name: states[name] for name in self._state}
        batch = {name: np.stack([rows[lane][name] for lane in self._state]) for name in next(iter(rows.values()))}
        return add_targets(batch, pad_id=self._pad_id)

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        refuse_other_order(self._order, state, list(self._state))
        self.close()
        self._state = {name: state[name] for name in self._state}

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
