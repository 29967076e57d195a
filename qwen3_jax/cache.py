"""The key-value cache: an argument and a result of the model, not a mutable collection.

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

KEY_SLOTS, VALUE_SLOTS = 3, 2  # the dim of the slots
EMPTY = jnp.iinfo(jnp.int32).max  # position of an empty slot: larger than every query's, so causally masked


@struct.dataclass
class KVCache:
    """Keys and values of earlier tokens: slots for the prompts, then a ring of slots for the generated tokens.

    All rows write to the same slot in the same step, so that the update is one in-place slice. `positions_BS` says
    which token of its row a slot holds. Attention masks by positions and never by the order of the slots.

    With 4 prompt slots and a ring of 5 (a number is the position in the slot, "." is EMPTY):

                  prompt slots  |  ring
        slot       0  1  2  3   |  4  5  6  7  8
        row 0      0  1  2  .   |  6  7  3  4  5     prompt of 3, admitted 5 steps ago, when next_slot was 6
        row 1      0  1  2  3   |  4  5  .  .  .     prompt of 4, admitted 2 steps ago, when next_slot was 4
        row 2      0  1  .  .   |  .  .  2  3  4     prompt of 2, finished 2 steps ago: it writes EMPTY
                                         ^ next_slot is 6 for all rows

    A row can be admitted at any step: its prompt goes to the prompt slots, its ring slots are emptied, and its tokens
    are written from `next_slot` on. A ring of R slots serves every row with at most R tokens after the prompt. Row 0
    has used all of its ring: another token would overwrite position 3.

    keys: one [B, K, H, S] array per layer, already rotated. values: one [B, K, S, H] array per layer. These are the
      orders of dims in which the products of attention read them without a transpose.
    positions_BS: position of the token in each slot, EMPTY where there is none.
    next_slot: the slot that the next token is written to, int32 scalar.
    prompt_slots: number of prompt slots, and so the first slot of the ring.
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
        """The same structure, with a tuple of logical axes in place of each array."""
        names: dict[str, Any] = {
            "keys": (("attention_batch", "act_kv_heads", None, "slots"),) * len(self.keys),
            "values": (("attention_batch", "act_kv_heads", "slots", None),) * len(self.values),
            "positions_BS": ("attention_batch", "slots"),
            "next_slot": (),
        }
        return dataclasses.replace(self, **names)

    @property
    def ring_slots(self) -> int:
        """Number of slots of the ring."""
        return self.positions_BS.shape[1] - self.prompt_slots

    def slot_after(self, tokens: int) -> jax.Array:
        """`next_slot` after `tokens` more tokens: after the last slot comes the first slot of the ring."""
        slot = self.next_slot + tokens
        return jnp.where(slot >= self.positions_BS.shape[1], self.prompt_slots, slot)

    def resize(self, prompt_slots: int, ring_slots: int) -> KVCache:
        """The same tokens in a cache with other numbers of slots.

        The first `prompt_slots` prompt slots and the newest `ring_slots` slots of the ring are kept. The others are
        discarded, so they must be empty or belong to finished rows.
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
                ring = jnp.roll(ring, self.prompt_slots - self.next_slot, axis=axis)  # to oldest first
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

    def admit(self, new: KVCache, source_A: jax.Array, rows_A: jax.Array) -> KVCache:
        """This cache with rows `rows_A` replaced by rows `source_A` of `new`.

        `new` holds prompts only and has at most as many prompt slots. Entries of `rows_A` outside 0 .. B - 1 are
        ignored.
        """
        slots = new.prompt_slots

        def put(old: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
            where: list[Any] = [slice(None)] * old.ndim
            where[0], where[axis] = rows_A, slice(slots)
            return old.at[tuple(where)].set(rows[source_A], mode="drop")

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
    """A layer's keys [B, K, H, S] and values [B, K, S, H] with new tokens written to slots `slot` .. `slot + T - 1`."""
    k_BKHT, v_BKTH = (x.astype(cached[0].dtype) for x in (k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)))
    k_BKHS = jax.lax.dynamic_update_slice_in_dim(cached[0], k_BKHT, slot, KEY_SLOTS)
    return k_BKHS, jax.lax.dynamic_update_slice_in_dim(cached[1], v_BKTH, slot, VALUE_SLOTS)
