"""The key-value cache: an argument and a result of the model, never hidden state.

Shapes: B batch, T tokens, S slots, K key-value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.config import ModelConfig
from sharding import constrain

KEY_SLOTS, VALUE_SLOTS = 3, 2  # the axis of the slots
EMPTY = jnp.iinfo(jnp.int32).max  # position of a slot that holds no token: after every query, so never attended


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far: slots for the prompts, then a ring for the tokens after them.

    All rows write the same slot at the same time, so that the update is one in-place slice; which token of its row
    a slot holds is said by `positions_BS`, and attention looks at positions, never at the order of slots. A row that
    has nothing to write leaves an EMPTY slot. A row may begin while others go on: its prompt goes to the prompt slots,
    and the ring, emptied for that row, takes its tokens from wherever it stands. A ring of R slots serves every row
    whose tokens after the prompt are at most R.

    keys: one [B, K, H, S] array per layer, already rotated. values: one [B, K, S, H] array per layer. Either is read
      in the order it lies in.
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
        heads, head_dim, layers = config.num_key_value_heads, config.head_dim, range(config.num_hidden_layers)
        cache = cls(
            keys=tuple(jnp.zeros((batch, heads, head_dim, slots), dtype) for _ in layers),
            values=tuple(jnp.zeros((batch, heads, slots, head_dim), dtype) for _ in layers),
            positions_BS=jnp.full((batch, slots), EMPTY, jnp.int32),
            next_slot=jnp.asarray(prompt_slots if ring_slots else 0, jnp.int32),
            prompt_slots=prompt_slots,
        )
        return jax.tree.map(lambda x, names: constrain(x, *names), cache, cache.axes)

    @property
    def axes(self) -> Any:
        """The logical axes of each array, as a tuple of names in its place."""
        names: dict[str, Any] = {
            "keys": (("attention_batch", "act_kv_heads", None, "slots"),) * len(self.keys),
            "values": (("attention_batch", "act_kv_heads", "slots", None),) * len(self.values),
            "positions_BS": ("attention_batch", "slots"),
            "next_slot": (),
        }
        return dataclasses.replace(self, **names)

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

        def fit(x: jax.Array, axis: int, slots: int, value: int, *, keep_last: bool) -> jax.Array:
            size = x.shape[axis]
            cut = max(size - slots, 0)
            x = jax.lax.slice_in_dim(x, cut if keep_last else 0, size if keep_last else size - cut, axis=axis)
            padding = [(0, slots - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
            return jnp.pad(x, padding, constant_values=value)

        def move(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
            prompts, ring = jnp.split(x, [self.prompt_slots], axis=axis)
            if old:
                ring = jnp.roll(ring, self.prompt_slots - self.next_slot, axis=axis)  # the oldest token first
            prompts = fit(prompts, axis, prompt_slots, value, keep_last=False)
            return jnp.concatenate([prompts, fit(ring, axis, ring_slots, value, keep_last=True)], axis=axis)

        return dataclasses.replace(
            self,
            keys=tuple(move(x, KEY_SLOTS) for x in self.keys),
            values=tuple(move(x, VALUE_SLOTS) for x in self.values),
            positions_BS=move(self.positions_BS, 1, EMPTY),
            next_slot=jnp.asarray(prompt_slots + (old if ring_slots > old else 0), jnp.int32),
            prompt_slots=prompt_slots,
        )

    def admit(self, new: KVCache, rows_A: jax.Array) -> KVCache:
        """The rows `rows_A` replaced by those of `new`, a cache of prompts only with at most as many prompt slots.

        Rows outside 0 .. B - 1 are not admitted.
        """
        slots = new.prompt_slots

        def put(old: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
            where: list[Any] = [slice(None)] * old.ndim
            where[0], where[axis] = rows_A, slice(slots)
            return old.at[tuple(where)].set(rows, mode="drop")

        emptied_BS = self.positions_BS.at[rows_A].set(EMPTY, mode="drop")
        return dataclasses.replace(
            self,
            keys=tuple(put(x, rows, KEY_SLOTS) for x, rows in zip(self.keys, new.keys, strict=True)),
            values=tuple(put(x, rows, VALUE_SLOTS) for x, rows in zip(self.values, new.values, strict=True)),
            positions_BS=put(emptied_BS, new.positions_BS, 1),
        )


def write_slots(
    cached: tuple[jax.Array, jax.Array], k_BTKH: jax.Array, v_BTKH: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's keys [B, K, H, S] and values [B, K, S, H] with those of new tokens, the first of them at `slot`."""
    k_BKHT, v_BKTH = (x.astype(cached[0].dtype) for x in (k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)))
    k_BKHS = jax.lax.dynamic_update_slice_in_dim(cached[0], k_BKHT, slot, KEY_SLOTS)
    return k_BKHS, jax.lax.dynamic_update_slice_in_dim(cached[1], v_BKTH, slot, VALUE_SLOTS)
