"""Batches on their way from the loader to the devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwen3_jax.data import DataConfig, make_loader


class Feed:
    """Batches as global arrays [batch_size, sequence_length]; each process reads the rows that its devices hold."""

    def __init__(self, config: DataConfig, sharding: NamedSharding) -> None:
        self._shape = (config.batch_size, config.sequence_length)
        self._sharding = sharding
        # Not one block of rows: a TPU host's chips are a square of the network, its place in the mesh is several.
        places = sharding.addressable_devices_indices_map(self._shape).values()
        spans = [place[0].indices(config.batch_size)[:2] for place in places if place is not None]
        rows = sorted({row for start, stop in spans for row in range(start, stop)})
        self._index = {row: index for index, row in enumerate(rows)}
        self._loader = make_loader(config, rows)

    def __next__(self) -> dict[str, jax.Array]:
        return {name: self._put(value) for name, value in next(self._loader).items()}

    def get_state(self) -> dict[str, Any]:
        """Where this process is in the documents, after the batch last returned; fit for JSON."""
        return self._loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; `state` may be the union of all processes' states."""
        self._loader.set_state(state)

    def _put(self, rows: np.ndarray[Any, Any]) -> jax.Array:
        def share(place: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
            assert place is not None  # it is for devices of other processes
            start, stop, _ = place[0].indices(self._shape[0])
            first = self._index[start]
            return rows[first : first + stop - start, place[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, share)
