"""Weights that a run reads and does not train: a teacher's, a reference's.

They come with every batch, since constants of a program would be copied into it. They are sharded as the trained ones
are, each model by its own sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen3_jax.model import Qwen3
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.objective import Batch, BatchArray


class Frozen:
    """A model whose weights are arrays of a batch.

    name: goes before the names of its weights. arrays: its weights, as a batch has them.
    """

    def __init__(self, name: str, model: Qwen3) -> None:
        self.model, self._prefix = model, f"{name}/"
        boxed: Any = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        leaves = flatten_dict(boxed, sep="/", is_leaf=lambda _, leaf: isinstance(leaf, nn.LogicallyPartitioned))
        self.arrays = {
            self._prefix + name: BatchArray(leaf.value.shape, model.dtype, leaf.names) for name, leaf in leaves.items()
        }

    def params(self, batch: Mapping[str, Any]) -> Any:
        """The weights in a batch, as the tree that the model takes."""
        return unflatten_dict({name.removeprefix(self._prefix): batch[name] for name in self.arrays}, sep="/")

    def feed(self, feed: Feed, params: Any) -> FrozenFeed:
        """`feed` with these weights in its batches."""
        return FrozenFeed(feed, self.flat(params))

    def flat(self, params: Any) -> dict[str, jax.Array]:
        """The weights by their names in a batch."""
        return {self._prefix + name: x for name, x in flatten_dict(params, sep="/").items()}


@dataclasses.dataclass(frozen=True)
class FrozenFeed:
    """A feed whose batches bring `arrays`, which stay on the devices."""

    _feed: Feed
    _arrays: Mapping[str, jax.Array]

    @property
    def numbers(self) -> Mapping[str, float]:
        return self._feed.numbers

    def next(self, params: Any) -> Batch:
        return {**self._feed.next(params), **self._arrays}

    def get_state(self) -> dict[str, Any]:
        return self._feed.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._feed.set_state(state)

    def describe(self, directory: Path) -> None:
        self._feed.describe(directory)
