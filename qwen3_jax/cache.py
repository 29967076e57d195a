"""The key-value cache: an argument and a result of the model, never hidden state.

Shapes: B batch, S slots, K key-value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.config import ModelConfig

EMPTY = jnp.iinfo(jnp.int32).max  # position of a slot that holds no token: after every query, so never attended


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    All rows write the same slot at the same time, so that the update is one in-place slice; which token of its row
    a slot holds is said by `positions_BS`, and attention looks at positions, never at the order of slots. A row that
    has nothing to write leaves an EMPTY slot.

    keys, values: one [B, S, K, H] array per layer, keys already rotated.
    positions_BS: position of the token in each slot, EMPTY where there is none.
    next_slot: the slot the next token goes to, int32 scalar.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    next_slot: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
        """An empty cache of `slots` tokens per row."""
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            positions_BS=jnp.full((batch, slots), EMPTY, jnp.int32),
            next_slot=jnp.zeros((), jnp.int32),
        )

    def extend(self, slots: int) -> KVCache:
        """The same cache with `slots` more empty slots per row."""

        def pad(x: jax.Array, value: int = 0) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, slots)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

        return dataclasses.replace(
            self,
            keys=tuple(map(pad, self.keys)),
            values=tuple(map(pad, self.values)),
            positions_BS=pad(self.positions_BS, EMPTY),
        )
