"""The key-value cache: an argument and a result of the model, never hidden state.

Shapes: B batch, S slots, K key-value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.config import ModelConfig
from sharding import constrain

EMPTY = jnp.iinfo(jnp.int32).max  # position of a slot that holds no token: after every query, so never attended


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far: slots for the prompts, then a ring for the tokens after them.

    All rows write the same slot at the same time, so that the update is one in-place slice; which token of its row
    a slot holds is said by `positions_BS`, and attention looks at positions, never at the order of slots. A row that
    has nothing to write leaves an EMPTY slot. A row may begin while others go on: its prompt goes to the prompt slots,
    and the ring, emptied for that row, takes its tokens from wherever it stands. A ring of R slots serves every row
    whose tokens after the prompt are at most R.

    keys, values: one [B, S, K, H] array per layer, keys already rotated.
    positions_BS: position of the token in each slot, EMPTY where there is none.
    next_slot: the slot the next token goes to, int32 scalar.
    prompt_slots: where the ring begins.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    next_slot: jax.Array
    prompt_slots: int = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: ModelConfig, batch: int, prompt_slots: int, dtype: jnp.dtype, ring_slots: int = 0
    ) -> KVCache:
        """An empty cache."""
        slots = prompt_slots + ring_slots
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)

        def zeros() -> jax.Array:
            return constrain(jnp.zeros(shape, dtype), "batch", "length", "act_kv_heads", "head_dim")

        return cls(
            keys=tuple(zeros() for _ in range(config.num_hidden_layers)),
            values=tuple(zeros() for _ in range(config.num_hidden_layers)),
            positions_BS=constrain(jnp.full((batch, slots), EMPTY, jnp.int32), "batch", "length"),
            next_slot=jnp.asarray(prompt_slots if ring_slots else 0, jnp.int32),
            prompt_slots=prompt_slots,
        )

    @property
    def ring_slots(self) -> int:
        """Slots for the tokens after the prompts."""
        return self.positions_BS.shape[1] - self.prompt_slots

    def slot_after(self, tokens: int) -> jax.Array:
        """`next_slot` once `tokens` more are written: past the last slot it is the ring's first."""
        slot = self.next_slot + tokens
        return jnp.where(slot >= self.positions_BS.shape[1], self.prompt_slots, slot)

    def resize(self, prompt_slots: int, ring_slots: int) -> KVCache:
        """The same tokens in another number of slots.

        Prompts keep their first `prompt_slots` slots, the ring its last `ring_slots` tokens: whatever lies beyond is
        lost, so it must be empty or of finished rows.
        """
        old = self.ring_slots

        def fit(x: jax.Array, slots: int, value: int, *, keep_last: bool) -> jax.Array:
            cut = max(x.shape[1] - slots, 0)
            x = x[:, cut:] if keep_last else x[:, : x.shape[1] - cut]
            padding = [(0, 0), (0, slots - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, padding, constant_values=value)

        def move(x: jax.Array, value: int = 0) -> jax.Array:
            prompts, ring = x[:, : self.prompt_slots], x[:, self.prompt_slots :]
            if old:
                ring = jnp.roll(ring, self.prompt_slots - self.next_slot, axis=1)  # the oldest token first
            parts = fit(prompts, prompt_slots, value, keep_last=False), fit(ring, ring_slots, value, keep_last=True)
            return jnp.concatenate(parts, axis=1)

        return dataclasses.replace(
            self,
            keys=tuple(map(move, self.keys)),
            values=tuple(map(move, self.values)),
            positions_BS=move(self.positions_BS, EMPTY),
            next_slot=jnp.asarray(prompt_slots + (old if ring_slots > old else 0), jnp.int32),
            prompt_slots=prompt_slots,
        )

    def admit(self, new: KVCache, rows_A: jax.Array) -> KVCache:
        """The rows `rows_A` replaced by those of `new`, a cache of prompts only with at most as many prompt slots.

        Rows outside 0 .. B - 1 are not admitted.
        """
        slots = new.prompt_slots

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[rows_A, :slots].set(rows, mode="drop")

        emptied_BS = self.positions_BS.at[rows_A].set(EMPTY, mode="drop")
        return dataclasses.replace(
            self,
            keys=tuple(map(put, self.keys, new.keys)),
            values=tuple(map(put, self.values, new.values)),
            positions_BS=put(emptied_BS, new.positions_BS),
        )
