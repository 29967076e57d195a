"""Grouped-query attention (Ainslie et al. 2023) and its masks.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
) -> jax.Array:
    """[B, T, S], true where a query may look: the same segment, a position not after its own."""
    same = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same & (key_positions_BS[:, None, :] <= query_positions_BT[:, :, None])


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention, scores and softmax in float32; [B, T, N, H] in q's dtype."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    # A large finite number, not -inf: a padding query that may look nowhere then stays finite.
    scores = jnp.where(mask_BTS[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(q_BTNH.shape)
