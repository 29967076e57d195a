"""One of two processes with four devices each, whose rows lie apart as those of a TPU host do: run by
tests/data/test_data_loader.py, with a DataConfig as JSON.

Prints, as JSON, the rows whose state it holds, after it has compared what its devices got with the whole batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import draccus
import jax
import numpy as np
from jax.sharding import Mesh

from qwen3_jax.data import DataConfig, make_loader
from qwen3_jax.train.feed import FileFeed
from sharding import start_processes


def main(words: Sequence[str]) -> None:
    start_processes()
    config = draccus.decode(DataConfig, json.loads(words[0]))
    # Rows over four pairs of devices, every other one of this process; a pair splits the tokens.
    grid = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2).reshape(1, 4, 1, 2, 1)
    mesh = Mesh(grid, ("data", "fsdp", "expert", "context", "tensor"))
    feed, whole = FileFeed(config, mesh), make_loader(config)
    for _ in range(5):
        expected = next(whole)
        for name, array in feed.next(None).items():
            assert len(array.addressable_shards) == 4
            for shard in array.addressable_shards:
                assert shard.data.shape == (2, config.sequence_length // 2)
                np.testing.assert_array_equal(shard.data, expected[name][shard.index])
    print(json.dumps(list(feed.get_state())))
